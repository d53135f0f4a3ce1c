"""Every finding about files and folders is provoked once and read; what is right passes."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_lines import (
    CONFIG,
    POINTER,
    SHAPES,
    factors,
    found,
    only,
    read,
    write_adapter,
    write_config,
    write_safetensors,
)
from safetensors.torch import load_file
from tiny import tiny_later_qwen

from finetune.errors import UserError
from finetune.flags import args as arguments
from finetune.flags import checks
from finetune.folders import model_folder

# ---- data


def test_data_path_missing(world):
    with pytest.raises(UserError) as error:
        checks.check_flags(arguments.parse(["-m", str(world.model), "-o", str(world.out), "--model_max_length", "64"]))
    assert error.value.findings == ["--data_path: missing - give your training JSON with -d"]


def test_data_path_leads_nowhere(world):
    line = only(world, "--data_path", "path_to_data")
    assert line == "--data_path path_to_data: no such file. Give an existing one with --data_path."


def test_evaluation_data_without_evaluation(world):
    other = shutil.copy(world.data, "eval.json")
    for flags in (["--eval_data_path", other], ["--eval_split", "0.5"]):
        line = only(world, *flags, "--eval_strategy", "no")
        what = f"{flags[0]} is set but evaluation is off (--eval_strategy no)"
        assert line == f"{what} - give --eval_strategy steps or epoch, or leave out both"
    assert found(world, "--eval_data_path", other, "--evaluation_strategy", "epoch") == []
    assert found(world, "--eval_data_path", other, "--eval_on_start") == []


def test_evaluation_without_data(world):
    line = only(world, "--evaluation_strategy", "steps")
    assert line.startswith("--eval_strategy steps needs conversations to evaluate on - give --eval_data_path")


def test_evaluating_on_the_training_data_is_warned_of(world, capsys):
    assert found(world, "--eval_data_path", str(world.data), "--evaluation_strategy", "epoch") == []
    assert "warning: --eval_data_path is the training data" in capsys.readouterr().err


# ---- the model's folder


def test_no_model(world):
    with pytest.raises(UserError) as error:
        checks.check_flags(arguments.parse(["-d", str(world.data), "-o", str(world.out)]))
    assert error.value.findings[0].startswith("--model_name_or_path: missing - give a checkpoint's folder with -m")


def test_a_folder_that_is_not_there(world):
    assert only(world, "-m", "/no/such").startswith(
        "--model_name_or_path /no/such: no such folder - give a checkpoint's folder"
    )
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
    assert only(world).endswith(f"did you mean {inside.relative_to(Path.cwd())}?")


def test_an_adapter_given_as_the_model(world, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    line = only(world, "-m", str(adapter))
    assert "holds a LoRA adapter, not a model - give its base model" in line and f"--lora_weight_path {adapter}" in line


def test_a_shard_is_missing(world):
    (world.model / "model.safetensors").unlink()
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = {"metadata": {}, "weight_map": {name: shards[i % 3] for i, name in enumerate(SHAPES)}}
    (world.model / "model.safetensors.index.json").write_text(json.dumps(index))
    for i in (0, 1):
        write_safetensors(world.model / shards[i], {name: SHAPES[name] for j, name in enumerate(SHAPES) if j % 3 == i})
    line = only(world)
    assert f"missing {shards[2]} (index lists 3 shards, 2 present) - " in line
    write_safetensors(world.model / shards[2], {name: SHAPES[name] for j, name in enumerate(SHAPES) if j % 3 == 2})
    assert found(world) == []
    (world.model / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: cannot be read" in only(world)
    (world.model / "model.safetensors.index.json").write_text("{}")
    assert "is no index of shards" in only(world)


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


@pytest.mark.parametrize("since_1_6", [True, False])
def test_old_bin_weights_pass(world, since_1_6):
    """In the format of before torch 1.6, too; and they are as whole as others."""
    tensors, path = load_file(world.model / "model.safetensors"), world.model / "pytorch_model.bin"
    (world.model / "model.safetensors").unlink()
    torch.save(tensors, path, _use_new_zipfile_serialization=since_1_6)
    assert found(world) == []
    del tensors["transformer.ln_f.weight"]
    torch.save(tensors, path, _use_new_zipfile_serialization=since_1_6)
    assert only(world) == f"{world.model}: misses transformer.ln_f.weight of 11 tensors - download it again"
    path.write_bytes(path.read_bytes()[:-100])
    assert only(world) == f"{path}: damaged, or holds more than tensors - download it again"


@pytest.mark.parametrize("name", ["model.safetensors", "qwen.tiktoken", "config.json"])
def test_lfs_pointers(world, name):
    (world.model / name).write_text(POINTER)
    line = only(world)
    assert (
        line == f"{world.model / name} is a git-lfs pointer ({len(POINTER)} bytes) - run git lfs pull in {world.model}"
    )


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
        assert line.startswith(f"{folder} is GPTQ-quantized: use finetune_qlora_*.sh")
        assert line.endswith("or give the 16-bit checkpoint (Qwen-7B-Chat)")


def test_q_lora_on_plain_weights(world):
    expected = f"{world.model} is not quantized - add --quant nf4, or give a GPTQ model: a published ...-Int4, or what run_gptq.py makes of this one"
    assert only(world, "--q_lora") == only(world, "--q_lora", "--use_lora") == expected
    assert found(world, "--q_lora", "--quant", "nf4") == []
    assert read(world, "--q_lora").lora.use_lora  # it is LoRA


def test_a_misspelt_key_of_the_config_is_warned_of(world, capsys):
    config = dict(CONFIG)
    del config["use_dynamic_ntk"]
    (world.model / "config.json").write_text(json.dumps(config | {"use_dynamc_ntk": True, "made_by": "me"}))
    assert found(world) == []
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"warning: {world.model}/config.json: unknown config key use_dynamc_ntk; did you mean use_dynamic_ntk?"
    ]
    write_config(world.model, use_dynamc_ntk=True)  # beside the right one: nothing is lost
    assert found(world) == [] and capsys.readouterr().err == ""


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
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "vocab_size": 300, "max_position_embeddings": 64})
    )
    layers = {f"model.layers.0.self_attn.{name}_proj.weight": [32, 32] for name in "qkvo"}
    write_safetensors(folder / "model.safetensors", {"model.embed_tokens.weight": [300, 32], **layers})
    return folder


def test_a_later_qwen_is_welcome(world, tmp_path):
    folder = tiny_later_qwen(tmp_path / "Qwen2")
    assert found(world, "-m", str(folder)) == []
    line = only(world, "-m", str(folder), "--use_lora", "--train_embeddings", "none", "--lora_target_modules", "w1")
    assert "w1: no such layer - this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in line


def test_other_models_are_refused_by_type(world, tmp_path):
    folder = later_qwen(tmp_path / "other")
    for name in ("llama", "qwen2_moe"):
        (folder / "config.json").write_text(json.dumps({"model_type": name, "vocab_size": 300}))
        line = only(world, "-m", str(folder), "--use_lora")
        assert f"{folder}: is of model type {name}, and trained are qwen, qwen2, qwen3 - give " in line


def test_an_unknown_reporter(world):
    assert only(world, "--report_to", "tensorboart").startswith("--report_to tensorboart: unknown or not installed - ")
    assert found(world, "--report_to", "tensorboard") == []


# ---- the method


def test_unknown_layers(world):
    line = only(world, "--use_lora", "--lora_target_modules", "c_attn", "w3", "q_proj")
    what, remedy = line.split(" - ")
    assert what == "--lora_target_modules w3 q_proj: no such layer"
    assert remedy == "this model has c_attn, c_proj, w1, w2; separate them by blanks"
    assert found(world, "--use_lora", "--lora_target_modules", "attn.c_proj", "w2") == []
    for name in ("mlp.c_attn", "attn.w1", "self_attn.c_proj", "h.7.attn.c_attn", "_attn", ""):  # the others in the list would hide it
        assert f"--lora_target_modules {name}: no such layer" in only(world, "--use_lora", "--lora_target_modules", "c_attn", name)
    assert found(world, "--use_lora", "--lora_target_modules", "h.0.attn.c_attn", "mlp.c_proj") == []


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


def test_an_adapter_that_means_no_layer_of_the_model(world, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", target_modules=r".*\.zzz")
    line = only(world, "--use_lora", "--lora_weight_path", str(adapter))
    assert f"{adapter}/adapter_config.json: cannot be put onto {world.model} (Target modules" in line
    assert "it has c_attn, c_proj, w1, w2) - give the base that it was trained on" in line


def test_an_adapter_that_lacks_what_it_lists(world, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", modules_to_save=["wte", "lm_head"])
    line = only(world, "--use_lora", "--lora_weight_path", str(adapter))
    assert line.startswith(
        f"--lora_weight_path {adapter}: adapter misses wte, lm_head, which adapter_config.json lists"
    )
    assert "give a checkpoint-N of that run" in line


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "pissa_niter_16"])
def test_how_adapters_may_begin(world, init, capsys):
    assert found(world, "--use_lora", "--init_lora_weights", init, "--lora_dropout", "0") == []
    assert "warning: --lora_dropout" not in capsys.readouterr().err


@pytest.mark.parametrize("init", ["pisa", "pissa_niter_", "pissa_niter_0", "True", "olora", ""])
def test_how_adapters_may_not_begin(world, init):
    line = only(world, "--use_lora", "--init_lora_weights", init)
    assert line.startswith(f"--init_lora_weights {init}: unknown - give default, gaussian, pissa, or pissa_niter_N")


def test_pissa_with_dropout_is_warned_of(world, capsys):
    assert found(world, "--use_lora", "--init_lora_weights", "pissa") == []
    assert "warning: --lora_dropout 0.05 with --init_lora_weights pissa: what is dropped" in capsys.readouterr().err


@pytest.fixture
def compiler(monkeypatch):
    """torchao's optimizers compile their step: CC says with what, also on a machine without it."""
    monkeypatch.setenv("CC", "cc")


def test_lora_plus(world):
    assert found(world, "--use_lora", "--loraplus_lr_ratio", "16") == []
    for ratio in ("0.5", "-1", "inf", "nan"):
        assert only(world, "--use_lora", "--loraplus_lr_ratio", ratio).startswith(
            f"--loraplus_lr_ratio {float(ratio)}: "
        )


def test_weights_in_bf16(world, compiler):
    right = ["--bf16_weights", "--bf16", "--optim", "adamw_torch_8bit"]
    assert found(world, *right) == []
    assert found(world, *right[:3], "adamw_torch_4bit") == []
    assert only(world, "--bf16_weights", "--optim", "adamw_torch_8bit") == "--bf16_weights needs --bf16 - add it"
    line = only(world, "--bf16_weights", "--bf16")
    assert line.startswith("--bf16_weights with --optim adamw_torch_fused: small updates would be lost - give --optim ")
    assert only(world, *right, "--use_lora").startswith("--bf16_weights is for full-parameter training - leave it out")


def test_weights_in_bf16_where_they_cannot_be(world, monkeypatch):
    right = ["--bf16_weights", "--bf16", "--optim", "adamw_torch_8bit"]
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("finetune.model.optimizers.shutil.which", lambda name: None)
    assert "there is no C compiler - install gcc" in only(world, *right)
    monkeypatch.setattr("finetune.model.optimizers.importlib.util.find_spec", lambda name: None)
    assert "the package is missing - pip install torchao" in only(world, *right)


def test_optimizers_of_packages_that_are_not_here(world, monkeypatch):
    """With --bf16_weights or without."""
    gone, here = ("torchao", "bitsandbytes"), importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in gone else here(name))
    line = only(world, "--optim", "adamw_torch_8bit")
    assert line == "--optim adamw_torch_8bit: the package is missing - pip install torchao"
    for optim in ("adamw_8bit", "paged_adamw_32bit", "adamw_bnb_8bit", "paged_lion_8bit", "lion_32bit"):
        line = only(world, "--optim", optim)
        assert line.endswith(": is of bitsandbytes, and the package is missing - pip install bitsandbytes")
    assert found(world, "--optim", "adafactor") == []


def test_weights_in_bf16_on_several_processes(world, monkeypatch, compiler):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = only(world, "--bf16_weights", "--bf16", "--optim", "adamw_torch_8bit")
    assert "would drift apart - train in one process" in line


def test_layers_are_not_guessed():
    assert model_folder.block_layers(None) == model_folder.block_layers("llama") == []
    assert "down_proj" in model_folder.block_layers("qwen3") and "w1" in model_folder.block_layers("qwen")


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "fp8"])
@pytest.mark.parametrize("flags", [[], ["--use_lora"], ["--q_lora"]])
def test_weights_quantized_in_another_way(world, method, flags):
    write_config(world.model, quantization_config={"quant_method": method, "bits": 4})
    assert f"is quantized ({method}) - give another checkpoint" in only(world, *flags)


# ---- an adapter to go on from


def test_the_adapter_says_what_trains_in_it(world, monkeypatch):
    """Not the kind of the base: that would be refused here, as rows of a tied embedding under FSDP2."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_config(world.model, tie_word_embeddings=True)
    (world.model / "generation_config.json").write_text(json.dumps({"chat_format": "raw"}))
    plain = write_adapter(world.out / "plain")
    flags = ["--use_lora", "--fsdp", "True", "--lora_weight_path"]
    assert not any("cannot shard a matrix" in line for line in found(world, *flags, str(plain)))
    rows = write_adapter(world.out / "rows", trainable_token_indices={"wte": [1]})
    assert any("cannot shard a matrix" in line for line in found(world, *flags, str(rows)))


@pytest.mark.parametrize("own,why", [({"use_dora": True}, "DoRA needs"), ({"bias": "all"}, "the biases of GPTQ")])
def test_an_adapter_that_does_not_go_with_the_weights(world, tmp_path, own, why):
    write_config(world.model, quantization_config={"quant_method": "gptq", "bits": 4})
    adapter = write_adapter(tmp_path / "adapter", **own)
    lines = found(world, "--q_lora", "--lora_weight_path", str(adapter))
    assert any(f"(so {adapter} has it): {why}" in line for line in lines), lines


@pytest.mark.parametrize(
    "flags,ignored",
    [
        ("--lora_r 8 --lora_alpha 16", "--lora_r 8"),
        ("--use_dora --use_rslora", "--use_dora, --use_rslora"),
        ("--train_embeddings all", "--train_embeddings all"),
        ("--lora_bias all --lora_dropout 0.05", "--lora_bias all"),
        ("--train_tokens <|extra_0|>", "--train_tokens <|extra_0|>"),
        ("--lora_target_modules w1 w2", "--lora_target_modules w1 w2"),
        ("--init_lora_weights pissa", "--init_lora_weights pissa"),
    ],
)
def test_flags_that_the_adapter_contradicts(world, tmp_path, flags, ignored):
    adapter = write_adapter(tmp_path / "adapter", lora_dropout=0.05)
    line = only(world, "--use_lora", "--lora_weight_path", str(adapter), *flags.split())
    assert f", and not {ignored} - leave these out" in line


def test_flags_that_the_adapter_agrees_with(world, tmp_path):
    own = {"r": 8, "use_dora": True, "trainable_token_indices": {"wte": [1], "lm_head": [1]}}
    adapter = write_adapter(tmp_path / "adapter", **own)
    names = [f"base_model.model.{name[:-7]}" for name in SHAPES if name.count(".") == 5 and name.endswith(".weight")]
    rows = [f"base_model.model.{name}.token_adapter.trainable_tokens_delta" for name in ("transformer.wte", "lm_head")]
    more = {name: [1] for name in [*(f"{name}.lora_magnitude_vector" for name in names), *rows]}
    write_safetensors(adapter / "adapter_model.safetensors", factors(8) | more)
    flags = ["--lora_r", "8", "--use_dora", "--lora_target_modules", "c_attn", "c_proj", "w1", "w2"]
    for more in ("--train_embeddings chat_rows", "--train_embeddings none --train_tokens <|extra_0|>", ""):
        assert found(world, "--use_lora", "--lora_weight_path", str(adapter), *flags, *more.split()) == []


def test_the_wrong_base_is_called_that(world, tmp_path):
    """And not a broken adapter, though it has no tensors for some of this base's layers."""
    adapter = write_adapter(tmp_path / "adapter")
    sizes = {"model_type": "qwen", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "sha256": "0" * 64}
    (adapter / "training.json").write_text(json.dumps({"base": {"fingerprint": sizes}}))
    write_safetensors(adapter / "adapter_model.safetensors", {})
    line = only(world, "--use_lora", "--lora_weight_path", str(adapter))
    assert "the adapter was made for another base" in line and line.endswith("give that one with -m")
    (world.model / "model.safetensors").write_bytes(b"cut")  # then the model is what is wrong
    assert "not a whole safetensors file" in only(world, "--use_lora", "--lora_weight_path", str(adapter))
