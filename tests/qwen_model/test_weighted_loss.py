"""The head's loss with weights against the weighted sum in float64, and weights of 1 against none, bit for bit.

With TRITON_INTERPRET=1, run as a program, the first of these tests by the Triton kernel; prints "alike".
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_head_loss import Adapted, example, rows_example
from tiny import later_model, packed, random_samples, tiny_model

from finetune.model import later_qwen
from qwen_model import head_loss
from qwen_model.head_loss import mean_loss, summed_loss

HEADS = ["frozen head", "trained head", "trained rows", "rows and matrix", "another module"]
HALF = [torch.bfloat16, torch.float16]


def make(kind: str, dtype=torch.float32):
    """(head, hidden (R, H), labels (R,))"""
    if "rows" in kind:
        head, x, labels = rows_example(dtype, dtype)
        head.head.weight.requires_grad_("matrix" in kind)
        return head, x, labels
    head, x, labels = example(dtype)
    if kind == "another module":
        head = Adapted(head).to(dtype)
    head.requires_grad_(kind != "frozen head")
    return head, x, labels


def some_weights(count: int = 20) -> torch.Tensor:
    """From 0 to 3, two of them 0, two of them 1."""
    weights = torch.rand(count, generator=torch.Generator().manual_seed(3)) * 3
    weights[[1, 6]], weights[[2, 7]] = 0.0, 1.0
    return weights


def reference(head, x, labels, weights, factor=1.0):
    """(loss, gradients) in float64 from the definition: sum of w (log sum exp z - z_y), z = h W^T written out."""
    leaves = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in head.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    if isinstance(head, Adapted):
        matrix = leaves["head.weight"] + leaves["up.weight"] @ leaves["down.weight"]
    elif "rows" in leaves:
        matrix = leaves["head.weight"].index_put((head.ids,), leaves["rows"])
    else:
        matrix = leaves["weight"]
    z = x64 @ matrix.T
    loss = (weights.double() * (z.exp().sum(1).log() - z[torch.arange(len(z)), labels])).sum()
    (loss * factor).backward()
    return loss, {"x": x64.grad} | {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def ours(head, x, labels, weights, factor=1.0, autocast=None):
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = summed_loss(head, x, labels, weights)
    (loss * factor).backward()
    return loss, {"x": x.grad} | {name: p.grad for name, p in head.named_parameters() if p.requires_grad}


@pytest.fixture(params=[3, 1000], ids=["many pieces", "one piece"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(head_loss, "rows_per_piece", lambda vocab_size, device: request.param)


def check_definition(kind: str) -> None:
    case, weights = make(kind), some_weights()
    loss, gradients = ours(*case, weights, 0.37)
    expected, wanted = reference(*case, weights, 0.37)
    assert loss.dtype == torch.float32 and gradients.keys() == wanted.keys()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("kind", HEADS)
def test_equals_the_weighted_sum(pieces, kind):
    check_definition(kind)


def check_ones(kind: str, dtype, autocast) -> None:
    ones = torch.ones(20)
    for got, want in zip(ours(*make(kind, dtype), ones, 0.37, autocast), ours(*make(kind, dtype), None, 0.37, autocast)):
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, want)
        else:
            assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("dtype,autocast", [(torch.float32, None), *((torch.float32, half) for half in HALF), *((half, None) for half in HALF)])
@pytest.mark.parametrize("kind", HEADS)
def test_weights_of_one_change_no_bit(pieces, kind, dtype, autocast):
    check_ones(kind, dtype, autocast)


@pytest.mark.parametrize("kind", HEADS)
def test_what_weighs_nothing_might_as_well_not_be_there(kind):
    head, x, labels = make(kind)
    weights = some_weights()
    counts = weights > 0
    assert 0 < (~counts).sum() < 5
    loss, gradients = ours(head, x, labels, weights)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    head.zero_grad()
    few = x.detach()[counts].requires_grad_()
    expected, wanted = ours(head, few, labels[counts], weights[counts])
    assert not gradients["x"][~counts].any()
    gradients["x"] = gradients["x"][counts]
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("master", ["as the passes", torch.float32], ids=["half", "autocast"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("unit", [1.0, 1e5, 1e-7])
def test_half_precision_is_within_its_rounding(pieces, kind, dtype, master, unit):
    """Whatever the unit of the weights is, as it falls out of sum / sum of weights: fp16 holds no 1e5, and no 1e-7."""
    mixed = master == torch.float32
    case = make(kind, master if mixed else dtype)
    weights = some_weights() * unit
    loss, gradients = ours(*case, weights, 1 / weights.sum(), dtype if mixed else None)
    expected, wanted = reference(*case, weights, 1 / weights.double().sum())
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    for name, gradient in gradients.items():
        assert (gradient.double() - wanted[name]).norm() / wanted[name].norm() < 0.02, name


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("weights", [torch.ones(0), torch.zeros(20)], ids=["no labels", "weights of 0"])
def test_where_nothing_counts_every_gradient_is_zero(kind, weights):
    head, x, labels = make(kind)
    few = x.detach()[: len(weights)].requires_grad_()
    loss, gradients = ours(head, few, labels[: len(weights)], weights)
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_the_mean_is_over_the_weights():
    head, x, labels = make("trained head")
    weights = some_weights()
    whole, _ = reference(head, x, labels, weights)
    torch.testing.assert_close(mean_loss(head, x, labels, weights).double(), whole / weights.double().sum())
    torch.testing.assert_close(mean_loss(head, x, labels, weights, 7).double(), whole / 7)
    torch.testing.assert_close(mean_loss(head, x, labels), summed_loss(head, x, labels) / 20)


# ---- the models


SAMPLES, LABELS = random_samples(5)


def token_weights() -> list[list[float]]:
    """One for each token of each sample; the third sample's are 1."""
    generator = torch.Generator().manual_seed(5)
    weights = [(torch.rand(len(sample), generator=generator) * 2 + 0.01).tolist() for sample in SAMPLES]
    weights[2] = [1.0] * len(weights[2])
    return weights


def weighted_row() -> dict:
    row, kept = packed(SAMPLES, LABELS), []
    for weights, labels in zip(token_weights(), LABELS):
        kept += [weight for weight, label in zip(weights[1:], labels[1:]) if label != -100]
    return row | {"shift_weights": torch.tensor([kept])}


def one_by_one(model):
    """(loss, gradients): each sample by itself, plain logits, sum of w times loss over sum of w in float64."""
    model.zero_grad()
    total = weight_sum = 0.0
    for ids, labels, weights in zip(SAMPLES, LABELS, token_weights()):
        log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        for at, (label, weight) in enumerate(zip(labels[1:], weights[1:])):
            if label != -100:
                total, weight_sum = total - weight * log_p[at, label], weight_sum + weight
    (total / weight_sum).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return (total / weight_sum).item(), gradients


MODELS = {
    "bundled": tiny_model,
    "qwen2": lambda: later_qwen.prepare(later_model("qwen2", tied=False)),
    "qwen3, tied": lambda: later_qwen.prepare(later_model("qwen3", tied=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_is_its_samples_one_by_one(name):
    model = MODELS[name]().train()
    loss, gradients = one_by_one(model)
    got = model(**weighted_row()).loss
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    for parameter, wanted in gradients.items():
        error = (model.get_parameter(parameter).grad - wanted).norm() / wanted.norm().clamp_min(1e-12)
        assert error < 1e-5, f"{parameter}: {error:.2e}"
    assert got.item() != pytest.approx(model(**packed(SAMPLES, LABELS)).loss.item(), rel=1e-4)
    twice = model(**weighted_row(), num_items_in_batch=2.0).loss
    assert twice.item() == pytest.approx(loss * weighted_row()["shift_weights"].sum().item() / 2, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_ones_is_a_row_without_weights(name):
    model, row = MODELS[name]().train(), packed(SAMPLES, LABELS)
    plain = model(**row, num_items_in_batch=3.0).loss
    ones = model(**row, shift_weights=torch.ones_like(row["shift_labels"], dtype=torch.float32), num_items_in_batch=3.0).loss
    assert torch.equal(plain, ones)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_nothing_can_be_done_with_are_an_error(name):
    model, row = MODELS[name](), weighted_row()
    for wrong in (row["shift_weights"][:, 1:], row["shift_weights"][0], row["shift_weights"].T):
        with pytest.raises(ValueError, match=r"shift_weights must be \(1, \d+\), one for each of shift_labels; they are \("):
            model(**row | {"shift_weights": wrong})
    for more in ({}, {"labels": row["input_ids"]}):
        with pytest.raises(ValueError, match="shift_weights are what each of shift_labels weighs in the loss"):
            model(row["input_ids"], shift_weights=row["shift_weights"], **more)


def test_weights_follow_their_labels_where_some_are_left_out():
    """The bundled model alone takes rows with labels of -100: those and their weights reach no head."""
    model, ids = tiny_model().train(), torch.tensor([SAMPLES[0]])
    labels, weights = torch.tensor([LABELS[0][1:] + [-100]]), torch.tensor([token_weights()[0][1:] + [9.0]])
    log_p = model(ids, skip_logits=False).logits[0].double().log_softmax(-1)
    kept = [(at, label) for at, label in enumerate(labels[0].tolist()) if label != -100]
    weighed = sum(weights[0, at].double() for at, _ in kept)
    expected = sum(-weights[0, at].double() * log_p[at, label] for at, label in kept) / weighed
    assert 0 < len(kept) < labels.numel()
    got = model(ids, shift_labels=labels, shift_weights=weights).loss
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- the kernel


def test_the_kernel_in_tritons_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    tests = Path(__file__).parent.parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.stdout == "alike\n", done.stderr[-2000:]


def in_the_interpreter() -> None:
    from qwen_model import head_loss_kernels

    launched, kernel = [], head_loss_kernels.exponentials
    head_loss.why_no_triton = lambda device, kernel="": ""
    head_loss_kernels.exponentials = lambda *given: launched.append(1) or kernel(*given)
    for rows in (3, 1000):
        head_loss.rows_per_piece = lambda vocab_size, device: rows  # noqa: B023
        for kind in HEADS[:4]:
            launched.clear()
            check_definition(kind)
            assert len(launched) == -(-20 // min(rows, 20))
            for dtype in (torch.float32, *HALF):
                check_ones(kind, dtype, None)
    print("alike")


if __name__ == "__main__":
    in_the_interpreter()
