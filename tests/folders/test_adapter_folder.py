"""An adapter folder that lacks a tensor that its config lists is found out before weights are loaded."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_qwen2

from finetune.errors import UserError
from finetune.folders import adapter_base, adapter_folder

QWEN = ["c_attn", "c_proj", "w1", "w2"]
CONFIGS = {
    "lora": {"target_modules": QWEN},
    "rows": {"target_modules": QWEN, "trainable_token_indices": {"wte": [1, 2], "lm_head": [1, 2]}},
    "all": {"target_modules": QWEN, "modules_to_save": ["wte", "lm_head"]},
    "bias all": {"target_modules": ["w1"], "bias": "all"},
    "bias lora_only": {"target_modules": ["c_attn", "w1"], "bias": "lora_only"},
    "lora_only without biases": {"target_modules": ["w1"], "bias": "lora_only"},
    "dora": {"target_modules": ["attn.c_proj", "w1"], "use_dora": True},
    "some blocks": {"target_modules": QWEN, "layers_to_transform": [1], "layers_pattern": "h"},
    "of the embedding": {"target_modules": ["wte", "w1"]},
    "a pattern": {"target_modules": r".*\.mlp\.w1"},
}


def saved(make, folder, config):
    """(folder of an adapter, folder of its base)"""
    base = make()
    base.save_pretrained(folder / "base")
    get_peft_model(base, LoraConfig(**config)).save_pretrained(folder / "out")
    return folder / "out", folder / "base"


def without(folder, *parts):
    """Takes the tensors out of the file whose names contain any of `parts`; returns how many."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}
    save_file(kept, file)
    return len(tensors) - len(kept)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_writes_is_whole(name, tmp_path):
    adapter, base = saved(tiny_model, tmp_path, CONFIGS[name])
    assert adapter_folder.missing_tensors(adapter) == adapter_folder.missing_tensors(adapter, base) == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_what_peft_writes_of_a_later_model_is_whole(tied, rows, tmp_path):
    names = ["embed_tokens", "lm_head"]
    config = {"trainable_token_indices": dict.fromkeys(names, [1])} if rows else {"modules_to_save": names[: 2 - tied]}
    config |= {"target_modules": ["q_proj"], "ensure_weight_tying": tied and not rows}
    adapter, base = saved(lambda: tiny_qwen2(tied), tmp_path, config)
    assert adapter_folder.missing_tensors(adapter, base) == []
    assert without(adapter, "embed_tokens", *["lm_head"] * tied)
    lacking = ["rows of the embedding" if tied else "rows of embed_tokens"] if rows else ["embed_tokens"]
    assert adapter_folder.missing_tensors(adapter, base) == lacking


@pytest.mark.parametrize(
    "name,part,lacking",
    [
        ("all", "wte", ["wte"]),
        ("rows", "lm_head", ["rows of lm_head"]),
        ("lora", "h.0.mlp.w1.lora_B", ["transformer.h.0.mlp.w1.lora_B"]),
        ("lora", "mlp.w2", ["w2.lora_A"]),
        ("of the embedding", "wte.lora_embedding_B", ["transformer.wte.lora_embedding_B"]),
        ("of the embedding", "wte.lora_embedding", ["wte.lora_embedding_A"]),
        ("dora", "h.1.attn.c_proj.lora_magnitude", ["transformer.h.1.attn.c_proj.lora_magnitude_vector"]),
    ],
)
def test_what_is_missing_is_named(name, part, lacking, tmp_path):
    adapter, _ = saved(tiny_model, tmp_path, CONFIGS[name])
    assert without(adapter, part)
    assert adapter_folder.missing_tensors(adapter) == lacking


@pytest.mark.parametrize(
    "name,part,lacking",
    [
        ("lora", "h.1.mlp.w1.", ["transformer.h.1.mlp.w1.lora_A"]),
        ("bias all", "h.0.attn.c_attn.bias", ["transformer.h.0.attn.c_attn.bias"]),
        ("bias lora_only", "h.1.attn.c_attn.base_layer.bias", ["transformer.h.1.attn.c_attn.bias"]),
    ],
)
def test_beside_the_base_more_is_known(name, part, lacking, tmp_path):
    adapter, base = saved(tiny_model, tmp_path, CONFIGS[name])
    assert without(adapter, part)
    assert adapter_folder.missing_tensors(adapter) == []
    assert adapter_folder.missing_tensors(adapter, base) == lacking


def test_bin_files_are_read_too(tmp_path):
    adapter, base = saved(tiny_model, tmp_path, CONFIGS["all"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    assert adapter_folder.missing_tensors(adapter, base) == []
    torch.save({name: t for name, t in tensors.items() if "lm_head" not in name}, adapter / "adapter_model.bin")
    assert adapter_folder.missing_tensors(adapter, base) == ["lm_head"]


def test_the_message(tmp_path):
    """As the published trainer's last save leaves it; through the way that ask and merge take."""
    adapter, base = saved(tiny_model, tmp_path, CONFIGS["all"])
    without(adapter, "wte", "lm_head")
    with pytest.raises(UserError) as error:
        adapter_base.find(adapter, str(base))
    (line,) = error.value.findings
    assert line.startswith(f"{adapter}: adapter misses wte, lm_head, which adapter_config.json lists")
    assert "(the published finetune.py's last save leaves embeddings out) - give a checkpoint-N of that run" in line
    without(adapter, ".h.0.")
    with pytest.raises(
        UserError, match=r"misses wte, lm_head, transformer.h.0.attn.c_attn.lora_A, .* and 3 more, which"
    ):
        adapter_folder.check_adapter(adapter, base)
    with pytest.raises(UserError) as error:
        adapter_folder.check_adapter(adapter, base)
    (line,) = error.value.findings
    assert "published" not in line
    assert line.endswith(" - give its own base, or a checkpoint-N of that run, or train again")
