"""The work of a step as torch counts it, and the rate of the device that it is held against."""

import pytest
import torch
from tiny import packed, random_samples, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from trainers import make_trainer

from finetune.steps import utilization

PRODUCTS = ("mm", "addmm", "addmm_")


def counted(model, row: dict) -> int:
    """FLOP of the products of matrices in a pass, attention's own left out."""
    in_place = {torch.ops.aten.addmm_: lambda into, one, other, **more: 2 * one[0] * one[1] * other[1]}  # of shapes; torch forgets it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(**row, num_items_in_batch=1, skip_logits=True).loss.backward()
    return sum(flop for kind, flop in counter.get_flop_counts()["Global"].items() if str(kind).split(".")[-1] in PRODUCTS)


@pytest.mark.parametrize("frozen", [(), ("lm_head",), ("mlp",), ("wte", "attn")], ids=str)
def test_the_work_is_what_torch_counts(frozen):
    """With everything trained; without the head's, or a part of the blocks' own gradients."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    samples, labels = random_samples(6)
    row = packed(samples, labels)
    work = utilization.Work(model).of(row["input_ids"].numel(), row["shift_labels"].numel())
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # biases and norms go through no product
    assert counted(model, row) == pytest.approx(work, abs=6 * vectors * row["input_ids"].numel() + 1) and work > 1e6


def test_the_share_of_what_the_device_can_do(tmp_path, monkeypatch):
    """Of one rank; the rate is measured once, before the first step."""
    measured = []
    monkeypatch.setattr(utilization, "matrix_rate", lambda device, dtype: measured.append(dtype) or 1e9)
    trainer = make_trainer(tmp_path)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    step = trainer.plan.step(0, 0)
    seconds = step.tokens / lines[0]["tokens_per_second"]
    expected = trainer.work.of(step.tokens, step.supervised_tokens) / seconds / 1e9
    assert measured == [torch.float32] and lines[0]["flop_utilization"] == pytest.approx(expected, rel=0.01, abs=1e-4)
    assert trainer.state.total_flos == pytest.approx(
        sum(trainer.work.of(one.tokens, one.supervised_tokens) for epoch in (0, 1) for one in (trainer.plan.step(epoch, i) for i in range(3)))
    )


def test_the_rate_of_this_machine():
    """Between a phone's and the fastest of all."""
    rate = utilization.matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e9 < rate < 1e15
    one = torch.ones(8, 8)
    assert utilization.timed(torch.mm, one, one) > 0
