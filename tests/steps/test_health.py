"""Numbers that are none stop a run before anything of them is saved; what is odd without being wrong is said."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from trainers import Samples, make_trainer

from finetune.steps import health

CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1}


def trainer_of(folder, at: int | None = None, value: float = math.nan, **settings):
    """A trainer whose gradient holds `value` in step `at`."""
    trainer = make_trainer(folder, **({"lr_scheduler_type": "constant"} | settings))
    if at is not None:
        usual = trainer.training_step

        def step(model, inputs, num_items_in_batch=None):
            loss = usual(model, inputs, num_items_in_batch)
            if trainer.state.global_step + 1 == at:
                next(model.parameters()).grad.view(-1)[0] = value
            return loss

        trainer.training_step = step
    return trainer


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_a_gradient_that_is_no_number_stops_before_the_step(tmp_path, value, clipping):
    trainer = trainer_of(tmp_path, 3, value, max_grad_norm=clipping, save_total_limit=1, logging_steps=100, **CHECKPOINTS)
    with pytest.raises(FloatingPointError) as told:
        trainer.train()
    line = str(told.value)
    assert line.startswith(f"step 3: the norm of its gradient is {'nan' if math.isnan(value) else 'inf'} (its loss: ")
    assert str(tmp_path / "checkpoint-2") in line and "lower --learning_rate" in line and "\n" not in line
    members = sorted(i + 1 for one in trainer.plan.step(0, 2).passes[0] for i in one)
    assert f"samples: talks.json {', '.join(map(str, members))} - " in line
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    # the newest counts as good only when a step behind it went well: the one before it is still there
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_the_first_step_blames_no_learning_rate(tmp_path):
    with pytest.raises(FloatingPointError, match="step 1: .*there is no checkpoint before it.*look at these samples"):
        trainer_of(tmp_path, 1).train()


def test_a_learning_rate_without_measure(tmp_path):
    """The weights of step 1 are finite, and huge; step 2 finds it."""
    trainer = trainer_of(tmp_path, learning_rate=1e30, save_total_limit=1, **CHECKPOINTS)
    with pytest.raises(FloatingPointError):
        trainer.train()
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(torch.isfinite(tensor).all() for tensor in weights_of(folder).values())
        json.loads((folder / "trainer_state.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_the_norm_on_a_gpu_is_looked_at_a_step_late_and_before_a_save(tmp_path, monkeypatch):
    """A norm that is `copied` is one that a GPU still computes."""

    class Late(health.Norm):
        def __init__(self, *args):
            super().__init__(*args)
            self.copied = SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(health, "Norm", Late)
    trainer = trainer_of(tmp_path / "late", 3)
    with pytest.raises(FloatingPointError, match="step 3: "):
        trainer.train()
    assert trainer.state.global_step == 3
    with pytest.raises(FloatingPointError, match="step 3: .*checkpoint-2"):
        trainer_of(tmp_path / "saves", 3, **CHECKPOINTS).train()
    assert not (tmp_path / "saves" / "checkpoint-3").exists()
    with pytest.raises(FloatingPointError, match="step 6: "):
        trainer_of(tmp_path / "last", 6).train()  # of six


def test_fp16_counts_what_it_skips_and_gives_up(tmp_path, monkeypatch, capsys):
    trainer = trainer_of(tmp_path, 2, math.inf, fp16=True)
    trainer.train()
    counted = {line["step"]: line.get("skipped_steps", 0) for line in trainer.state.log_history if "loss" in line}
    assert counted == {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    assert "grad_norm" not in next(line for line in trainer.state.log_history if line["step"] == 2)
    assert "fp16 skipped 1 steps" in capsys.readouterr().err
    monkeypatch.setattr(health, "SKIPPED_IN_A_ROW", 3)
    trainer = trainer_of(tmp_path, fp16=True)
    usual = trainer.training_step

    def always(model, inputs, num_items_in_batch=None):
        loss = usual(model, inputs, num_items_in_batch)
        next(model.parameters()).grad.view(-1)[0] = math.inf
        return loss

    trainer.training_step = always
    with pytest.raises(FloatingPointError, match="step 3: fp16 has skipped the last 3 steps.*--bf16"):
        trainer.train()


def test_a_loss_that_is_no_number_is_never_logged(tmp_path):
    trainer = trainer_of(tmp_path, eval_samples=Samples(4, seed=5), eval_strategy="steps", eval_steps=2)
    usual = trainer.evaluation_loop

    def broken(*args, **kwargs):
        found = usual(*args, **kwargs)
        found.metrics["eval_loss"] = math.nan
        return found

    trainer.evaluation_loop = broken
    with pytest.raises(FloatingPointError, match="step 2: the evaluation loss is nan"):
        trainer.train()
    assert not any("eval_loss" in line for line in trainer.state.log_history)


def test_no_gradient_at_all_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(health, "ZERO_NORMS", 3)
    trainer = trainer_of(tmp_path)
    usual = trainer.training_step

    def nothing(model, inputs, num_items_in_batch=None):
        loss = usual(model, inputs, num_items_in_batch)
        for parameter in model.parameters():
            parameter.grad.zero_()
        return loss

    trainer.training_step = nothing
    trainer.train()
    assert capsys.readouterr().err.count("the gradient of the last 3 steps is exactly 0") == 1


@pytest.mark.parametrize("limit, told", [(100.0, 1), (0.01, 0)])
def test_a_loss_near_0_in_the_first_steps_is_said(tmp_path, monkeypatch, capsys, limit, told):
    monkeypatch.setattr(health, "TOO_EASY", limit)
    trainer_of(tmp_path).train()
    assert capsys.readouterr().err.count("in the first steps: the model knows these answers already") == told


def test_tensors_are_looked_at_before_they_are_written():
    large = torch.full((1000,), 3e38)  # whose sum is no number, unlike each of them
    health.check_tensors([("large", large), ("whole", torch.ones(3, dtype=torch.int32))])
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[3, 4] = math.inf
    with pytest.raises(FloatingPointError, match=r"transformer\.h\.1\.attn\.c_attn\.weight is not finite"):
        health.check_tensors(model.named_parameters())
