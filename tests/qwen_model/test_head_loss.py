"""The fused head and loss against float64 cross-entropy."""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("how", ["fused", "weighted", "another head"])
def test_labels_that_are_the_likeliest_are_counted(pieces, how):
    """Within counting() alone, the innermost only, and once, though the pieces of another head are computed again."""
    head, x, labels = example()
    likeliest = (x @ head.weight.T).argmax(1)
    labels = torch.where(torch.arange(len(labels)) % 3 == 0, likeliest, labels)
    want = int((labels == likeliest).sum())
    assert 7 <= want < len(labels)
    used = nn.Sequential(head) if how == "another head" else head
    weights = torch.rand(len(labels)) if how == "weighted" else None
    hits, outer = torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    plain = summed_loss(used, x, labels, weights)
    with head_loss.counting(outer):
        with head_loss.counting(hits):
            counted = [summed_loss(used, x, labels, weights) for _ in range(2)]
    counted[0].backward()
    summed_loss(used, x, labels, weights)
    assert (hits.item(), outer.item()) == (2 * want, 0) and torch.equal(counted[0], plain) and not head_loss.counters


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


class Adapted(nn.Module):
    """A head with something trained beside it, which summed_loss knows nothing of."""

    def __init__(self, head):
        super().__init__()
        self.head, self.down, self.up = head, nn.Linear(24, 2, bias=False), nn.Linear(2, 300, bias=False)

    def forward(self, hidden):
        return self.head(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize("wrap", [lambda head: head, Adapted], ids=["head", "adapted"])
def test_a_pass_without_supervised_tokens_gives_everything_a_gradient(wrap):
    """Of zeros: ranks that wait for each other's gradients (DDP) must all have one."""
    head, x, labels = example()
    head = wrap(head)
    loss = summed_loss(head, x[:0], labels[:0])
    loss.backward()
    assert loss.item() == 0 and loss.dtype == torch.float32
    for parameter in [x, *head.parameters()]:
        assert parameter.grad is not None and not parameter.grad.any()


# ---- trained rows over a frozen matrix


class WithRows(nn.Module):
    """What an adapter of rows does: hands its rows to the head."""

    takes_labels = True

    def __init__(self, head, ids, dtype=torch.float32):
        super().__init__()
        self.head, self.ids = head, torch.tensor(ids)
        self.rows = nn.Parameter(torch.randn(len(ids), head.in_features).to(dtype) * 0.5)

    def forward(self, hidden, labels=None, weight_bits=None):
        return self.head(hidden, labels=labels, rows=self.rows, row_ids=self.ids, weight_bits=weight_bits)


IDS = [250, 7, 0]  # one that is a label several times, one that may be none


def rows_example(dtype=torch.float32, rows_dtype=torch.float32):
    head, x, labels = example(dtype)
    labels[:2] = 0
    return WithRows(head, IDS, rows_dtype), x, labels


def rows_reference(head, x, labels, factor):
    """(loss, gradients of x, of the rows, of the weight) in float64, with the rows written into a copy of the matrix."""
    x64, rows64, w64 = (t.detach().double().requires_grad_() for t in (x, head.rows, head.head.weight))
    whole = w64.index_put((head.ids,), rows64)
    loss = nn.functional.cross_entropy(x64 @ whole.T, labels, reduction="sum")
    (loss * factor).backward()
    return loss, x64.grad, rows64.grad, w64.grad


@pytest.mark.parametrize("trains", ["rows", "rows and input", "rows, input and matrix", "input"])
def test_rows_equal_cross_entropy_over_the_whole_matrix(pieces, trains):
    head, x, labels = rows_example()
    head.head.weight.requires_grad_("matrix" in trains)
    head.rows.requires_grad_("rows" in trains)
    x.requires_grad_("input" in trains)
    expected, grad_x, grad_rows, grad_w = rows_reference(head, x, labels, 0.37)
    loss = summed_loss(head, x, labels)
    (loss * 0.37).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for tensor, want in ((x, grad_x), (head.rows, grad_rows), (head.head.weight, grad_w)):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad.double(), want, rtol=1e-5, atol=1e-6)


def test_rows_without_labels_give_the_logits():
    head, x, _ = rows_example()
    whole = head.head.weight.detach().clone()
    whole[head.ids] = head.rows.detach()
    for shape in ((20, 24), (2, 10, 24)):
        torch.testing.assert_close(head(x.view(shape)), x.view(shape) @ whole.T)
    head(x).sum().backward()
    torch.testing.assert_close(head.rows.grad, x.detach().sum(0).expand(3, -1))


def test_without_supervised_tokens_rows_have_a_gradient():
    head, x, labels = rows_example()
    head.head.weight.requires_grad_(False)
    summed_loss(head, x[:0], labels[:0]).backward()
    assert head.rows.grad is not None and not head.rows.grad.any() and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_dtype", [torch.float32, "same"])
def test_rows_in_half_precision(pieces, dtype, rows_dtype):
    """Also float32 rows (what trains) over a matrix in half precision (what is frozen), computed in that."""
    head, x, labels = rows_example(dtype, dtype if rows_dtype == "same" else rows_dtype)
    head.head.weight.requires_grad_(False)
    expected, grad_x, grad_rows, _ = rows_reference(head, x, labels, 1)
    with torch.autocast("cpu", dtype):
        loss = summed_loss(head, x, labels)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    assert x.grad.dtype == dtype and head.rows.grad.dtype == head.rows.dtype
    for got, want in ((x.grad, grad_x), (head.rows.grad, grad_rows)):
        assert (got.double() - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sure_model_still_trains_its_rows(dtype):
    """As above: p(label) of 0.9995, and half of the labels are trained rows."""
    torch.manual_seed(0)
    head, labels = LMHead(64, 500, bias=False), torch.arange(40)
    with torch.no_grad():
        head.weight.normal_(0, 0.125)
        x = head.weight[labels] / head.weight[labels].norm(dim=1, keepdim=True) ** 2 * 15.0
    x = (x + 0.01 * torch.randn(40, 64)).requires_grad_()
    rows = WithRows(head, list(range(20)))
    rows.rows.data = head.weight.detach()[:20].clone()
    expected, grad_x, grad_rows, _ = rows_reference(rows, x, labels, 1)
    assert torch.exp(-expected / 40) > 0.999
    with torch.autocast("cpu", dtype):
        loss = summed_loss(rows, x, labels)
    loss.backward()
    for got, want in ((x.grad, grad_x), (rows.rows.grad, grad_rows)):
        assert (got.double() - want).norm() / want.norm() < 0.1


def test_logits_never_stand_in_memory_at_once(monkeypatch):
    """The largest tensor that is projected has as many rows as a piece."""
    head, x, labels = example(rows=50)
    monkeypatch.setattr(head_loss, "rows_per_piece", lambda vocab_size, device: 8)
    seen, exponentials = [], head_loss.exponentials
    monkeypatch.setattr(head_loss, "exponentials", lambda z, *rest: seen.append(len(z)) or exponentials(z, *rest))
    summed_loss(head, x, labels)
    assert seen == [8] * 6 + [2]


INTERPRETED = """
import torch
from qwen_model import head_loss, head_loss_kernels
for V in (7, 4096, 10_001):
    for dtype, close in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        logits = (torch.randn(5, V) * 6).to(dtype)
        logits[1] += 300 if dtype != torch.float16 else 30
        logits[2, 3] = 60  # sure, and right; then sure, and wrong
        labels = torch.tensor([V - 1, 0, 3, 4, 5])
        logits[3, 2] = 60
        wide = torch.zeros(5, V + 3, dtype=dtype)  # rows that do not lie one right behind the other
        wide[:, :V] = logits
        for given in (logits.clone(), wide[:, :V]):
            hits, right = torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.int32)
            got = head_loss_kernels.exponentials(given, labels, hits)
            want = head_loss.exponentials(logits.double(), labels, right)
            assert hits == right and 0 < right < 5
            assert got[0].data_ptr() == given.data_ptr() and got[0].dtype == dtype
            for one, other in zip(got, want):
                torch.testing.assert_close(one.double(), other.double(), rtol=close if one.dtype == dtype else 1e-5, atol=1e-6)
        assert (wide[:, V:] == 0).all()
assert head_loss_kernels.exponentials(torch.empty(0, 9), torch.empty(0, dtype=torch.long))[3].shape == (0,)
print("alike")
"""


def test_the_kernel_in_tritons_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout == "alike\n", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_on_a_gpu():
    logits = (torch.randn(300, 151936, device="cuda") * 5).bfloat16()
    labels = torch.randint(0, 151936, (300,), device="cuda")
    assert head_loss.has_kernel(logits)
    labels[:100] = logits[:100].argmax(1)
    hits = torch.zeros((), dtype=torch.int32, device="cuda")
    want = head_loss.exponentials(logits.double().cpu(), labels.cpu())
    found = head_loss.exponentials(logits.clone(), labels, hits)
    assert hits == (logits.gather(1, labels[:, None])[:, 0] >= logits.amax(1)).sum() and hits >= 100
    for one, other in zip(found, want):
        close = {"rtol": 8e-3, "atol": 1e-30} if one.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(one.double().cpu(), other.double(), **close)
