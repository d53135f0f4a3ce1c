"""Which model a folder holds, and that an adapter takes no other base than its own."""

import json
import shutil

import pytest
import torch
from command_lines import write_adapter
from safetensors.torch import load_file, save_file
from tiny import small_checkpoint
from transformers import AutoModelForCausalLM

import qwen_model
from finetune.errors import UserError
from finetune.folders import adapter_base, fingerprints


def test_fingerprint_tells_models_apart(tmp_path):
    qwen_model.register()
    base, other = small_checkpoint(tmp_path / "base"), small_checkpoint(tmp_path / "other", seed=1)
    assert fingerprints.of_model(other) != fingerprints.of_model(base)
    same = tmp_path / "bf16"
    shutil.copytree(base, same)
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(torch.bfloat16)
    rounded.float().save_pretrained(same)
    stored_in_float32 = fingerprints.of_model(same)
    rounded.to(torch.bfloat16).save_pretrained(same)
    assert fingerprints.of_model(same) == stored_in_float32  # the same values in another type


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.w2.weight", "transformer.h.0.ln_1.weight", "lm_head.weight"])
def test_a_base_that_changed_behind_its_first_values_is_another(tmp_path, name):
    base = small_checkpoint(tmp_path / "base")
    before = fingerprints.of_model(base)
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[8:].add_(0.5)  # as further training changes it: nearly everywhere
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    now = fingerprints.of_model(base)
    assert now["sha256"] == before["sha256"] and not fingerprints.is_same(now, before)
    assert fingerprints.short(now, before) != fingerprints.short(before, now)
    older = {key: value for key, value in before.items() if key != "spread"}  # a record of before there was one
    assert fingerprints.is_same(now, older) and fingerprints.is_same(before, older)
    assert fingerprints.short(now, older) == fingerprints.short(older, now)
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "training.json").write_text(json.dumps({"base": {"fingerprint": before}}))
    with pytest.raises(UserError, match="the adapter was made for another base"):
        adapter_base.check(adapter, base)
    (adapter / "training.json").write_text(json.dumps({"base": {"fingerprint": older}}))
    adapter_base.check(adapter, base)
    (adapter / "training.json").write_text(json.dumps({"base": {"fingerprint": {"sha257": 1}}}))
    with pytest.raises(UserError, match="the fingerprint of the base in it is damaged"):
        adapter_base.check(adapter, base)
