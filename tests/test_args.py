"""Flags are read as published, and everything wrong with a command line is found, at once and before anything is written."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from finetune import args as arguments
from finetune import checks, training_args
from finetune.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIG = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_channels": 16,
    "intermediate_size": 96, "seq_length": 64, "max_position_embeddings": 64, "use_dynamic_ntk": True, "use_logn_attn": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.32.0", "onnx_safe": None,
}  # fmt: skip
SHAPES = {
    "transformer.wte.weight": [300, 32],
    "transformer.h.0.ln_1.weight": [32],
    "transformer.h.0.attn.c_attn.weight": [96, 32],
    "transformer.h.0.attn.c_attn.bias": [96],
    "transformer.h.0.attn.c_proj.weight": [32, 32],
    "transformer.h.0.mlp.w1.weight": [48, 32],
    "transformer.h.0.mlp.w2.weight": [48, 32],
    "transformer.h.0.mlp.c_proj.weight": [32, 48],
    "lm_head.weight": [300, 32],
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
World = namedtuple("World", "model data out")


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """A file of zeros in bfloat16, in the format's own terms: length of the header, header, data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_config(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write_adapter(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"r": 64, "lora_alpha": 16, "target_modules": ["w2", "w1", "c_proj", "c_attn"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def write_checkpoint(folder: Path, adapter: dict | None = None) -> Path:
    """What is looked at of a checkpoint: that it is whole, and its method."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    if adapter is not None:
        write_adapter(folder, **adapter)
    return folder


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    """A checkpoint, a data file and an output folder that does not exist yet, in an otherwise empty place."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "Qwen model.v1"
    model.mkdir()
    write_config(model)
    write_safetensors(model / "model.safetensors", SHAPES)
    (model / "qwen.tiktoken").write_text("".join(f"QQ== {rank}\n" for rank in range(20)))
    data = tmp_path / "data.json"
    data.write_text('[{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}]')
    return World(model, data, tmp_path / "out")


def read(world: World, *flags: str) -> arguments.Args:
    """The usual command line and more flags."""
    usual = ["--model_name_or_path", str(world.model), "--data_path", str(world.data), "--output_dir", str(world.out)]
    return arguments.parse([*usual, "--model_max_length", "64", *flags])


def found(world: World, *flags: str) -> list[str]:
    """All findings on a command line."""
    try:
        arguments.check(read(world, *flags))
    except UserError as error:
        return error.findings
    return []


def only(world: World, *flags: str) -> str:
    """The one finding."""
    lines = found(world, *flags)
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    return lines[0]


# ---- reading flags


def test_a_good_command_line_passes_and_writes_nothing(world):
    before = sorted(path.name for path in world.data.parent.iterdir())
    assert found(world) == []
    assert found(world, "--use_lora") == []
    assert sorted(path.name for path in world.data.parent.iterdir()) == before


def test_defaults():
    args = arguments.parse([])
    assert (args.training.model_max_length, args.training.optim, args.training.report_to) == (8192, "adamw_torch", [])
    assert (args.data.supervise, args.data.long_samples, args.data.max_tokens_per_pass) == ("assistant", "cut", 8192)
    assert (args.lora.lora_r, args.lora.lora_alpha, args.lora.lora_dropout) == (64, 16, 0.05)
    assert args.lora.lora_target_modules == ["c_attn", "c_proj", "w1", "w2"]
    assert (args.lora.use_lora, args.lora.lora_bias, args.training.logging_steps) == (False, "none", 1)
    assert args.training.remove_unused_columns is False and not args.training.bf16 and not args.training.fp16


@pytest.mark.parametrize("spelling", [["--bf16"], ["--bf16", "True"], ["--bf16=true"], ["--bf16", "1"]])
def test_switches_with_and_without_a_value(spelling):
    args = arguments.parse([*spelling, "--use_lora", "--gradient_checkpointing", "False"])
    assert args.training.bf16 is True and args.lora.use_lora is True and args.training.gradient_checkpointing is False


def test_flags_with_dashes_and_short_ones():
    args = arguments.parse(["-m", "M", "-d", "D", "-o", "O", "--lora-target-modules", "w1", "w2", "--num-train-epochs", "2"])
    assert (args.model.model_name_or_path, args.data.data_path, args.training.output_dir) == ("M", "D", "O")
    assert (args.lora.lora_target_modules, args.training.num_train_epochs) == (["w1", "w2"], 2)


def test_the_last_of_a_repeated_flag_wins():
    assert arguments.parse(["--lora_r", "8", "--lora_r", "32"]).lora.lora_r == 32


def test_resume_takes_a_folder_true_or_nothing():
    wishes = [["--resume_from_checkpoint"], ["--resume_from_checkpoint", "True"], ["--resume_from_checkpoint", "a/checkpoint-3"]]
    assert [arguments.parse(wish).training.resume_from_checkpoint for wish in wishes] == ["auto", "True", "a/checkpoint-3"]


def test_several_places_to_report_to():
    assert arguments.parse(["--report_to", "tensorboard", "wandb"]).training.report_to == ["tensorboard", "wandb"]


COMMON = """--model_name_or_path {model} --data_path {data} --output_dir {out} --num_train_epochs 5 --per_device_eval_batch_size 1
    --evaluation_strategy no --save_strategy steps --save_steps 1000 --save_total_limit 10 --weight_decay 0.1 --adam_beta2 0.95
    --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 --report_to none --model_max_length 512
    --lazy_preprocess True --gradient_checkpointing"""
PUBLISHED = {
    "finetune_ds.sh": ("1e-5", 1, 16, "--bf16 True", "zero3", ""),
    "finetune_lora_single_gpu.sh": ("3e-4", 2, 8, "--bf16 True", None, "--use_lora"),
    "finetune_lora_ds.sh": ("3e-4", 2, 8, "--bf16 True", "zero2", "--use_lora"),
    "finetune_qlora_single_gpu.sh": ("3e-4", 2, 8, "--fp16 True", "zero2", "--use_lora --q_lora"),
    "finetune_qlora_ds.sh": ("3e-4", 2, 8, "--fp16 True", "zero2", "--use_lora --q_lora"),
}


@pytest.mark.parametrize("script", PUBLISHED)
def test_published_command_lines(script, tmp_path, world):
    rate, batch, accumulation, precision, engine, more = PUBLISHED[script]
    model = shutil.copytree(world.model, tmp_path / "model")
    line = COMMON.format(model=model, data=world.data, out=world.out).split() + f"{precision} {more} --learning_rate {rate}".split()
    line += f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulation}".split()
    line += ["--deepspeed", f"finetune/ds_config_{engine}.json"] if engine else []
    args = arguments.parse(line)
    t = args.training
    assert (t.learning_rate, t.per_device_train_batch_size, t.gradient_accumulation_steps) == (float(rate), batch, accumulation)
    assert (t.num_train_epochs, t.per_device_eval_batch_size, t.eval_strategy, t.save_strategy) == (5, 1, "no", "steps")
    assert (t.save_steps, t.save_total_limit, t.weight_decay, t.adam_beta2) == (1000, 10, 0.1, 0.95)
    assert (t.warmup_ratio, t.lr_scheduler_type, t.logging_steps, t.model_max_length) == (0.01, "cosine", 1, 512)
    assert (t.bf16, t.fp16, t.gradient_checkpointing) == ("bf16" in precision, "fp16" in precision, True)
    assert (args.lora.use_lora, args.lora.q_lora) == ("--use_lora" in more, "--q_lora" in more)
    expected = ["--deepspeed"] * bool(engine) + ["--q_lora"] * ("--q_lora" in more)
    try:
        arguments.check(args)
        findings = []
    except UserError as error:
        findings = error.findings
    assert [line.split()[0] for line in findings] == expected
    assert all("not available in this version" in line for line in findings)


@pytest.mark.parametrize("steps, warmup", [(1, 1), (99, 1), (100, 1), (101, 2), (250, 3), (1000, 10)])
def test_warmup_ratio_is_rounded_up(steps, warmup):
    assert arguments.parse(["--warmup_ratio", "0.01"]).training.get_warmup_steps(steps) == warmup


def test_warmup_steps_win_over_the_ratio():
    training = arguments.parse(["--warmup_ratio", "0.5", "--warmup_steps", "7"]).training
    assert training.get_warmup_steps(1000) == 7
    assert arguments.parse([]).training.get_warmup_steps(1000) == 0


def test_evaluation_by_steps_happens_ten_times_unless_said_otherwise():
    assert arguments.parse(["--evaluation_strategy", "steps"]).training.eval_steps == 0.1
    assert arguments.parse(["--evaluation_strategy", "steps", "--eval_steps", "50"]).training.eval_steps == 50


def test_gradient_checkpointing_brings_no_warning(recwarn):
    training = arguments.parse(["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}']).training
    assert training.gradient_checkpointing is True and training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_logging_dir_reaches_tensorboard(monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    arguments.parse(["--logging_dir", "logs"])
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"


def test_bf16_without_a_gpu_uses_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    training = arguments.parse(["--bf16"]).training
    assert training.bf16 and training.use_cpu and training.device.type == "cpu"


def test_one_process_uses_one_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert arguments.parse([]).training.n_gpu == 1
    assert "4 GPUs are visible" in capsys.readouterr().err


# ---- flags of older transformers

REMOVED = """overwrite_output_dir evaluation_strategy per_gpu_train_batch_size per_gpu_eval_batch_size warmup_ratio logging_dir
    save_safetensors no_cuda use_mps_device jit_mode_eval use_ipex fp16_opt_level half_precision_backend tpu_num_cores
    tpu_metrics_debug past_index sharded_ddp fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap adafactor group_by_length
    use_legacy_prediction_loop include_inputs_for_metrics fp16_backend push_to_hub_model_id push_to_hub_organization
    push_to_hub_token mp_parameters torchdynamo ray_scope dispatch_batches include_tokens_per_second""".split()


@pytest.mark.parametrize("name", REMOVED)
def test_every_flag_that_transformers_dropped_since_4_32_is_answered(name, capsys):
    values = {"evaluation_strategy": "no", "warmup_ratio": "0.1", "per_gpu_train_batch_size": "1", "per_gpu_eval_batch_size": "1"}
    args = arguments.parse([f"--{name}", values.get(name, "True")])
    assert not any("unknown" in line or "belongs to no flag" in line for line in args.findings), args.findings
    fields = {f.name for f in dataclasses.fields(training_args.TrainingArguments)}
    old = arguments.OLD_FLAGS.get(name)
    assert name in fields or old.new in fields or f"--{name}" in "".join(args.findings) + capsys.readouterr().err


def test_old_names_set_the_new_fields():
    line = "--evaluation_strategy epoch --per_gpu_train_batch_size=3 --per-gpu-eval-batch-size 4 --no_cuda --push_to_hub_model_id a/b"
    training = arguments.parse(line.split()).training
    assert (training.eval_strategy, training.per_device_train_batch_size, training.per_device_eval_batch_size) == ("epoch", 3, 4)
    assert training.use_cpu is True and training.hub_model_id == "a/b"


def test_a_flag_without_effect_is_left_out_with_its_value(capsys):
    args = arguments.parse("--group_by_length True --fp16_opt_level=O1 --num_train_epochs 4".split())
    assert args.findings == [] and args.training.num_train_epochs == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("note: --group_by_length has no effect: ")


def test_a_flag_that_lost_its_meaning_is_refused(world):
    assert only(world, "--adafactor") == "--adafactor: transformers has dropped it - give --optim adafactor"


def test_a_flag_that_this_trainer_passes_over_is_named(capsys):
    arguments.parse(["--torch_empty_cache_steps", "3", "--num_train_epochs", "2"])
    assert "no effect in this trainer (packed samples, evaluated by their loss): --torch_empty_cache_steps" in capsys.readouterr().err


def test_lazy_preprocess_is_accepted(world, capsys):
    assert found(world, "--lazy_preprocess", "True") == []
    assert "--lazy_preprocess has no effect" in capsys.readouterr().err


# ---- flags that cannot be


def test_a_misspelt_flag(world):
    assert only(world, "--learing_rate", "1e-4") == "--learing_rate: unknown flag - did you mean --learning_rate?"
    assert only(world, "--evaluation-strateg=no") == "--evaluation-strateg: unknown flag - did you mean --evaluation_strategy?"
    assert only(world, "--zzz") == "--zzz: unknown flag - python finetune.py --help_all lists all flags"


def test_a_word_too_many(world):
    assert only(world, "--bf16", "True", "extra").startswith("extra: belongs to no flag - ")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_r", "eight"], "--lora_r: invalid int value: 'eight' - "),
        (["-m"], "--model_name_or_path: expected one argument - "),
        (["--supervise", "all"], "--supervise: invalid choice: 'all' (choose from"),
        (["--bf16", "perhaps"], "--bf16: Truthy value expected: got perhaps"),
    ],
)
def test_a_value_of_the_wrong_type(world, flags, message):
    assert only(world, *flags).startswith(message)


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_r 0 --use_lora", "--lora_alpha 0 --use_lora", "--lora_dropout 1 --use_lora", "--model_max_length 15", "--seed -1",
        "--max_tokens_per_pass 0", "--per_device_train_batch_size 0", "--per_device_eval_batch_size 0", "--max_grad_norm -1",
        "--gradient_accumulation_steps 0", "--learning_rate -0.1", "--learning_rate nan", "--weight_decay -0.1", "--adam_beta2 1",
        "--warmup_ratio 1.5", "--save_total_limit 0", "--save_steps 0", "--num_train_epochs 0", "--adam_beta1 -0.1",
        "--logging_steps -1",
    ],
)  # fmt: skip
def test_a_number_out_of_range(world, flags):
    name, value, *more = flags.split()
    assert re.match(rf"{name} \S+: (out of range|nothing to train) - give ", only(world, name, value, *more))


def test_max_steps_needs_no_epochs(world):
    assert found(world, "--num_train_epochs", "0", "--max_steps", "3") == []


def test_both_precisions(world):
    assert only(world, "--bf16", "--fp16").startswith("--bf16 and --fp16: only one of them can be - leave out one")


def test_bf16_on_a_gpu_without_it(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert only(world, "--bf16") == "--bf16: this GPU (sm_70) has no bf16 - use --fp16"
    assert training_args.precision({"bf16": True, "fp16": False, "use_cpu": True}) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert training_args.precision({"bf16": True, "fp16": False, "use_cpu": False}) == []


@pytest.mark.parametrize(
    "flags",
    [
        "--deepspeed x.json", "--fsdp full_shard", "--label_smoothing_factor 0.1", "--neftune_noise_alpha 5.5",
        "--use_liger_kernel True", "--auto_find_batch_size True",
    ],
)  # fmt: skip
def test_what_would_be_passed_over_in_silence_is_refused(world, flags):
    line = only(world, *flags.split())
    assert line.startswith(f"{flags}: ") and " - " in line


def test_a_refusal_of_transformers_is_one_line(world):
    line = only(world, "--lr_scheduler_type", "cosin")
    assert "cosin" in line and "SchedulerType" in line and line.endswith(" - change or leave out the flag")
    assert "load_best_model_at_end" in only(world, "--load_best_model_at_end")


def test_all_findings_come_together(world):
    world.data.unlink()
    (world.model / "model.safetensors").unlink()
    lines = found(world, "--bf16", "--fp16", "--lerning_rate", "1", "--lora_r", "0", "--use_lora", "--eval_data_path", "none.json")
    starts = [
        "--lerning_rate: ", "--bf16 and --fp16: ", "--lora_r 0: ", f"--data_path {world.data}: no such file", "--eval_data_path none.json: ",
        "--eval_data_path is set", f"{world.model}: no weights",
    ]  # fmt: skip
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * len(starts), lines


# ---- data


def test_data_path_missing(world):
    arguments.parse([])
    with pytest.raises(UserError) as error:
        arguments.check(arguments.parse(["-m", str(world.model), "-o", str(world.out), "--model_max_length", "64"]))
    assert error.value.findings == ["--data_path: missing - give your training JSON with -d"]


def test_data_path_leads_nowhere(world):
    line = only(world, "--data_path", "path_to_data")
    assert line == "--data_path path_to_data: no such file. Give your training JSON with -d."


def test_evaluation_data_without_evaluation(world):
    other = shutil.copy(world.data, "eval.json")
    line = only(world, "--eval_data_path", other)
    assert line == "--eval_data_path is set but evaluation is off - set --evaluation_strategy steps or epoch"
    assert found(world, "--eval_data_path", other, "--evaluation_strategy", "epoch") == []
    assert found(world, "--eval_data_path", other, "--eval_on_start") == []


def test_evaluation_without_data(world):
    line = only(world, "--evaluation_strategy", "steps")
    assert line.startswith("--evaluation_strategy steps needs conversations to evaluate on - give --eval_data_path")


def test_evaluating_on_the_training_data_is_warned_of(world, capsys):
    assert found(world, "--eval_data_path", str(world.data), "--evaluation_strategy", "epoch") == []
    assert "warning: --eval_data_path is the training data" in capsys.readouterr().err


# ---- the model's folder


def test_no_model(world):
    with pytest.raises(UserError) as error:
        arguments.check(arguments.parse(["-d", str(world.data), "-o", str(world.out)]))
    assert error.value.findings[0].startswith("--model_name_or_path: missing - give a checkpoint's folder with -m")


def test_a_folder_that_is_not_there(world):
    assert only(world, "-m", "/no/such").startswith("--model_name_or_path /no/such: no such folder - give a checkpoint's folder")
    assert only(world, "-m", str(world.data)).endswith("is a file - give the folder of a checkpoint")


def test_a_name_of_the_hub_passes(world):
    assert found(world, "-m", "Qwen/Qwen-7B") == []
    assert found(world, "-m", "Qwen/Qwen-7B", "--use_lora") == []


def test_no_config(world):
    (world.model / "config.json").unlink()
    assert only(world).endswith("no config.json there - give the folder of a whole checkpoint")
    inside = world.model / "snapshots" / "abc"
    inside.mkdir(parents=True)
    write_config(inside)
    assert only(world).endswith(f"did you mean {inside}?")


def test_an_adapter_given_as_the_model(world, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    line = only(world, "-m", str(adapter))
    assert "holds a LoRA adapter, not a model - give its base model" in line and f"--lora_weight_path {adapter}" in line


def test_a_shard_is_missing(world):
    (world.model / "model.safetensors").unlink()
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = {"weight_map": {name: shards[i % 3] for i, name in enumerate(SHAPES)}}
    (world.model / "model.safetensors.index.json").write_text(json.dumps(index))
    for i in (0, 1):
        write_safetensors(world.model / shards[i], {name: SHAPES[name] for j, name in enumerate(SHAPES) if j % 3 == i})
    line = only(world)
    assert f"missing {shards[2]} (index lists 3 shards, 2 present) - " in line
    write_safetensors(world.model / shards[2], {name: SHAPES[name] for j, name in enumerate(SHAPES) if j % 3 == 2})
    assert found(world) == []
    (world.model / "model.safetensors.index.json").write_text("{")
    assert "index of shards" in only(world)


def test_a_file_that_was_cut_short(world):
    path = world.model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert only(world) == f"{path}: incomplete: {len(whole) - 10:,} bytes of {len(whole):,} - download it again"
    for broken in (b"", whole[:50], b"<html>not found</html>"):
        path.write_bytes(broken)
        assert only(world) == f"{path}: not a whole safetensors file ({len(broken):,} bytes) - download it again"


def test_no_weights(world):
    (world.model / "model.safetensors").unlink()
    assert only(world).startswith(f"{world.model}: no weights")


def test_old_bin_weights_pass(world):
    (world.model / "model.safetensors").unlink()
    (world.model / "pytorch_model.bin").write_bytes(bytes(1000))
    assert found(world) == []


@pytest.mark.parametrize("name", ["model.safetensors", "qwen.tiktoken", "config.json"])
def test_lfs_pointers(world, name):
    (world.model / name).write_text(POINTER)
    line = only(world)
    assert line == f"{world.model / name} is a git-lfs pointer ({len(POINTER)} bytes) - run git lfs pull in {world.model}"


def test_broken_config(world):
    (world.model / "config.json").write_text("{")
    assert only(world).startswith(f"{world.model / 'config.json'}: cannot be read")
    (world.model / "config.json").write_text("[]")
    assert "should hold a JSON object, found a list" in only(world)
    write_config(world.model, kv_channels=17)
    assert "kv_channels 17 x num_attention_heads 2 must be hidden_size" in only(world)
    write_config(world.model, model_type="qwenn")
    assert 'model_type "qwenn", which transformers does not know' in only(world)


def test_a_quantized_checkpoint(world, tmp_path):
    folder = shutil.copytree(world.model, tmp_path / "Qwen-7B-Chat-Int4")
    write_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    for flags in ([], ["--use_lora"]):
        line = only(world, "-m", str(folder), *flags)
        assert line.startswith(f"{folder} is quantized (gptq, 4 bit)") and line.endswith("made from (Qwen-7B-Chat)")


def test_q_lora_is_said_to_be_missing(world):
    expected = "--q_lora is not available in this version - use --use_lora with a 16-bit checkpoint"
    assert only(world, "--q_lora") == expected
    write_config(world.model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert only(world, "--q_lora", "--use_lora") == expected


def test_samples_longer_than_the_model_was_trained_on_are_warned_of(world, capsys):
    assert found(world, "--model_max_length", "65") == []
    assert "--model_max_length 65: the model was trained on 64 tokens" in capsys.readouterr().err
    assert found(world, "--model_max_length", "64") == []
    assert "trained on" not in capsys.readouterr().err


def test_a_misspelt_key_of_the_config_is_warned_of(world, capsys):
    config = dict(CONFIG)
    del config["use_dynamic_ntk"]
    (world.model / "config.json").write_text(json.dumps(config | {"use_dynamc_ntk": True, "made_by": "me"}))
    assert found(world) == []
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"warning: {world.model}/config.json: unknown config key use_dynamc_ntk; did you mean use_dynamic_ntk?"]


def test_the_vocabulary_of_weights_config_and_tokenizer(world):
    write_config(world.model, vocab_size=320)
    assert only(world).startswith(f"{world.model}: vocab 300 in weights, 320 in config.json - ")
    write_config(world.model)
    (world.model / "qwen.tiktoken").write_text("".join(f"QQ== {rank}\n" for rank in range(93)))
    assert only(world).startswith(f"{world.model}: the tokenizer has 301 tokens, the model 300 - ")
    (world.model / "qwen.tiktoken").unlink()
    assert only(world).startswith(f"{world.model}: no qwen.tiktoken - ")


def later_qwen(folder: Path) -> Path:
    """A qwen2 folder, as far as it is looked at."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 300, "max_position_embeddings": 64}))
    layers = {f"model.layers.0.self_attn.{name}_proj.weight": [32, 32] for name in "qkvo"}
    write_safetensors(folder / "model.safetensors", {"model.embed_tokens.weight": [300, 32], **layers})
    return folder


def test_a_later_qwen(world, tmp_path):
    folder = later_qwen(tmp_path / "Qwen2")
    assert found(world, "-m", str(folder)) == []
    assert found(world, "-m", str(folder), "--use_lora", "--lora_target_modules", "q_proj", "v_proj") == []
    line = only(world, "-m", str(folder), "--use_lora")
    assert "c_attn c_proj w1 w2: no such layer - this model has k_proj, o_proj, q_proj, v_proj" in line


# ---- the method


def test_unknown_layers(world):
    line = only(world, "--use_lora", "--lora_target_modules", "c_attn", "w3", "q_proj")
    assert line == (
        "--lora_target_modules w3 q_proj: no such layer - this model has c_attn, c_proj, w1, w2; separate them by blanks"
    )
    assert found(world, "--use_lora", "--lora_target_modules", "attn.c_proj", "w2") == []


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_known_biases(world, bias):
    assert found(world, "--use_lora", "--lora_bias", bias) == []


def test_an_unknown_bias(world):
    assert only(world, "--use_lora", "--lora_bias", "some") == "--lora_bias some: unknown - give none, all or lora_only"


def test_lora_settings_without_lora(world):
    line = only(world, "--lora_r", "8", "--lora_bias", "all")
    assert line.startswith("--lora_r, --lora_bias: without --use_lora all parameters are trained - add --use_lora")


def test_an_adapter_to_go_on_from(world, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", r=8)
    assert found(world, "--use_lora", "--lora_weight_path", str(adapter)) == []
    assert "(r=8 alpha=16 on c_attn, c_proj, w1, w2, bias none)" in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").write_text(POINTER)
    assert "git-lfs pointer" in only(world, "--use_lora", "--lora_weight_path", str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors there" in only(world, "--use_lora", "--lora_weight_path", str(adapter))
    line = only(world, "--use_lora", "--lora_weight_path", str(world.model))
    assert line.startswith(f"--lora_weight_path {world.model}: no adapter_config.json there - ")


# ---- the output folder


def test_output_over_an_input(world, tmp_path):
    assert "is the folder of --model_name_or_path" in only(world, "-o", str(world.model), "--overwrite_output_dir")
    assert "is the folder of --model_name_or_path" in only(world, "-o", str(world.model / ".." / world.model.name))
    adapter = write_adapter(tmp_path / "adapter")
    line = only(world, "--use_lora", "--lora_weight_path", str(adapter), "-o", str(adapter))
    assert "is the folder of --lora_weight_path" in line


def test_output_that_cannot_be_written(world, monkeypatch):
    assert only(world, "-o", str(world.data)).endswith("is a file - give a folder")
    assert "cannot be written to" in only(world, "-o", str(world.data / "below"))
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    assert f"{world.out.parent} cannot be written to" in only(world)


def test_output_of_an_earlier_run(world):
    write_checkpoint(world.out / "checkpoint-9")
    write_checkpoint(world.out / "checkpoint-10")
    line = only(world)
    assert line.startswith(f"--output_dir {world.out}: has checkpoint-10 - ")
    assert "--resume_from_checkpoint auto" in line and "--overwrite_output_dir" in line
    assert found(world, "--overwrite_output_dir") == []
    assert found(world, "--resume_from_checkpoint", "auto") == []


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_output_that_holds_a_model(world, name):
    world.out.mkdir()
    (world.out / "notes.txt").write_text("mine")
    assert found(world) == []
    (world.out / name).write_text("{}")
    for flags in ([], ["--resume_from_checkpoint", "auto"]):
        assert only(world, *flags).startswith(f"--output_dir {world.out}: holds a finished model - ")
    assert found(world, "--overwrite_output_dir") == []


def test_no_checkpoint_to_resume_from(world):
    assert only(world, "--resume_from_checkpoint", "checkpoint-3").startswith("--resume_from_checkpoint checkpoint-3: no ")
    line = only(world, "--resume_from_checkpoint", "True")
    assert line.startswith(f"--resume_from_checkpoint True: no checkpoint in {world.out} - ")
    assert found(world, "--resume_from_checkpoint", "auto") == []
    assert found(world, "--resume_from_checkpoint", "False") == []


def test_resuming_with_another_method(world):
    lora = write_checkpoint(world.out / "checkpoint-5", adapter={"r": 8})
    line = only(world, "--resume_from_checkpoint", str(lora))
    assert line.startswith(f"{lora} is LoRA r=8 alpha=16") and "this run is full-parameter - " in line
    line = only(world, "--resume_from_checkpoint", "auto", "--use_lora")
    assert "is LoRA r=8" in line and "this run is LoRA r=64" in line
    assert found(world, "--resume_from_checkpoint", "auto", "--use_lora", "--lora_r", "8") == []
    full = write_checkpoint(world.out / "checkpoint-6")
    line = only(world, "--resume_from_checkpoint", str(full), "--use_lora")
    assert line.startswith(f"{full} is full-parameter, this run is LoRA r=64")


# ---- room on the disk

PARAMETERS = 300 * 32 * 2 + 32 + 96 * 32 + 96 + 32 * 32 + 2 * 48 * 32 + 32 * 48
LORA_PARAMETERS = 64 * ((96 + 32) + (32 + 32) + 2 * (48 + 32) + (32 + 48))


def with_room(monkeypatch, free: int) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))


@pytest.mark.parametrize(
    "flags, needed",
    [
        (["--bf16"], PARAMETERS * (4 + 8) + PARAMETERS * 2),  # float32 weights and two moments; the result in bfloat16
        ([], PARAMETERS * (4 + 8) + PARAMETERS * 4),
        (["--save_strategy", "no"], PARAMETERS * 4),
        (["--save_only_model"], PARAMETERS * 4 * 2),
        (["--use_lora", "--bf16"], LORA_PARAMETERS * (4 + 8) + LORA_PARAMETERS * 4),
    ],
)
def test_too_little_room(world, monkeypatch, flags, needed):
    with_room(monkeypatch, needed)
    assert found(world, *flags) == []
    with_room(monkeypatch, needed - 1)
    assert only(world, *flags).startswith(f"--output_dir {world.out}: too little room (a checkpoint takes about ")


def test_little_room_is_warned_of(world, monkeypatch, capsys):
    checkpoint, result = PARAMETERS * 12, PARAMETERS * 4
    with_room(monkeypatch, 6 * checkpoint + result)
    assert found(world, "--save_total_limit", "5") == []
    assert "may not last" not in capsys.readouterr().err
    with_room(monkeypatch, 6 * checkpoint + result - 1)
    assert found(world, "--save_total_limit", "5") == []
    assert "with --save_total_limit 5 that may not last" in capsys.readouterr().err


# ---- help


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from finetune import args\n"
        f"try: args.parse({list(words)!r})\n"
        "finally: print('LOADED', [name for name in ('torch', 'peft') if name in sys.modules])"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def test_help_is_quick_and_ours_comes_first(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.endswith("LOADED []\n"), result.stderr
    groups = [line for line in result.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["model:", "data:", "LoRA:", "training:"]
    for name in ("--supervise", "--max_tokens_per_pass", "--long_samples", "--allow_special", "--lora_r", "--warmup_ratio"):
        assert f"  {name}" in result.stdout
    assert len(result.stdout.splitlines()) < 120 and "--adam_epsilon" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_all_shows_every_flag_once(capsys):
    with pytest.raises(SystemExit) as end:
        arguments.parse(["--help_all"])
    assert end.value.code == 0
    shown = [word for line in capsys.readouterr().out.splitlines() for word in line.split()[:2] if line.startswith("  -")]
    for field in dataclasses.fields(training_args.TrainingArguments):
        if field.init:
            assert shown.count(f"--{field.name}") == 1, field.name
