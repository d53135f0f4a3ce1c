"""Flags are read as published; what cannot be read, or cannot be, is said in one line."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_lines import found, only

from finetune.flags import args as arguments
from finetune.flags import definitions, training_args

ROOT = Path(__file__).parent.parent.parent


# ---- reading flags


def test_a_good_command_line_passes_and_writes_nothing(world):
    before = sorted(path.name for path in world.data.parent.iterdir())
    assert found(world) == []
    assert found(world, "--use_lora") == []
    assert sorted(path.name for path in world.data.parent.iterdir()) == before


def test_defaults():
    args = arguments.parse([])
    assert (args.training.model_max_length, args.training.optim, args.training.report_to) == (
        8192,
        "adamw_torch_fused",
        [],
    )
    assert (args.data.supervise, args.data.long_samples, args.data.max_tokens_per_pass) == ("assistant", "cut", "auto")
    assert (args.lora.lora_r, args.lora.lora_alpha, args.lora.lora_dropout) == (64, 16, 0.05)
    assert (args.lora.lora_target_modules, args.lora.train_embeddings) == (["auto"], "auto")
    assert (args.lora.use_lora, args.lora.lora_bias, args.training.logging_steps) == (False, "none", 1)
    assert args.training.remove_unused_columns is False and not args.training.bf16 and not args.training.fp16


@pytest.mark.parametrize("spelling", [["--bf16"], ["--bf16", "True"], ["--bf16=true"], ["--bf16", "1"]])
def test_switches_with_and_without_a_value(spelling):
    args = arguments.parse([*spelling, "--use_lora", "--gradient_checkpointing", "False"])
    assert args.training.bf16 is True and args.lora.use_lora is True and args.training.gradient_checkpointing is False


def test_flags_with_dashes_and_short_ones():
    args = arguments.parse(
        ["-m", "M", "-d", "D", "-o", "O", "--lora-target-modules", "w1", "w2", "--num-train-epochs", "2"]
    )
    assert (args.model.model_name_or_path, args.data.data_path, args.training.output_dir) == ("M", ["D"], "O")
    assert (args.lora.lora_target_modules, args.training.num_train_epochs) == (["w1", "w2"], 2)


def test_the_last_of_a_repeated_flag_wins():
    assert arguments.parse(["--lora_r", "8", "--lora_r", "32"]).lora.lora_r == 32


def test_resume_takes_a_folder_true_or_nothing():
    wishes = [
        ["--resume_from_checkpoint"],
        ["--resume_from_checkpoint", "True"],
        ["--resume_from_checkpoint", "a/checkpoint-3"],
    ]
    assert [arguments.parse(wish).training.resume_from_checkpoint for wish in wishes] == [
        "auto",
        "True",
        "a/checkpoint-3",
    ]


def test_several_places_to_report_to():
    assert arguments.parse(["--report_to", "tensorboard", "wandb"]).training.report_to == ["tensorboard", "wandb"]


COMMON = """
    --model_name_or_path {model} --data_path {data} --output_dir {out} --num_train_epochs 5
    --per_device_eval_batch_size 1 --evaluation_strategy no --save_strategy steps --save_steps 1000
    --save_total_limit 10 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine
    --logging_steps 1 --report_to none --model_max_length 512 --lazy_preprocess True --gradient_checkpointing
"""
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
    line = (
        COMMON.format(model=model, data=world.data, out=world.out).split()
        + f"{precision} {more} --learning_rate {rate}".split()
    )
    line += f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulation}".split()
    line += ["--deepspeed", f"finetune/ds_config_{engine}.json"] if engine else []
    args = arguments.parse(line)
    t = args.training
    assert (t.learning_rate, t.per_device_train_batch_size, t.gradient_accumulation_steps) == (
        float(rate),
        batch,
        accumulation,
    )
    assert (t.num_train_epochs, t.per_device_eval_batch_size, t.eval_strategy, t.save_strategy) == (5, 1, "no", "steps")
    assert (t.save_steps, t.save_total_limit, t.weight_decay, t.adam_beta2) == (1000, 10, 0.1, 0.95)
    assert (t.warmup_ratio, t.lr_scheduler_type, t.logging_steps, t.model_max_length) == (0.01, "cosine", 1, 512)
    assert (t.bf16, t.fp16, t.gradient_checkpointing) == ("bf16" in precision, "fp16" in precision, True)
    assert (args.lora.use_lora, args.lora.q_lora) == ("--use_lora" in more, "--q_lora" in more)
    findings = found(world, *line)
    assert len(findings) == ("--q_lora" in more) and all("is not quantized - add --quant nf4" in line for line in findings)


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


@pytest.mark.parametrize("words, wish, told", [
    ([], "auto", True), (["auto"], "auto", True), (["--gradient_checkpointing"], True, True), (["False"], False, False),
    (["true"], True, True), (["0"], False, False),
])  # fmt: skip
def test_gradient_checkpointing_is_auto_unless_said_otherwise(words, wish, told):
    given = ["--gradient_checkpointing", *words] if words and words[0][0] != "-" else words
    training = arguments.parse(given).training
    assert (training.recompute, training.gradient_checkpointing, training.recomputed_blocks) == (wish, told, None)
    training.recompute_blocks(5)
    assert (training.gradient_checkpointing, training.recomputed_blocks) == (True, 5)
    training.recompute_blocks(0)
    assert training.gradient_checkpointing is False and not getattr(training, "activation_checkpointing", False)


def test_what_is_neither_a_number_nor_auto():
    assert arguments.parse(["--max_tokens_per_pass", "700"]).data.max_tokens_per_pass == 700
    parsed = arguments.parse(["--max_tokens_per_pass", "many", "--gradient_checkpointing", "maybe"])
    assert sorted(parsed.findings) == [
        "--gradient_checkpointing maybe: unknown - give auto, True or False",
        "--max_tokens_per_pass many: is no number of tokens - give one, or auto",
    ]


def test_gradient_checkpointing_brings_no_warning(recwarn):
    training = arguments.parse(
        ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}']
    ).training
    assert training.gradient_checkpointing is True and training.gradient_checkpointing_kwargs == {
        "use_reentrant": False
    }
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
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert arguments.parse([]).training.n_gpu == 1
    assert "4 GPUs are visible" in capsys.readouterr().err


# ---- flags of older transformers

REMOVED = """
    overwrite_output_dir evaluation_strategy per_gpu_train_batch_size per_gpu_eval_batch_size warmup_ratio
    logging_dir save_safetensors no_cuda use_mps_device jit_mode_eval use_ipex fp16_opt_level
    half_precision_backend tpu_num_cores tpu_metrics_debug past_index sharded_ddp fsdp_min_num_params
    fsdp_transformer_layer_cls_to_wrap adafactor group_by_length use_legacy_prediction_loop
    include_inputs_for_metrics fp16_backend push_to_hub_model_id push_to_hub_organization push_to_hub_token
    mp_parameters torchdynamo ray_scope dispatch_batches include_tokens_per_second
""".split()


@pytest.mark.parametrize("name", REMOVED)
def test_every_flag_that_transformers_dropped_since_4_32_is_answered(name, capsys):
    values = {
        "evaluation_strategy": "no",
        "warmup_ratio": "0.1",
        "per_gpu_train_batch_size": "1",
        "per_gpu_eval_batch_size": "1",
    }
    args = arguments.parse([f"--{name}", values.get(name, "True")])
    assert not any("unknown" in line or "belongs to no flag" in line for line in args.findings), args.findings
    fields = {f.name for f in dataclasses.fields(training_args.TrainingArguments)}
    old = arguments.OLD_FLAGS.get(name)
    assert name in fields or old.new in fields or f"--{name}" in "".join(args.findings) + capsys.readouterr().err


def test_old_names_set_the_new_fields():
    line = "--evaluation_strategy epoch --per_gpu_train_batch_size=3 --per-gpu-eval-batch-size 4 --no_cuda"
    training = arguments.parse([*line.split(), "--push_to_hub_model_id", "a/b"]).training
    assert (training.eval_strategy, training.per_device_train_batch_size, training.per_device_eval_batch_size) == (
        "epoch",
        3,
        4,
    )
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
    assert (
        "no effect in this trainer (packed samples, evaluated by their loss): --torch_empty_cache_steps"
        in capsys.readouterr().err
    )


def test_compiling_is_said_to_take_its_time(capsys):
    arguments.parse(["--num_train_epochs", "2"])
    assert "--torch_compile" not in capsys.readouterr().err
    arguments.parse(["--torch_compile", "True"])
    assert "note: --torch_compile: steps differ in length" in capsys.readouterr().err


def test_lazy_preprocess_is_accepted(world, capsys):
    assert found(world, "--lazy_preprocess", "True") == []
    assert "--lazy_preprocess has no effect" in capsys.readouterr().err


# ---- flags that cannot be


def test_a_misspelt_flag(world):
    assert only(world, "--learing_rate", "1e-4") == "--learing_rate: unknown flag - did you mean --learning_rate?"
    assert (
        only(world, "--evaluation-strateg=no")
        == "--evaluation-strateg: unknown flag - did you mean --eval_strategy?"
    )
    assert only(world, "--zzz") == "--zzz: unknown flag - python finetune.py --help_all lists all flags"


def test_the_beginning_of_a_flag_is_not_the_flag(world):
    assert only(world, "--num_train_epoch", "3") == "--num_train_epoch: unknown flag - did you mean --num_train_epochs?"


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
        "--lora_r 0 --use_lora", "--lora_alpha 0 --use_lora", "--lora_dropout 1 --use_lora", "--model_max_length 15",
        "--seed -1", "--max_tokens_per_pass 0", "--per_device_train_batch_size 0", "--per_device_eval_batch_size 0",
        "--max_grad_norm -1", "--gradient_accumulation_steps 0", "--learning_rate -0.1", "--learning_rate nan",
        "--weight_decay -0.1", "--adam_beta2 1", "--warmup_ratio 1.5", "--save_total_limit 0", "--save_steps 0",
        "--num_train_epochs 0", "--adam_beta1 -0.1", "--logging_steps -1",
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
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_80"])
    assert only(world, "--bf16") == "--bf16: this GPU (sm_70) has no bf16 - use --fp16"
    assert training_args.of_gpu({"bf16": True, "fp16": False, "use_cpu": True}) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert training_args.of_gpu({"bf16": True, "fp16": False, "use_cpu": False}) == []


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def test_a_gpu_that_this_torch_has_no_code_for(world, monkeypatch):
    """A V100, and the torch that pip installs today: torch itself fails in the first kernel, after the weights were loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13[:-1])
    monkeypatch.setattr(torch.version, "hip", None)
    line = only(world, "--fp16")
    assert "has no code for this GPU (sm_70), only for sm_75, sm_80, " in line and " - install one built for CUDA 12.6, " in line
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (13, 0))
    assert " - install a newer one (" in only(world, "--fp16")


@pytest.mark.parametrize(
    "capability, built, runs",
    [
        ((7, 0), CUDA_13, False), ((7, 5), CUDA_13, True), ((8, 9), CUDA_13, True), ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True), ((12, 1), CUDA_13, True), ((13, 0), CUDA_13, True), ((13, 0), CUDA_13[:-1], False),
        ((10, 3), ["sm_100"], True), ((9, 0), ["sm_80"], False), ((9, 0), ["sm_80", "compute_80"], True), ((7, 0), [], True),
    ],
)  # fmt: skip
def test_which_builds_run_on_a_gpu(capability, built, runs):
    assert training_args.runs_on(capability, built) == runs


@pytest.mark.parametrize(
    "flags",
    [
        "--label_smoothing_factor 0.1", "--neftune_noise_alpha 5.5", "--use_liger_kernel True",
        "--auto_find_batch_size True",
    ],
)  # fmt: skip
def test_what_would_be_passed_over_in_silence_is_refused(world, flags):
    line = only(world, *flags.split())
    assert line.startswith(f"{flags}: ") and " - " in line


def test_a_refusal_of_transformers_is_one_line(world):
    line = only(world, "--accelerator_config", '{"split_batchs": true}')
    assert "split_batchs" in line and line.endswith(" - change or leave out the flag")
    assert "load_best_model_at_end" in only(world, "--load_best_model_at_end")


def test_all_findings_come_together(world):
    world.data.unlink()
    (world.model / "model.safetensors").unlink()
    lines = found(
        world, "--bf16", "--fp16", "--lerning_rate", "1", "--lora_r", "0", "--use_lora", "--eval_data_path", "none.json"
    )
    starts = [
        "--lerning_rate: ", "--bf16 and --fp16: ", "--lora_r 0: ",
        f"--data_path {world.data}: no such file", "--eval_data_path none.json: ",
        f"{world.model}: no weights",
    ]  # fmt: skip
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * len(starts), lines


# ---- help


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from finetune.flags import args\n"
        f"try: args.parse({list(words)!r})\n"
        "finally: print('LOADED', [name for name in ('torch', 'peft') if name in sys.modules])"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def test_help_is_quick_and_ours_comes_first(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.endswith("LOADED []\n"), result.stderr
    groups = [line for line in result.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["model:", "data:", "LoRA:", "a look before the run:", "training:"]
    for name in (
        "--supervise",
        "--max_tokens_per_pass",
        "--long_samples",
        "--allow_special",
        "--lora_r",
        "--warmup_ratio",
    ):
        assert f"  {name}" in result.stdout
    assert len(result.stdout.splitlines()) < 160 and "--adam_epsilon" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_all_shows_every_flag_once(capsys):
    with pytest.raises(SystemExit) as end:
        arguments.parse(["--help_all"])
    assert end.value.code == 0
    shown = [
        word for line in capsys.readouterr().out.splitlines() for word in line.split()[:2] if line.startswith("  -")
    ]
    for field in dataclasses.fields(training_args.TrainingArguments):
        if field.init:
            assert shown.count(f"--{field.name}") == 1, field.name


def test_a_token_is_not_compared_between_machines():
    assert "secret" not in definitions.shared_flags(arguments.parse(["--hub_token", "secret"])).values()


@pytest.mark.parametrize("error", [KeyError, TypeError, OSError, RuntimeError])
def test_a_fault_of_ours_is_no_flag_s(monkeypatch, error):
    """What transformers refuses is a finding; what our own code stumbles over, or calls in a wrong way, comes through."""

    def fails(self):
        raise error("x")

    values = vars(arguments.parse([]).training)
    usual = {field.name: values[field.name] for field in dataclasses.fields(training_args.TrainingArguments) if field.init}
    fails.__code__ = fails.__code__.replace(co_filename=str(ROOT / "finetune/flags/training_args.py"))
    monkeypatch.setattr(training_args.TrainingArguments, "resolve_checkpointing", fails)
    with pytest.raises(error):
        training_args.build(usual)
    monkeypatch.undo()

    def refuses(self):
        raise error("x")

    refuses.__code__ = refuses.__code__.replace(co_filename=training_args.transformers.__file__)
    monkeypatch.setattr(training_args.transformers.TrainingArguments, "__post_init__", refuses)
    assert training_args.build(usual)[1][0].endswith(" - change or leave out the flag")
