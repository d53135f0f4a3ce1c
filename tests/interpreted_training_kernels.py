"""The kernels of training against plain torch, in Triton's interpreter: test_fused.py runs this file with TRITON_INTERPRET=1.

Prints "alike". In a process of its own, as the interpreter is chosen when triton is imported.
"""

import contextlib
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent / "qwen_model")]

import test_fused as t  # noqa: E402

from qwen_model import fused, head_loss_kernels, on_triton  # noqa: E402
from qwen_model import fused_kernels as k  # noqa: E402

obstacle = fused.why_no_triton
devices = []  # that are current


@contextlib.contextmanager
def on(x):
    devices.append(x.device)
    yield
    devices.pop()


class Guarded:
    """A kernel that is launched on a tensor's device only."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert devices, self.kernel
        return self.kernel[grid]


assert on_triton.failure(torch.device("cpu")) == ""  # to the interpreter, the CPU will do
for module in (k, head_loss_kernels):
    module.on = on
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Guarded(getattr(module, name)))


def both(call):
    fused.why_no_triton = lambda device, kernel="": "plain torch is asked for"
    want = call()
    fused.why_no_triton = lambda device, kernel="": ""
    got = call()
    fused.why_no_triton = obstacle
    return got, want


def same(call, dtype):
    got, want = both(call)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, (one.dtype, other.dtype)
        scale = other.abs().max().clamp_min(1)
        torch.testing.assert_close(one.double() / scale, other.double() / scale, rtol=t.HALF[dtype], atol=t.HALF[dtype])


def with_gradients(call, *inputs):
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = call(*(x * 1 for x in leaves))
    out = out if isinstance(out, tuple) else (out,)
    sum((one.float() * t.random(*one.shape, seed=7 + i)).sum() for i, one in enumerate(out)).backward()
    return *out, *(x.grad for x in leaves)


k.PROGRAMS = 4  # so that a program has several rows, and the last has fewer
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for H in (64, 100, 1024):
        x, weight = t.random(2, 7, H, dtype=dtype), t.random(H, dtype=dtype, seed=1)
        same(lambda: with_gradients(lambda x, w: fused.rms_norm(x, w, 1e-6), x, weight), dtype)
        same(lambda: with_gradients(lambda x: fused.rms_norm(x, weight, 1e-6), x), dtype)  # frozen
    wide = t.random(48)
    same(lambda: with_gradients(lambda x: fused.rms_norm(x, wide, 1e-6), t.random(3, 48, dtype=dtype)), dtype)
    for D in (64, 128):
        for N in (1, 3, 18):
            for B in (1, 2):
                cos, sin = t.angles(B, 5, D)
                qkv = t.random(2, 5, 3 * N * D, dtype=dtype)
                same(lambda: with_gradients(lambda x: fused.rotated_heads(x, cos, sin, D), qkv), dtype)
    head_loss_kernels.exponentials(t.random(3, 70, dtype=dtype), torch.tensor([0, 5, 69]))  # its launch; see test_head_loss.py
    for F in (3, 640, 1024):
        up, gate = (t.random(2, 3, F, dtype=dtype, seed=i) * 3 for i in (1, 2))
        same(lambda: with_gradients(fused.gated, up, gate), dtype)
cos, sin = t.angles(1, 5, 64)
fused.why_no_triton = lambda device, kernel="": ""
heads = fused.rotated_heads(t.random(1, 5, 3 * 64).requires_grad_().tanh(), cos, sin, 64)
try:
    sum(x.sum() for x in heads).backward()
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error), error
    print("alike")
