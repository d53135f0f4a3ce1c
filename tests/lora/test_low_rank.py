"""LoRA's fused layers against peft's own, and dropout that keeps no mask."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.compat.on_peft import unquantized
from finetune.lora import dropout, low_rank

WIDTHS = 48, 80  # in, out


class Two(nn.Module):
    """Two layers behind one another, so that the second one's input needs a gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(*WIDTHS), nn.Linear(WIDTHS[1], WIDTHS[0], bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def lora(p: float = 0.0, dtype=torch.float32, **settings):
    """(the model with peft's layers, the same with ours), B no longer zero."""
    torch.manual_seed(0)
    base = Two().to(dtype)
    config = LoraConfig(r=8, lora_alpha=12, lora_dropout=p, target_modules=["first", "second"], **settings)
    with unquantized():
        theirs = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    ours = copy.deepcopy(theirs)
    low_rank.install(ours)
    return theirs, ours


def gradients(model, x, target):
    """(output, {name: gradient}, the input's) of a squared error."""
    x = x.clone().requires_grad_()
    out = model(x)
    (out.float() - target).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return out, trained, x.grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_without_dropout_it_is_what_peft_computes(autocast, rslora):
    theirs, ours = lora(dtype=torch.bfloat16 if autocast else torch.float32, use_rslora=rslora)
    x, target = torch.randn(2, 5, WIDTHS[0]), torch.randn(2, 5, WIDTHS[0])
    x = x.bfloat16() if autocast else x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, got = gradients(theirs, x, target), gradients(ours, x, target)
    bound = 0.02 if autocast else 2e-6  # some roundings of the type
    assert got[1].keys() == expected[1].keys() and all(grad.dtype == torch.float32 for grad in got[1].values())
    assert relative(got[0], expected[0]) < bound and relative(got[2], expected[2]) < bound
    assert max(relative(got[1][name], expected[1][name]) for name in expected[1]) < bound


def relative(got, expected) -> float:
    """The difference's norm over the norm."""
    return ((got - expected).norm() / expected.norm()).item()


def test_every_mask_of_a_pass_is_drawn_the_same_way(monkeypatch):
    """Also for an input that does not lie in one piece, which its gradient does: the kernel takes only such."""
    drawn = []
    right = low_rank.drop
    monkeypatch.setattr(low_rank, "drop", lambda x, *rest, **out: (drawn.append(x.is_contiguous()), right(x, *rest, **out))[1])
    x = torch.randn(6, 5).T.requires_grad_()
    A = torch.randn(2, 6, requires_grad=True)
    low_rank.DroppedProduct.apply(x, A, 0.3, 7).sum().backward()
    assert not x.is_contiguous() and drawn == [True] * 3
    W, B = torch.randn(4, 6), torch.randn(4, 2, requires_grad=True)
    low_rank.LoraLinear.apply(x, W, None, A, B, 0.3, 7, 1.0).sum().backward()
    assert drawn == [True] * 6


def test_with_dropout_it_is_the_formula_with_the_mask_that_was_drawn():
    _, ours = lora(p=0.3)
    layer = ours.base_model.model.first
    x = torch.randn(7, WIDTHS[0], dtype=torch.float64)
    torch.manual_seed(5)
    kept = dropout.keep_mask(x.shape, 0.3, dropout.draw_seed(), "cpu").double()
    kept *= 65536 / (65536 - dropout.threshold(0.3))
    A, B = (w["default"].weight.detach().double().requires_grad_() for w in (layer.lora_A, layer.lora_B))
    base, wide = layer.base_layer, x.clone().requires_grad_()
    expected = wide @ base.weight.double().T + base.bias.double() + 12 / 8 * (wide * kept) @ A.T @ B.T
    expected.square().sum().backward()

    torch.manual_seed(5)
    narrow = x.float().requires_grad_()
    got = layer(narrow)
    got.square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.double(), expected, **close)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, **close)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad.double(), A.grad, **close)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad.double(), B.grad, **close)


def test_with_dropout_in_half_precision_gradients_come_in_their_own():
    """x and the base in bfloat16, A and B in float32: against float64, within bfloat16's rounding."""
    torch.manual_seed(1)
    x = torch.randn(50, 16).bfloat16().requires_grad_()
    W, A, B = torch.randn(8, 16).bfloat16(), torch.randn(4, 16, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    target = torch.randn(50, 8)
    out = low_rank.LoraLinear.apply(x, W, None, A, B, 0.3, 11, 0.5)
    (out.float() * target).sum().backward()
    kept = dropout.keep_mask(x.shape, 0.3, 11, "cpu").double() * 65536 / (65536 - dropout.threshold(0.3))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, A, B)]
    expected = wide[0] @ W.double().T + 0.5 * (wide[0] * kept) @ wide[1].T @ wide[2].T
    (expected * target.double()).sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert relative(out.double(), expected) < 0.02
    for got, exact in zip((x, A, B), wide):
        assert relative(got.grad.double(), exact.grad) < 0.02


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_one_step_of_autograd_is_what_two_are(p, monkeypatch):
    """Over a plain base; not where hooks gather its weights, where it trains, or computes in another precision."""
    _, ours = lora(p)
    base = ours.train().base_model.model.first.base_layer
    x, target = torch.randn(4, 5, WIDTHS[0]), torch.randn(4, 5, WIDTHS[0])
    found, calls = [], []
    for hooked in (False, True):
        monkeypatch.setattr(low_rank, "draw_seed", iter(range(9)).__next__)
        ours.zero_grad()
        found.append(gradients(ours, x, target))
        assert low_rank.is_plain(base, x) is not hooked
        assert grad_fns(found[-1][0]).count("LoraLinearBackward") == (1 if hooked else 2)
        base.register_forward_hook(lambda *_: calls.append(1))
    assert len(calls) == 1
    torch.testing.assert_close(*found)
    base._forward_hooks.clear()
    assert low_rank.is_plain(base, x) and not low_rank.is_plain(base, x.bfloat16())
    base.weight.requires_grad_()
    assert not low_rank.is_plain(base, x)


def grad_fns(out) -> list[str]:
    """The names of the steps of autograd behind a tensor."""
    steps, names = [out.grad_fn], []
    while steps:
        step = steps.pop()
        names.append(type(step).__name__)
        steps += [following for following, _ in step.next_functions if following]
    return names


def test_masks_are_fair_and_no_two_seeds_alike():
    one, other = (dropout.keep_mask((400, 1001), 0.05, seed, "cpu").double() for seed in (1, 2))
    assert abs(one.mean() - 0.95) < 0.002  # five times the deviation of 400,400 draws
    assert abs((one * other).mean() - 0.95**2) < 0.003
    assert torch.equal(one, dropout.keep_mask((400, 1001), 0.05, 1, "cpu").double())
    lanes = dropout.keep_mask((100_000, 4), 0.5, 3, "cpu").double().mean(0)  # four masks are drawn at once
    assert (lanes - 0.5).abs().max() < 0.01


def test_dropping_keeps_the_expectation_exactly():
    assert dropout.scale_of(0.05) * (65536 - 3277) == 65536  # 0.05 * 65536 = 3276.8
    assert dropout.scale_of(0.99999999) == 65536 and dropout.scale_of(0.0) == 1
    x = torch.randn(8, 8)
    kept = dropout.keep_mask(x.shape, 0.4, 9, "cpu")
    assert 0 < kept.sum() < 64 and torch.equal(dropout.drop(x, 0.4, 9), x * kept)
    inside = x.clone()
    assert dropout.drop(inside, 0.4, 9, out=inside) is inside and torch.equal(inside, x * kept)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_draws_the_same_mask(reentrant):
    _, ours = lora(p=0.4)
    x, target = torch.randn(6, WIDTHS[0]), torch.randn(6, WIDTHS[0])

    def with_seed(model):
        torch.manual_seed(11)
        ours.zero_grad()
        return gradients(model, x, target)

    plain = with_seed(ours)
    plain = plain[0], {name: grad.clone() for name, grad in plain[1].items()}, plain[2]

    class Recomputed(nn.Module):
        def named_parameters(self):
            return ours.named_parameters()

        def forward(self, x):
            return checkpoint(ours, x, use_reentrant=reentrant)

    again = with_seed(Recomputed())
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[2], again[2])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


def test_what_is_kept_for_the_backward_pass():
    """Of each layer: its input once, for base layer and adapter together, and r numbers a token; no mask, no copy."""
    _, ours = lora(p=0.05, dtype=torch.bfloat16)
    weights = {p.data_ptr() for p in ours.parameters()}
    tokens, kept = 1000, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() > 200 * 80 * 2:  # neither a weight nor its cast
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(tokens, WIDTHS[0], dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    out.float().sum().backward()
    tanh_is_the_second_input = WIDTHS[1]
    small = 2 * 8 * tokens * 2  # two layers' x A^T: below the bound above, as they are 16,000 bytes each
    assert small / 2 < 200 * 80 * 2
    assert sum(kept.values()) == tokens * 2 * (WIDTHS[0] + tanh_is_the_second_input)


def test_unusual_adapters_stay_with_peft():
    for settings in ({"use_dora": True}, {"lora_bias": True}):
        theirs, ours = lora(**settings)
        x = torch.randn(3, WIDTHS[0])
        torch.testing.assert_close(ours(x), theirs(x))
    theirs, ours = lora()
    x = torch.randn(3, WIDTHS[0])
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
    theirs.merge_adapter(), ours.merge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()))


def test_evaluation_draws_nothing():
    _, ours = lora(p=0.5)
    state = torch.get_rng_state()
    ours.eval()(torch.randn(3, WIDTHS[0], generator=torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())


INTERPRETED = """
import torch
from finetune.lora.dropout_kernel import BLOCK, drop_on_gpu
for shape in ((3, 5), (2 * BLOCK + 1, 11), (8 * BLOCK,), (0, 4)):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape).to(dtype) + 10
        once, again, other = (drop_on_gpu(x, 13107, seed, torch.empty_like(x)) for seed in (1, 1, 2))
        assert torch.equal(once, again)
        assert torch.equal(once, torch.where(once == 0, once, x))
        inside = x.clone()
        assert torch.equal(drop_on_gpu(inside, 13107, 1, inside), once)
        onto = torch.full_like(x, 3)
        step = 2**-7 if dtype == torch.bfloat16 else 0  # which the interpreter rounds towards zero
        torch.testing.assert_close(drop_on_gpu(x, 13107, 1, onto, add=True), once + 3, rtol=step, atol=0)
        if x.numel() > 1000:
            kept = [(y != 0).double() for y in (once, other)]
            assert abs(kept[0].mean() - 0.8) < 0.03 and abs((kept[0] * kept[1]).mean() - 0.64) < 0.04
x = torch.ones(64 * 8 * BLOCK)
stretches = drop_on_gpu(x, 32768, 7, torch.empty_like(x)).view(64, 8, BLOCK).mean((0, 2))
assert (stretches - 0.5).abs().max() < 0.02, stretches  # of 32768 draws each
print("alike")
"""


def test_the_kernel_in_tritons_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "alike\n", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    assert dropout.has_kernel(x)
    once, again, other = (dropout.drop(x, 0.05, seed) for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)
    kept = (once != 0) | (x == 0)
    assert torch.equal(once, torch.where(kept, x, torch.zeros_like(x)))
    assert abs(kept.double().mean().item() - 0.95) < 1e-3
