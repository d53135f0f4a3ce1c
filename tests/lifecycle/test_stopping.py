"""A run that is asked to stop ends behind a step, with a checkpoint, and the rest of it is what it would have been."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from trainers import losses, make_trainer
from transformers import TrainerCallback

from finetune.distributed import ranks
from finetune.errors import STOP_SIGNALS
from finetune.lifecycle import stopping
from finetune.lifecycle.stopping import Stopping


class At(TrainerCallback):
    """Calls something at the beginning of a step, or at its end."""

    def __init__(self, step: int, job, end=False):
        self.step, self.job = step - 1, job
        if end:
            self.on_step_end, self.step = self.on_step_begin, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.job()


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("saving", ["no", "epoch"])
def test_a_signal_ends_it_behind_the_step_and_the_rest_is_the_same(tmp_path, number, saving):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    first = make_trainer(tmp_path / "out", save_strategy=saving)
    first.add_callback(At(2, send(number)))
    first.train()
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before
    assert first.state.global_step == 2 and first.stopping.stopped_at == 2
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    line = first.stopping.describe(tmp_path / "out")
    assert line.startswith(f"{number.name}: stopped behind step 2, with {tmp_path / 'out' / 'checkpoint-2'}; the same command goes on")
    second = make_trainer(tmp_path / "out")
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(second)[-4:] == losses(whole)[-4:] and second.stopping.describe(tmp_path) is None
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name


def test_a_command_that_overwrites_does_not_go_on(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.overwrite_output_dir = True
    trainer.add_callback(At(2, send(signal.SIGTERM)))
    trainer.train()
    assert trainer.stopping.describe(tmp_path).endswith("; the same command without --overwrite_output_dir goes on from it")


def test_the_end_of_an_epoch_is_one(tmp_path):
    """Of three steps: there the checkpoint of --save_strategy epoch and the evaluation are due."""
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    trainer.add_callback(At(3, send(signal.SIGTERM)))
    trainer.train()
    assert trainer.stopping.stopped_at == 3 and (tmp_path / "checkpoint-3").is_dir()


def test_a_run_that_ends_anyway_has_not_been_stopped(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At(6, send(signal.SIGTERM)))
    trainer.train()
    assert trainer.stopping.describe(tmp_path) is None and not list(tmp_path.glob("checkpoint-*"))


def test_the_second_ctrl_c_ends_at_once(tmp_path, capfd):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At(2, send(signal.SIGINT)))
    trainer.add_callback(At(2, lambda: setattr(trainer.stopping, "asked_at", time.monotonic() - 2)))
    trainer.add_callback(At(2, send(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "SIGINT: stopping behind this step, with a checkpoint; Ctrl-C once more ends at once" in capfd.readouterr().err


def test_the_same_ctrl_c_by_two_ways_is_one(tmp_path):
    """A terminal sends it to the launcher as well, which hands it on."""
    trainer = make_trainer(tmp_path)
    for _ in range(2):
        trainer.add_callback(At(2, send(signal.SIGINT)))
    trainer.train()
    assert trainer.stopping.stopped_at == 2


def test_a_deadline(tmp_path):
    trainer = make_trainer(tmp_path, stopping=Stopping(stopping.age_of_process() + 3600, "--stop_after 1h"))
    trainer.add_callback(At(4, lambda: setattr(trainer.stopping, "deadline", time.monotonic() - 1)))
    trainer.train()
    assert trainer.stopping.describe(tmp_path).startswith("--stop_after 1h: stopped behind step 4, with ")


def test_a_clock_that_is_set_moves_no_deadline(monkeypatch):
    """By hand or by the network's time, in either direction."""
    for jump in (1e6, -1e6):
        stop, now = Stopping(stopping.age_of_process() + 100), time.time()
        monkeypatch.setattr(time, "time", lambda: now + jump)  # noqa: B023
        left = stop.deadline - time.monotonic()
        stop.on_step_end(None, SimpleNamespace(global_step=1, max_steps=9), SimpleNamespace())
        monkeypatch.undo()
        assert stop.why is None and 90 < left < 110


def test_the_deadline_counts_from_the_start_of_the_process():
    age = stopping.age_of_process()
    assert 0 < age < 7200
    time.sleep(0.2)
    assert 0.1 < stopping.age_of_process() - age < 2
    assert Stopping(100).deadline == pytest.approx(time.monotonic() - stopping.age_of_process() + 100, abs=1)


def test_a_checkpoint_without_optimizer_promises_nothing(tmp_path):
    trainer = make_trainer(tmp_path, save_only_model=True)
    trainer.add_callback(At(2, send(signal.SIGTERM)))
    trainer.train()
    assert trainer.stopping.describe(tmp_path).endswith("(--save_only_model), so no run can go on from it")


@pytest.mark.parametrize("late, step", [(False, 3), (True, 4)])
def test_ranks_agree_on_a_step_that_none_has_passed(monkeypatch, late, step):
    """Rank 0 hears of it in step 2. Others have begun step 3 at most, or on a GPU, step 4."""
    wishes = []

    def first_wish(what, wish):
        wishes.extend([wish] if wish and not wishes else [])
        return wishes[0] if wishes else None

    monkeypatch.setattr(ranks.meeting, "first_wish", first_wish)
    monkeypatch.setenv("WORLD_SIZE", "2")
    state, ended = type("State", (), {"max_steps": 9, "global_step": 0}), {}
    every = [Stopping(is_late=late), Stopping(is_late=late)]
    every[0].why = "SIGTERM"
    for number in (1, 0):  # rank 1 is ahead
        for state.global_step in range(2, 9):
            control = type("Control", (), {"should_training_stop": False})
            every[number].on_step_end(None, state, control)
            if number == 1 and state.global_step == step - 1 and not wishes:
                every[0].on_step_end(None, type("State", (), {"max_steps": 9, "global_step": 2}), control)
            if every[number].stopped_at:
                ended[number] = every[number].stopped_at
                break
    assert ended == {0: step, 1: step}
