"""Values of a folder's files that are endless, or full of characters that a terminal would obey: shortened where they are printed."""

import json

import pytest
from command_lines import CONFIG, found, write_adapter, write_checkpoint

HOSTILE = "\x1b[2J\x07 end\nerror: " + "x" * 5000
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["c_attn"], "bias": "none", "base_model_name_or_path": "gone",
           "modules_to_save": None, "use_dora": False, "init_lora_weights": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}  # fmt: skip
LIMIT = 700  # characters of a line about one value


def check(world, capfd, *flags: str) -> None:
    """All lines are short, and what is printed holds no control character."""
    lines = found(world, *flags)
    printed = capfd.readouterr().err.splitlines()
    for line in [*lines, *printed]:
        assert len(line) < LIMIT, line[:1000]
    assert all(line.isprintable() for line in printed), printed


@pytest.mark.parametrize("key", [*CONFIG, "quantization_config", "tie_word_embeddings", HOSTILE])
def test_config(world, capfd, key):
    for value in (HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE]):
        (world.model / "config.json").write_text(json.dumps(CONFIG | {key: value}))
        check(world, capfd, "--use_lora")


@pytest.mark.parametrize("value", [HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE] * 20], ids=["text", "object", "list"])
@pytest.mark.parametrize("key", ADAPTER)
def test_adapter(world, capfd, tmp_path, key, value):
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER | {key: value}))
    check(world, capfd, "--use_lora", "--lora_weight_path", str(adapter))


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "quantize_config.json", "model.safetensors.index.json"])
def test_other_settings(world, capfd, name):
    for content in ({key: HOSTILE for key in ("chat_format", "chat_template", "bits", "weight_map", HOSTILE)}, [HOSTILE], HOSTILE,
                    {"weight_map": {HOSTILE: HOSTILE}}):  # fmt: skip
        (world.model / name).write_text(json.dumps(content))
        check(world, capfd, "--use_lora")


@pytest.mark.parametrize("key", ["r", "target_modules", "bias", "lora_alpha"])
def test_a_checkpoint(world, capfd, key):
    write_checkpoint(world.out / "checkpoint-2", {key: HOSTILE})
    check(world, capfd, "--use_lora", "--resume_from_checkpoint", "auto")
