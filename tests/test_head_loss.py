"""The fused head and loss against float64 cross-entropy."""

import pytest
import torch
from torch import nn

from qwen_model import head_loss
from qwen_model.head_loss import LMHead, summed_loss


@pytest.fixture(params=[3, 1000])
def pieces(request, monkeypatch):
    """Many small pieces, and one large one."""
    monkeypatch.setattr(head_loss, "rows_per_piece", lambda vocab_size, device: request.param)


def example(dtype=torch.float32, vocab=300, hidden=24, rows=20):
    torch.manual_seed(0)
    head = LMHead(hidden, vocab, bias=False, dtype=dtype)
    x = (torch.randn(rows, hidden) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,))
    labels[5:8] = 7  # a label that occurs several times: its rows must add up
    return head, x, labels


def reference(head, x, labels, factor):
    x64, w64 = x.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    loss = nn.functional.cross_entropy(x64 @ w64.T, labels, reduction="sum")
    (loss * factor).backward()
    return loss, x64.grad, w64.grad


@pytest.mark.parametrize("frozen", [None, "head", "input"])
def test_equals_cross_entropy(pieces, frozen):
    head, x, labels = example()
    head.weight.requires_grad_(frozen != "head")
    x.requires_grad_(frozen != "input")
    expected, grad_x, grad_w = reference(head, x, labels, 0.37)
    loss = summed_loss(head, x, labels)
    (loss * 0.37).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for got, want in ((x.grad, grad_x), (head.weight.grad, grad_w)):
        if got is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert (head.weight.grad is None) == (frozen == "head")
    assert (x.grad is None) == (frozen == "input")


def test_large_logits_do_not_overflow():
    head, x, labels = example()
    loss = summed_loss(head, x * 1e3, labels)
    expected, _, _ = reference(head, x * 1e3, labels, 1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(pieces, dtype):
    head, x, labels = example(dtype)
    expected, grad_x, grad_w = reference(head, x, labels, 1)
    loss = summed_loss(head, x, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    for got, want in ((x.grad, grad_x), (head.weight.grad, grad_w)):
        assert got.dtype == dtype
        assert (got.double() - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [0.0, 3.0, 6.0])
def test_a_sure_model_still_gets_its_gradient(dtype, margin):
    """p(label) of about 0.9, 0.995 and 0.9995: p - 1 is below the spacing of half precision, and must not be rounded away."""
    torch.manual_seed(0)
    head, labels = LMHead(64, 500, bias=False), torch.arange(40)
    with torch.no_grad():
        head.weight.normal_(0, 0.125)
        x = head.weight[labels] / head.weight[labels].norm(dim=1, keepdim=True) ** 2 * (9.0 + margin)
    x = (x + 0.01 * torch.randn(40, 64)).requires_grad_()
    expected, grad_x, grad_w = reference(head, x, labels, 1)
    probability = torch.exp(-expected / 40).item()
    assert probability > {0.0: 0.85, 3.0: 0.99, 6.0: 0.999}[margin]
    with torch.autocast("cpu", dtype):
        loss = summed_loss(head, x, labels)
    loss.backward()
    for got, want in ((x.grad, grad_x), (head.weight.grad, grad_w)):
        assert (got.double() - want).norm() / want.norm() < 0.1


def test_float32_masters_under_autocast():
    head, x, labels = example()
    expected, grad_x, grad_w = reference(head, x, labels, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(head, x, labels)
    loss.backward()
    assert x.grad.dtype == head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    for got, want in ((x.grad, grad_x), (head.weight.grad, grad_w)):
        assert (got.double() - want).norm() / want.norm() < 0.02


def test_any_other_head_goes_piece_by_piece(pieces):
    head, x, labels = example()
    plain = nn.Linear(24, 300, bias=False)
    plain.weight = nn.Parameter(head.weight.detach().clone())
    expected, grad_x, grad_w = reference(head, x, labels, 1)
    loss = summed_loss(plain, x, labels)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain.weight.grad.double(), grad_w, rtol=1e-5, atol=1e-6)


def test_no_supervised_row_still_has_gradients():
    head, x, labels = example()
    loss = summed_loss(head, x[:0], labels[:0])
    loss.backward()
    assert loss.item() == 0 and x.grad is not None


def test_logits_never_stand_in_memory_at_once(monkeypatch):
    """The largest tensor that is projected has as many rows as a piece."""
    head, x, labels = example(rows=50)
    monkeypatch.setattr(head_loss, "rows_per_piece", lambda vocab_size, device: 8)
    seen, exponentials = [], head_loss.exponentials
    monkeypatch.setattr(head_loss, "exponentials", lambda z, y: seen.append(len(z)) or exponentials(z, y))
    summed_loss(head, x, labels)
    assert seen == [8] * 6 + [2]
