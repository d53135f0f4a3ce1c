"""LoRA+'s groups, and rounding that keeps updates smaller than bfloat16's spacing."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import Trainer

from finetune.flags.training_args import TrainingArguments
from finetune.lora import token_rows
from finetune.model import optimizers
from finetune.steps.trainer import PlannedTrainer


def adapted():
    config = LoraConfig(
        r=2, target_modules=["c_attn"], bias="all", use_dora=True, trainable_token_indices={"wte": [1], "lm_head": [1]}
    )
    model = get_peft_model(tiny_model(), config)
    token_rows.install(model)
    return model


def trainer_for(model, tmp_path, ratio=None, **flags):
    """As much of the trainer as makes an optimizer."""
    trainer = PlannedTrainer.__new__(PlannedTrainer)
    usual = {"output_dir": str(tmp_path), "learning_rate": 1e-3, "weight_decay": 0.1, "use_cpu": True}
    trainer.args = TrainingArguments(**(usual | flags))
    trainer.model, trainer.loraplus_lr_ratio = model, ratio
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    return trainer


def settings_of(optimizer, model) -> dict[str, tuple[float, float]]:
    """{name: (learning rate, weight decay)}"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return {names[id(p)]: (float(group["lr"]), group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_lora_plus_speeds_up_the_b_matrices(tmp_path, ratio):
    model = adapted()
    trainer = trainer_for(model, tmp_path, ratio)
    optimizer = trainer.create_optimizer()
    found = settings_of(optimizer, model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (rate, decay) in found.items():
        fast = ".lora_B." in name and ratio
        assert rate == pytest.approx(16e-3 if fast else 1e-3), name
        assert decay == (0.0 if "bias" in name or "magnitude" in name else 0.1), name
    assert trainer.create_optimizer() is optimizer and settings_of(optimizer, model) == found  # asked for again


def test_lora_plus_leaves_no_empty_group(tmp_path):
    """With which FSDP2 could not go on from a checkpoint (a KeyError in torch)."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["c_attn"]))
    assert [len(group["params"]) for group in trainer_for(model, tmp_path, 4.0).create_optimizer().param_groups] == [2, 2]


def test_lora_plus_follows_the_schedule(tmp_path):
    model = adapted()
    trainer = trainer_for(model, tmp_path, 4.0, lr_scheduler_type="linear")
    optimizer = trainer.create_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    rates = {round(float(group["lr"]), 7) for group in optimizer.param_groups if group["params"]}
    assert rates == {5e-4, 2e-3}


# ---- weights in bfloat16


@pytest.mark.parametrize("before", [None, "block_size=128", "bf16_stochastic_round=False,block_size=128"])
def test_the_flag_switches_rounding_on(before):
    training = SimpleNamespace(bf16_weights=True, optim_args=before)
    optimizers.prepare(training)
    optimizers.prepare(training)
    assert training.optim_args.split(",")[-1] == "bf16_stochastic_round=True"
    assert training.optim_args.count("stochastic") == 1 and ("128" in training.optim_args) == bool(before)


def test_without_the_flag_nothing_changes():
    training = SimpleNamespace(bf16_weights=False, optim_args="block_size=128")
    optimizers.prepare(training)
    assert training.optim_args == "block_size=128"


@pytest.mark.parametrize("optim", optimizers.ROUNDING)
def test_the_trainer_makes_a_rounding_optimizer(tmp_path, optim):
    model = tiny_model().bfloat16()
    trainer = trainer_for(model, tmp_path, bf16_weights=True, bf16=True, optim=optim)
    optimizer = trainer.create_optimizer()
    assert type(optimizer).__name__ == {"8": "AdamW8bit", "4": "AdamW4bit"}[optim[-4]]
    assert optimizer.bf16_stochastic_round
    found = settings_of(optimizer, model)
    decays = {name: decay for name, (_, decay) in found.items()}
    assert decays["lm_head.weight"] == 0.1 and decays["transformer.ln_f.weight"] == 0.0
    assert issubclass(PlannedTrainer, Trainer)


RATE, STEPS, SIZE = 1e-6, 10, 1 << 18


def move(optimizer_of, weight):
    """What STEPS steps with gradients of about the same size do to a weight: (mean, standard deviation) of its change."""
    weight = torch.nn.Parameter(weight)
    before = weight.detach().float().clone()
    optimizer, generator = optimizer_of([weight]), torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        gradient = 1e-3 * (1 + 0.1 * torch.randn(SIZE, generator=generator))
        weight.grad = gradient.view(512, -1).to(weight.dtype)
        optimizer.step()
    change = (weight.detach().float() - before).double()
    return change.mean().item(), change.std().item()


def rounding(name):
    """torchao's optimizer, as --optim and our flag set it up."""

    def make(parameters):
        from torchao import optim

        kind = {"adamw_torch_8bit": optim.AdamW8bit, "adamw_torch_4bit": optim.AdamW4bit}[name]
        return kind(parameters, lr=RATE, weight_decay=0.0, block_size=256, bf16_stochastic_round=True)

    return make


def check_rounding(name):
    torch.manual_seed(0)
    start = torch.full((512, SIZE // 512), 0.05).bfloat16()  # its neighbours are 2.4e-4 away
    plain = {"lr": RATE, "weight_decay": 0.0}
    wanted, _ = move(lambda p: torch.optim.AdamW(p, **plain), start.float())
    lost, _ = move(lambda p: torch.optim.AdamW(p, **plain), start.clone())
    found, spread = move(rounding(name), start.clone())
    assert wanted == pytest.approx(-RATE * STEPS, rel=0.05) and lost == 0.0
    error = spread / math.sqrt(SIZE)
    assert error < 0.02 * RATE * STEPS  # sharp enough to tell
    assert abs(found - wanted) < 4 * error + 0.01 * RATE * STEPS  # the state of 8 or 4 bits has an error of its own


def test_small_updates_count_on_average(monkeypatch):
    """At 1e-6 a step, a weight of 0.05 in bfloat16: like float32 with rounding, not at all without."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    check_rounding("adamw_torch_8bit")


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers.ROUNDING)
def test_small_updates_count_when_the_step_is_compiled(name):
    """As it runs: torchao compiles its step, which takes a C compiler and, once a shape, half a minute on a slow machine."""
    if missing := optimizers.missing():
        pytest.skip(missing)
    check_rounding(name)
