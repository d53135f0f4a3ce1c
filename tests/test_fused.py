"""Norm, rotary embedding and gate: values and gradients against formulas in float64, what is kept, and the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_model.fused import describe, gated, rms_norm, rotated_heads

HALF = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}  # some roundings


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(B, T, D, seed=3):
    """cos, sin (B, 1, T, D), both halves alike."""
    found = random(B, 1, T, D // 2, seed=seed) * 10
    found = torch.cat((found, found), -1)
    return found.cos(), found.sin()


# ---- in float64, written another way


def norm64(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def heads64(qkv, cos, sin, D):
    """Rotation as a product of complex numbers (Su et al., 2021)."""
    query, key, value = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in qkv.chunk(3, -1))
    turn = torch.complex(cos[..., : D // 2].double(), sin[..., : D // 2].double())

    def rotated(x):
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    return rotated(query), rotated(key), value


def gate64(up, gate):
    return up * gate / (1 + (-gate).exp())


def close(got, expected, dtype):
    torch.testing.assert_close(got.double(), expected.double(), rtol=HALF[dtype] * 2, atol=HALF[dtype] * 2)


def compare(call, call64, inputs, dtype):
    """Values and the gradients of a random projection of them, against float64 from the same (rounded) inputs."""
    narrow = [x.to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    # what works in place must not be a leaf
    got, expected = call(*(x * 1 for x in narrow)), call64(*wide)
    got, expected = (one if isinstance(one, tuple) else (one,) for one in (got, expected))
    weights = [random(*one.shape, seed=9 + i) for i, one in enumerate(expected)]
    sum((one.float() * weight).sum() for one, weight in zip(got, weights)).backward()
    sum((one * weight).sum() for one, weight in zip(expected, weights)).backward()
    for one, other in zip(got, expected):
        assert one.dtype == dtype
        close(one, other, dtype)
    for one, other in zip(narrow, wide):
        scale = other.grad.abs().max().clamp_min(1)
        close(one.grad / scale, other.grad / scale, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_the_norm(dtype):
    compare(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: norm64(x, w, 1e-6), [random(2, 5, 48), random(48)], dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("B", [1, 2])
def test_the_rotary_embedding(dtype, B):
    cos, sin = angles(B, 7, 16)
    qkv = random(2, 7, 3 * 3 * 16)
    compare(lambda x: rotated_heads(x, cos, sin, 16), lambda x: heads64(x, cos, sin, 16), [qkv], dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_the_gate(dtype):
    compare(gated, gate64, [random(2, 5, 40) * 4, random(2, 5, 40, seed=1) * 4], dtype)


def test_a_float32_weight_leaves_half_precision_as_it_is():
    """Full-parameter under autocast: the masters are float32, the residual stream is not."""
    x, weight = random(3, 8, dtype=torch.bfloat16), random(8).requires_grad_()
    out = rms_norm(x, weight, 1e-6)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_frozen_weights_get_no_gradient():
    x, weight = random(3, 8).requires_grad_(), random(8)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is None and x.grad is not None
    trained = random(8).requires_grad_()
    rms_norm(random(3, 8), trained, 1e-6).sum().backward()
    assert trained.grad is not None


def kept(call) -> dict[int, int]:
    """{storage: bytes} that autograd keeps of a call."""
    found, alive = {}, []

    def pack(tensor):
        alive.append(tensor)
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return found


def test_nothing_is_kept_but_inputs():
    dtype = torch.bfloat16
    x, weight = random(100, 64, dtype=dtype).requires_grad_(), random(64, dtype=dtype)
    found = kept(lambda: rms_norm(x, weight, 1e-6))
    assert found.pop(x.data_ptr()) and found.pop(weight.data_ptr()) and list(found.values()) == [100 * 4]
    up, gate = (random(100, 64, dtype=dtype, seed=i).requires_grad_() for i in (1, 2))
    assert kept(lambda: gated(up, gate)).keys() == {up.data_ptr(), gate.data_ptr()}
    (cos, sin), qkv = angles(1, 100, 16), random(1, 100, 3 * 32, dtype=dtype).requires_grad_() * 1
    assert kept(lambda: rotated_heads(qkv, cos, sin, 16)).keys() == {cos.data_ptr(), sin.data_ptr()}


def test_heads_lie_where_the_projection_lay():
    (cos, sin), qkv = angles(1, 5, 16), random(1, 5, 3 * 32)
    value_before = qkv[..., 64:].clone()
    query, key, value = rotated_heads(qkv, cos, sin, 16)
    ends = {x.untyped_storage().data_ptr() for x in (query, key, value)}
    assert ends == {qkv.untyped_storage().data_ptr()}
    assert torch.equal(value.transpose(1, 2).flatten(2), value_before)


def test_who_computes_is_said():
    assert describe("cpu") == "plain torch (no CUDA device)"


# ---- the kernels

INTERPRETED = """
import torch
import test_fused as t
from qwen_model import fused, fused_kernels as k
obstacle = fused.obstacle


def both(call):
    fused.obstacle = lambda device: "plain torch is asked for"
    want = call()
    fused.obstacle = lambda device: ""
    got = call()
    fused.obstacle = obstacle
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
    for F in (3, 640, 1024):
        up, gate = (t.random(2, 3, F, dtype=dtype, seed=i) * 3 for i in (1, 2))
        same(lambda: with_gradients(fused.gated, up, gate), dtype)
print("alike")
"""


def test_the_kernels_in_tritons_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    here = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout == "alike\n", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALF)
def test_the_kernels_on_a_gpu(dtype):
    """At a 7B model's widths, against float64 on the same GPU."""
    assert describe("cuda") == "Triton"
    on_gpu = [x.cuda() for x in (random(1, 300, 4096), random(4096))]
    x, w = (one.to(dtype) for one in on_gpu)
    close(rms_norm(x, w, 1e-6), norm64(x.double(), w.double(), 1e-6), dtype)
    cos, sin = (one.cuda() for one in angles(1, 300, 128))
    qkv = random(1, 300, 3 * 4096).to("cuda", dtype)
    expected = heads64(qkv.double(), cos, sin, 128)
    for got, want in zip(rotated_heads(qkv.clone(), cos, sin, 128), expected):
        close(got, want, dtype)
    up, gate = (random(300, 11008, seed=i).to("cuda", dtype) for i in (1, 2))
    close(gated(up, gate), gate64(up.double(), gate.double()), dtype)
    leaves = [one.clone().requires_grad_() for one in (x, w)]
    wide = [one.detach().double().requires_grad_() for one in (x, w)]
    (rms_norm(*leaves, 1e-6).float() * random(4096).cuda()).sum().backward()
    (norm64(*wide, 1e-6) * random(4096).cuda()).sum().backward()
    for one, other in zip(leaves, wide):
        scale = other.grad.abs().max()
        close(one.grad / scale, other.grad / scale, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_a_gpu(capability, tmp_path):
    """An A100 and an H100; none spills, none asks for more shared memory than the smaller of the two has."""
    program = Path(__file__).parent / "compiled_training_kernels.py"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(program), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 3 * 7, done.stderr[-3000:]
    assert all(int(shared) < 163_000 and spills == "False" for _, _, shared, spills in lines)
