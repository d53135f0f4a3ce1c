"""Flags that may change at a resume: the learning rate of each following step against its formula, groups, and when to save."""

import math

import pytest
import torch
from trainers import NoTokenizer, Samples, losses, make_trainer, stop_after, tiny_model
from transformers import TrainingArguments

from finetune.errors import UserError
from finetune.flags.going_on import Change
from finetune.lifecycle.changed_flags import take_schedule
from finetune.lifecycle.resuming import GO_ON, RESULT, Way
from finetune.steps.plan import Plan
from finetune.steps.trainer import PlannedTrainer

FIRST = {"learning_rate": 1e-2, "num_train_epochs": 2, "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1}
STOPPED_AT = 3  # of six steps


def trainer_of(folder, way=None, loraplus_lr_ratio=None, **settings):
    """Three steps an epoch."""
    samples = Samples()
    plan = Plan(samples.lengths, samples.supervised, weights=samples.weight_sums, samples_per_step=8, max_tokens_per_pass=60, seed=3)
    usual = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 3, "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(folder), **(usual | FIRST | settings))
    more = {"way": way, "loraplus_lr_ratio": loraplus_lr_ratio, "tokenizer": NoTokenizer()}
    return PlannedTrainer(tiny_model(), arguments, samples=samples, plan=plan, **more)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """checkpoint-3 of a run of six steps."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer = trainer_of(folder, save_strategy="steps", save_steps=STOPPED_AT)
    stop_after(trainer, STOPPED_AT)
    trainer.train()
    return folder / f"checkpoint-{STOPPED_AT}"


def gone_on(stopped, folder, total=6, **settings):
    changes = tuple(Change(name, str(FIRST.get(name)), str(value)) for name, value in settings.items())
    way = Way(GO_ON, stopped, {}, STOPPED_AT, total, 6, changes)
    trainer = trainer_of(folder, way, **settings)
    trainer.train(resume_from_checkpoint=str(stopped))
    return trainer


def rates(trainer) -> list[float]:
    """Of the steps after the checkpoint."""
    return [line["learning_rate"] for line in trainer.state.log_history if "loss" in line and line["step"] > STOPPED_AT]


@pytest.mark.parametrize("settings, total, expected", [
    ({"learning_rate": 2e-3}, 6, lambda k: 2e-3 * (6 - k) / 4),
    ({"lr_scheduler_type": "cosine"}, 6, lambda k: 1e-2 * 0.5 * (1 + math.cos(math.pi * (k - 2) / 4))),
    ({"warmup_steps": 5}, 6, lambda k: 1e-2 * k / 5),
    ({"lr_scheduler_type": "constant_with_warmup", "learning_rate": 3e-3}, 6, lambda k: 3e-3),
    ({"num_train_epochs": 3}, 9, lambda k: 1e-2 * (9 - k) / 7),
    ({"max_steps": 4}, 4, lambda k: 1e-2 * (4 - k) / 2),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}, 6,
        lambda k: 1e-2 * (0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * (k - 2) / 4))),
    ),
])  # fmt: skip
def test_the_rates_of_the_steps_that_follow(stopped, tmp_path, settings, total, expected, capsys):
    """k: the steps that are done before. All formulas have the warm-up behind them, but for the one that is still in it."""
    trainer = gone_on(stopped, tmp_path, total, **settings)
    assert rates(trainer) == pytest.approx([expected(k) for k in range(STOPPED_AT, total)], rel=1e-9)
    said = capsys.readouterr().err
    assert "note: changed from here on: " in said and all(f"--{name}: " in said for name in settings)
    assert ("the curve of the learning rate is that of" in said) == (total != 6)
    assert f"the learning rate of step {STOPPED_AT + 1} is {expected(STOPPED_AT):.4g}" in said


def test_a_checkpoint_that_does_not_say_its_flags(stopped, tmp_path, capsys):
    """Of an older version: what is given now holds all the same, and that it is another learning rate is said."""
    for name, settings, expected in (("same", {}, FIRST["learning_rate"]), ("other", {"learning_rate": 2e-3, "weight_decay": 0.3}, 2e-3)):
        trainer = trainer_of(tmp_path / name, Way(GO_ON, stopped, {"seed": 3}, STOPPED_AT, 6, 6), **settings)
        trainer.train(resume_from_checkpoint=str(stopped))
        assert rates(trainer) == pytest.approx([expected * (6 - k) / 4 for k in range(STOPPED_AT, 6)], rel=1e-9)
        assert trainer.optimizer.param_groups[0]["weight_decay"] == settings.get("weight_decay", 0.1)
        said = capsys.readouterr().err
        line = "changed from here on: flags that the checkpoint does not record; the learning rate of step 4 is 0.0015, not 0.0075"
        assert (line in said) == bool(settings), said


def test_the_log_tells_the_rate_that_the_optimizer_has(stopped, tmp_path):
    """A rate of 0 from here on moves nothing."""
    trainer = gone_on(stopped, tmp_path, learning_rate=0.0, weight_decay=0.0)
    stored = type(trainer.model).from_pretrained(stopped)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), stored.parameters()))


def test_decay_betas_and_epsilon(stopped, tmp_path):
    trainer = gone_on(stopped, tmp_path, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]  # vectors still do not decay
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in groups)
    assert rates(trainer) == pytest.approx([1e-2 * (6 - k) / 4 for k in range(STOPPED_AT, 6)])  # the schedule is as it was


def test_what_has_not_changed_goes_on_bit_for_bit(stopped, tmp_path):
    plain = trainer_of(tmp_path / "plain")
    plain.train(resume_from_checkpoint=str(stopped))
    same = gone_on(stopped, tmp_path / "same", learning_rate=1e-2, weight_decay=0.1)  # taken anew, with equal values
    assert losses(same) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(same.model.parameters(), plain.model.parameters()))


def test_when_to_save_is_as_the_flags_say_now(stopped, tmp_path):
    trainer = gone_on(stopped, tmp_path, save_strategy="steps", save_steps=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert trainer.state.save_steps == 2


def test_a_run_that_is_at_its_end_makes_no_step_more(tmp_path):
    """One step behind the beginning of an epoch: transformers would make the next one."""
    trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=4).train()
    last = tmp_path / "checkpoint-4"
    trainer = trainer_of(tmp_path, Way(RESULT, last, {}, 4, 4, 4), max_steps=4)
    trainer.train(resume_from_checkpoint=str(last))
    assert trainer.state.global_step == 4 and not any(line["step"] > 4 for line in trainer.state.log_history)
    stored = type(trainer.model).from_pretrained(last)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), stored.parameters()))
    assert not any("train_loss" in line for line in trainer.state.log_history)


def test_groups_keep_their_ratio():
    """LoRA+ has groups with a multiple of the rate; a rate in a tensor is changed in place."""
    rate = torch.tensor(0.0)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.4}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[1]["lr"] = rate
    take_schedule(optimizer, scheduler, [{"initial_lr": 0.2}, {"initial_lr": 0.8}])
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[1]["lr"] is rate and float(rate) == pytest.approx(0.4)
    optimizer.step()
    scheduler.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.2 / 3, 0.8 / 3])


def test_a_schedule_that_follows_the_loss_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match="ReduceLROnPlateau"):
        take_schedule(optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), [{"initial_lr": 1.0}])


def test_make_trainer_needs_no_way(tmp_path):
    """A trainer by itself, as in the tests of the trainer, makes all its steps."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
