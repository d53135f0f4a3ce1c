"""Every optimizer and every schedule takes a step on a layer of a few numbers, or is refused in one line before weights are loaded."""

import importlib.util
import inspect
import json

import pytest
import torch
from command_lines import found, only, read
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

from finetune.flags import schedules, trials, values
from finetune.model import optimizers


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """torchao's optimizers ask for one."""
    monkeypatch.setenv("CC", "cc")


def check(world, flags: str, line: str | None) -> None:
    """The one finding begins with a line; None: there is none."""
    if line is None:
        assert found(world, *flags.split()) == []
    else:
        assert only(world, *flags.split()).startswith(line)


# ---- optimizers


@pytest.mark.parametrize("name", values.WORDS["optim"])
def test_every_optimizer_takes_a_step_or_is_refused(world, name):
    """Which of the two: by whether its package is here, and whether this trainer can honour it."""
    lines = found(world, "--optim", name)
    package = optimizers.of_name(optimizers.PACKAGES, name)
    if name in optimizers.REFUSED:
        assert lines == [f"--optim {name}: {optimizers.REFUSED[name]} - {optimizers.OTHER_ONE}"]
    elif package and importlib.util.find_spec(package[0]) is None:
        assert lines == [f"--optim {name}: the package is missing - {package[1]}"] and "pip install " in lines[0]
    elif optimizers.is_slow_to_try(name):
        assert lines == []
    else:
        model, made = trials.made_for(read(world, "--optim", name).training)
        before = model.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        try:
            made.step()
        except Exception as error:
            assert len(lines) == 1 and lines[0].startswith(f"--optim {name}: does not work here ("), (error, lines)
        else:
            assert lines == [] and not torch.equal(model.weight, before)


def test_the_trial_draws_no_random_number(world):
    training = read(world).training
    before = torch.get_rng_state()
    trials.made_for(training)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("flags, line", [
    ("--optim sgd --optim_args momentum=0.9,nesterov=true", None),
    ("--optim sgd --optim_args momentum", "--optim_args momentum: is no setting - write name=value"),
    ("--optim sgd --optim_args momentum=0.9=1", "--optim_args momentum=0.9=1: is no setting - "),
    ("--optim sgd --optim_args momentum=0.9,", "--optim_args momentum=0.9,: a comma too many - "),
    ("--optim sgd --optim_args momentun=0.9", "--optim_args momentun=0.9: sgd does not read it - sgd takes momentum=..., "),
    ("--optim sgd --optim_args momentum=fast", "--optim sgd --optim_args momentum=fast: does not work here (ValueError: "),
    ("--optim sgd --optim_args momentum=-1", "--optim sgd --optim_args momentum=-1: does not work here (ValueError: "),
    ("--optim_args weight_decay=0.1", "--optim_args weight_decay=0.1: adamw_torch_fused does not read it - adamw_torch_fused takes none"),
    ("--optim_target_modules all-linear", "--optim_target_modules all-linear: is for galore and apollo, and adamw_torch_fused"),
    ("--optim rmsprop --optim_args alpha=nan", "--optim rmsprop --optim_args alpha=nan: "),
])  # fmt: skip
def test_settings_of_optimizers(world, flags, line):
    check(world, flags, line)


def test_optimizers_of_low_rank_need_their_layers(world, monkeypatch):
    here = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: here("json") if name == "galore_torch" else here(name))
    assert only(world, "--optim", "galore_adamw") == (
        "--optim galore_adamw: needs to know its layers - add --optim_target_modules all-linear"
    )


def test_optim_args_are_those_that_transformers_reads():
    """Each name stands in its source."""
    source = inspect.getsource(importlib.import_module("transformers.trainer_optimizer"))
    for name, keys in optimizers.ARGS.items():
        assert all(f'"{key}"' in source for key in keys), name


# ---- schedules

RIGHT = {name: [{}] for name in values.WORDS["lr_scheduler_type"]} | {
    "cosine": [{}, {"num_cycles": 1.5}],
    "polynomial": [{}, {"lr_end": 1e-8, "power": 2}],
    "cosine_with_min_lr": [{"min_lr_rate": 0.1}, {"min_lr": 1e-6}],
    "cosine_warmup_with_min_lr": [{"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}],
    "warmup_stable_decay": [{"num_decay_steps": 5}, {"num_decay_steps": 5, "decay_type": "1-sqrt"}],
    "greedy": [{"min_lr": 1e-6}],
    "reduce_lr_on_plateau": [{}, {"patience": 2, "factor": 0.5}],
}


@pytest.mark.parametrize("name", values.WORDS["lr_scheduler_type"])
def test_every_schedule_works(world, name):
    more = ["--eval_split", "0.5"] if name in schedules.BY_EVALUATION else []
    for settings in RIGHT[name]:
        given = ["--lr_scheduler_kwargs", json.dumps(settings)] if settings else []
        for warmup in ([], ["--warmup_ratio", "0.3"]):
            assert found(world, "--lr_scheduler_type", name, *given, *more, *warmup) == []
    line = only(world, "--lr_scheduler_type", name, "--lr_scheduler_kwargs", json.dumps(RIGHT[name][0] | {"nothing": 1}), *more)
    assert line == f"--lr_scheduler_kwargs: {name} takes no nothing - {schedules.advice(name)}"


@pytest.mark.parametrize("name", schedules.KEYS)
def test_settings_are_those_of_transformers(name):
    """But for what the trainer gives, and what the two that ignore theirs would swallow."""
    function = {"reduce_lr_on_plateau": torch.optim.lr_scheduler.ReduceLROnPlateau, "greedy": GreedyLR}.get(name)
    function = function or TYPE_TO_SCHEDULER_FUNCTION[name]
    given = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert {*inspect.signature(function).parameters} - given == {*schedules.KEYS[name]}


@pytest.mark.parametrize("flags, line", [
    (["cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr: needs min_lr_rate or min_lr - add --lr_scheduler_kwargs '{\"min_"),
    (["warmup_stable_decay"], "--lr_scheduler_type warmup_stable_decay: needs num_decay_steps - add "),
    (["warmup_stable_decay", '{"num_decay_steps": 5, "decay_type": "x"}'], "--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs"),
    (["greedy", "", "--eval_split", "0.5"], "--lr_scheduler_type greedy: needs min_lr - add "),
    (["polynomial", '{"lr_end": 1}'], "--lr_scheduler_type polynomial --lr_scheduler_kwargs {"),
    (["polynomial", '{"power": "x"}'], '--lr_scheduler_kwargs: power is "x", and must be a number above 0 - change it'),
    (["cosine", '{"num_cycles": "many"}'], '--lr_scheduler_kwargs: num_cycles is "many", and must be a number above 0 - change it'),
    (["cosine", '{"num_cycles": -3}'], "--lr_scheduler_kwargs: num_cycles is -3, and must be a number above 0 - change it"),
    (["warmup_stable_decay", '{"num_decay_steps": 5, "num_stable_steps": -5}'], "--lr_scheduler_kwargs: num_stable_steps is -5, and must be"),
    (["cosine_with_min_lr", '{"min_lr_rate": 1.5}'], "--lr_scheduler_kwargs: min_lr_rate is 1.5, and must be a number from 0 to 1 - "),
    (["polynomial", '{"lr_end": true}'], "--lr_scheduler_kwargs: lr_end is true, and must be a number 0 or more - "),
    (["cosine", '{"num_cycles": NaN}'], "--lr_scheduler_kwargs: num_cycles is nan, which is no number - "),  # a rate of 0, in silence
    (["inverse_sqrt", '{"timescale": -5}'], "--lr_scheduler_kwargs: timescale is -5, and must be a number above 0 - change it"),
    (["linear", '{"num_cycles": 1}'], "--lr_scheduler_kwargs: linear takes no num_cycles - linear has none: leave out "),
    (["reduce_lr_on_plateau"], "--lr_scheduler_type reduce_lr_on_plateau: follows the evaluated loss - add --eval_data_path"),
    (["reduce_lr_on_plateau", '{"factor": 2}', "--eval_split", "0.5"], "--lr_scheduler_kwargs: factor is 2, and must be a number from 0 to 1 - "),
])  # fmt: skip
def test_schedules_that_do_not_work(world, flags, line):
    name, settings, *more = [*flags, ""][: max(2, len(flags))]
    given = ["--lr_scheduler_kwargs", settings] if settings else []
    assert only(world, "--lr_scheduler_type", name, *given, *more).startswith(line)


# ---- backends


@pytest.mark.parametrize("flags, line", [
    ("--ddp_backend gloo", None),
    ("--ddp_backend hccl", "--ddp_backend hccl: this torch is built without it - give gloo, or leave it out"),
    ("--torch_compile_backend eager", None),
    ("--torch_compile_backend inductr", "--torch_compile_backend inductr: unknown - give "),
    ("--torch_compile_mode default --fsdp True", "--torch_compile_mode and --fsdp: what is compiled and shared out cannot be put "),
])  # fmt: skip
def test_backends(world, flags, line):
    check(world, flags, line)


def test_nccl_is_for_gpus(world, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: True)
    assert only(world, "--use_cpu", "--ddp_backend", "nccl") == "--ddp_backend nccl: is for GPUs - give gloo, or leave it out"
