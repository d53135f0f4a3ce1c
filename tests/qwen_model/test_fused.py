"""Norm, rotary embedding and gate: values and gradients against formulas in float64, what is kept, and the kernels."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from qwen_model import on_triton
from qwen_model.fused import describe_kernels, gated, rms_norm, rotated_heads

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


# ---- as autograd does the formulas, bit for bit


def norm_formula(x, weight):
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    return normed.to(x.dtype) * weight


def heads_formula(qkv, cos, sin, D):
    query, key, value = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in qkv.chunk(3, -1))

    def rotated(x):
        wide = x.float()
        left, right = wide.chunk(2, -1)
        return (wide * cos + torch.cat((-right, left), -1) * sin).to(x.dtype)

    return rotated(query), rotated(key), value


@pytest.mark.parametrize("dtype", HALF)
def test_values_are_the_formulas_to_the_bit(dtype):
    x, weight, gate = (random(3, 5, 96, dtype=dtype, seed=i) * 3 for i in range(3))
    assert torch.equal(rms_norm(x, weight[0, 0], 1e-6), norm_formula(x, weight[0, 0]))
    assert torch.equal(gated(x, gate), x * silu(gate))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("B", [1, 2])
def test_rotation_and_its_gradient_are_the_formula_to_the_bit(dtype, B):
    (cos, sin), leaves = angles(B, 7, 16), [random(2, 7, 3 * 48, dtype=dtype).requires_grad_() for _ in range(2)]
    got, want = rotated_heads(leaves[0] * 1, cos, sin, 16), heads_formula(leaves[1] * 1, cos, sin, 16)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    # as attention gives them: laid out token by token, and none of them fresh
    gradients = [random(2, 7, 3, 16, dtype=dtype, seed=i).transpose(1, 2) for i in (1, 2, 3)]
    before = [one.clone() for one in gradients]
    for heads in (got, want):
        torch.autograd.backward(heads, gradients)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert all(torch.equal(one, other) for one, other in zip(gradients, before))


# ---- in place, where autograd allows it


def test_a_result_that_is_needed_again_is_not_rotated_in_silence():
    """tanh's backward reads its result."""
    heads = rotated_heads(random(1, 5, 96).requires_grad_().tanh(), *angles(1, 5, 16), 16)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(x.sum() for x in heads).backward()


def test_a_projection_that_is_hooked_or_gives_a_view():
    """As quantized layers reshape their result, and as users hook c_attn."""
    (cos, sin), gradients = angles(1, 5, 16), []
    hooked = torch.nn.Linear(8, 96)
    hooked.register_full_backward_hook(lambda *_: None)
    for project in (hooked, lambda x: torch.nn.functional.linear(x[0], hooked.weight, hooked.bias).view(1, 5, 96)):
        x = random(1, 5, 8).requires_grad_()
        heads = rotated_heads(project(x), cos, sin, 16)
        torch.autograd.backward(heads, [random(1, 2, 5, 16, seed=i) for i in range(3)])
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_inference(grad_mode):
    qkv, (cos, sin) = random(1, 5, 96), angles(1, 5, 16)
    with grad_mode():
        got = rotated_heads(qkv * 1, cos, sin, 16)
    assert all(torch.equal(one, other) for one, other in zip(got, heads_formula(qkv, cos, sin, 16)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_computed_again_in_the_backward_pass(use_reentrant):
    (cos, sin), weight = angles(1, 5, 16), random(32).requires_grad_()
    projection = torch.nn.Linear(32, 96)

    def layer(x):
        query, key, value = rotated_heads(projection(rms_norm(x, weight, 1e-6)), cos, sin, 16)
        return gated(query + key, value)

    found = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        x, weight.grad = random(1, 5, 32).requires_grad_(), None
        call(x).square().sum().backward()
        found.append((x.grad, weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found))


# ---- who computes


def test_who_computes_is_said():
    assert describe_kernels("cpu") == "plain torch (no CUDA device)"


@pytest.fixture
def a_gpu(monkeypatch):
    """What decides, and remembers nothing, on a machine with an H100."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return on_triton.obstacle_found.__wrapped__


def test_where_triton_does_not_work_plain_torch_does(a_gpu, monkeypatch, caplog):
    """It compiles with the machine's C compiler, which the smaller CUDA images do not have."""

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: zeros(*sizes))
    monkeypatch.setattr(on_triton, "trial_kernel", Broken())
    why = "triton does not work here: RuntimeError: Failed to find C compiler."
    assert a_gpu(torch.device("cuda", 0)) == why
    assert "plain torch instead of the kernels: triton does not work here (RuntimeError: Failed to find" in caplog.text


def test_where_it_works_the_kernels_run(a_gpu, monkeypatch):
    monkeypatch.setattr(on_triton, "failure", lambda device: "")
    assert a_gpu(torch.device("cuda", 0)) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "sm_80" in a_gpu(torch.device("cuda", 0))


def test_torch_compile_traces_no_trial(a_gpu, monkeypatch):
    monkeypatch.setattr(on_triton, "failure", lambda device: pytest.fail("a kernel was launched"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert on_triton.why_no_triton(torch.device("cuda", 0)) == ""
    assert on_triton.why_no_triton(torch.device("cpu")) == "no CUDA device"


def test_torch_compile_takes_the_operations_in_one_graph_and_warns_of_nothing():
    """With backend "eager", which needs no C compiler."""
    x, weight = random(2, 5, 48), random(48)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        whole = torch.compile(lambda x: gated(rms_norm(x, weight, 1e-6), x), backend="eager", fullgraph=True)
        close(whole(x), gated(rms_norm(x, weight, 1e-6), x).double(), torch.float32)


# ---- the kernels

def test_the_kernels_in_tritons_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    here = Path(__file__).parent.parent
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(here / "interpreted_training_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "alike\n", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALF)
def test_the_kernels_on_a_gpu(dtype):
    """At a 7B model's widths, against float64 on the same GPU."""
    assert describe_kernels("cuda") == "Triton"
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


def gradients(call, inputs):
    """Of a random projection of what `call` gives, by its inputs; in float32 or wider."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*(x * 1 for x in leaves))
    out = out if isinstance(out, tuple) else (out,)
    wide = [x if x.dtype == torch.float64 else x.float() for x in out]
    sum((x * random(*x.shape, seed=9 + i).to(x)).sum() for i, x in enumerate(wide)).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALF)
def test_the_kernels_gradients_on_a_gpu(dtype):
    """Rotation and gate, at a 7B model's widths, against float64 on the same GPU."""
    cos, sin = (x.cuda() for x in angles(1, 300, 128))
    qkv = random(1, 300, 3 * 4096).to("cuda", dtype)
    up, gate = (random(300, 11008, seed=i).to("cuda", dtype) for i in (1, 2))
    for call, call64, inputs in [
        (lambda x: rotated_heads(x, cos, sin, 128), lambda x: heads64(x, cos, sin, 128), [qkv]),
        (gated, gate64, [up, gate]),
    ]:
        for one, other in zip(gradients(call, inputs), gradients(call64, [x.double() for x in inputs])):
            scale = other.abs().max()
            close(one / scale, other / scale, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices")
def test_tensors_on_a_gpu_that_is_not_the_current_one():
    x, weight = random(5, 64).to("cuda:1"), random(64).to("cuda:1")
    assert torch.cuda.current_device() == 0
    close(rms_norm(x, weight, 1e-6), norm64(x.double(), weight.double(), 1e-6), torch.float32)
