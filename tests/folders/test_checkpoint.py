"""What a run has left on disk: which base it is of, and which checkpoints a run may go on from."""

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
from finetune.folders import checkpoint, tensor_files


def test_checkpoints_of_this_launch(tmp_path):
    """Whole or not; with one of the run's agents in common, as the others may have come back as new ones."""
    (tmp_path / "checkpoint-3").mkdir()
    assert not checkpoint.of_launch(tmp_path, ["a"])
    (tmp_path / "checkpoint-3" / checkpoint.RECORD).write_text('{"launches": ["a", "b"]}')
    assert checkpoint.of_launch(tmp_path, ["b", "c"])
    assert not checkpoint.of_launch(tmp_path, ["c"]) and not checkpoint.of_launch(tmp_path, [])


def test_fingerprint_tells_models_apart(tmp_path):
    qwen_model.register()
    base, other = small_checkpoint(tmp_path / "base"), small_checkpoint(tmp_path / "other", seed=1)
    assert checkpoint.fingerprint(other) != checkpoint.fingerprint(base)
    same = tmp_path / "bf16"
    shutil.copytree(base, same)
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(torch.bfloat16)
    rounded.float().save_pretrained(same)
    stored_in_float32 = checkpoint.fingerprint(same)
    rounded.to(torch.bfloat16).save_pretrained(same)
    assert checkpoint.fingerprint(same) == stored_in_float32  # the same values in another type


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.w2.weight", "transformer.h.0.ln_1.weight", "lm_head.weight"])
def test_a_base_that_changed_behind_its_first_values_is_another(tmp_path, name):
    base = small_checkpoint(tmp_path / "base")
    before = checkpoint.fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[8:].add_(0.5)  # as further training changes it: nearly everywhere
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    now = checkpoint.fingerprint(base)
    assert now["sha256"] == before["sha256"] and not checkpoint.is_same_base(now, before)
    assert checkpoint.short_print(now, before) != checkpoint.short_print(before, now)
    older = {key: value for key, value in before.items() if key != "spread"}  # a record of before there was one
    assert checkpoint.is_same_base(now, older) and checkpoint.is_same_base(before, older)
    assert checkpoint.short_print(now, older) == checkpoint.short_print(older, now)
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "training.json").write_text(json.dumps({"base": {"fingerprint": before}}))
    with pytest.raises(UserError, match="the adapter was made for another base"):
        checkpoint.check_base(adapter, base)
    (adapter / "training.json").write_text(json.dumps({"base": {"fingerprint": older}}))
    checkpoint.check_base(adapter, base)
    (adapter / "training.json").write_text(json.dumps({"base": {"fingerprint": {"sha257": 1}}}))
    with pytest.raises(UserError, match="the fingerprint of the base in it is damaged"):
        checkpoint.check_base(adapter, base)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="no weights"):
        tensor_files.weight_files(tmp_path)


def test_checkpoints_in_order_and_complete_only(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-x"):
        (tmp_path / name).mkdir()
        for file in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
            if (name, file) != ("checkpoint-11", "optimizer.pt"):  # as --save_only_model leaves it
                (tmp_path / name / file).write_text("{}")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoint.resume_point(tmp_path, "auto").name == "checkpoint-10"
    assert checkpoint.resume_point(tmp_path, "True").name == "checkpoint-10"
    assert checkpoint.resume_point(tmp_path, None) is None
    assert checkpoint.resume_point(tmp_path / "empty", "auto") is None
    assert checkpoint.resume_point(tmp_path, str(tmp_path / "checkpoint-9")).name == "checkpoint-9"
    with pytest.raises(UserError, match="no complete checkpoint there"):
        checkpoint.resume_point(tmp_path, str(tmp_path / "checkpoint-11"))


def test_keep_newest_spares_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
            (tmp_path / f"checkpoint-{step}" / file).write_text("{}")
    checkpoint.keep_newest(tmp_path, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    checkpoint.keep_newest(tmp_path, 2, best=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
