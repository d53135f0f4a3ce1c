"""The Triton kernels of fused.py. All compute in float32 and round where plain torch rounds.

Each reads its tensors once and writes its results once: they are bound by memory, and that is the least it takes. The gradient of
a norm's weight is added up by a fixed number of programs, each over its own rows, so that it is the same every time.

do_not_specialize: Triton compiles anew for a number that is 1 or a multiple of 16, which nothing here gains by; with rows of ever
other lengths that would be in mid-run.
"""

import torch

from .on_triton import jit, on, tl, triton

BLOCK = 1024  # elements of a program of the gate
PROGRAMS = 512  # that add up a weight's gradient
HEADS = 16  # of a program of the rotary embedding


def warps(size: int) -> int:
    """For a program that holds a row of so many elements."""
    return 1 if size <= 256 else 4 if size <= 2048 else 8 if size <= 8192 else 16


# ---- RMSNorm


@jit
def rms_norm_forward_kernel(x, weight, out, inverse, eps, H, BLOCK_H: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    value = tl.load(x + row * H + h, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    inv = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / H + eps)
    normed = (wide * inv).to(value.dtype)
    w = tl.load(weight + h, mask=inside, other=0.0).to(value.dtype)
    product = (normed.to(tl.float32) * w.to(tl.float32)).to(value.dtype)
    tl.store(out + row * H + h, product, mask=inside)
    tl.store(inverse + row, inv)


@jit(do_not_specialize=["rows", "rows_each"])
def rms_norm_backward_kernel(
    gradient, x, weight, inverse, grad_x, grad_weight, rows, rows_each, H, HAS_WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """rows_each rows; grad_weight (programs, H): their share."""
    program = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    w = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK_H,), tl.float32)
    for i in range(0, rows_each):
        row = program * rows_each + i
        at, real = row * H + h, inside & (row < rows)
        g = tl.load(gradient + at, mask=real, other=0.0).to(tl.float32)
        inv = tl.load(inverse + row, mask=row < rows, other=0.0)
        value = tl.load(x + at, mask=real, other=0.0)
        normed = value.to(tl.float32) * inv
        if HAS_WEIGHT:
            share += g * normed
        g = g * w
        result = (g - normed * (tl.sum(g * normed, 0) / H)) * inv
        tl.store(grad_x + at, result.to(value.dtype), mask=real)
    if HAS_WEIGHT:
        tl.store(grad_weight + program * H + h, share, mask=inside)


def rms_norm_forward(x, weight, eps: float):
    """(the normed x, 1 / rms (..., 1) in float32)"""
    x, H = x.contiguous(), x.shape[-1]
    out, inverse = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rows, block = inverse.numel(), triton.next_power_of_2(H)
    if rows:
        with on(x):
            rms_norm_forward_kernel[(rows,)](x, weight, out, inverse, eps, H, BLOCK_H=block, num_warps=warps(block))
    return out, inverse


def rms_norm_backward(gradient, x, weight, inverse, for_weight: bool):
    """(the gradient of x, that of the weight or None)"""
    x, gradient, H = x.contiguous(), gradient.contiguous(), x.shape[-1]
    rows, block = inverse.numel(), triton.next_power_of_2(H)
    rows_each = triton.cdiv(rows, PROGRAMS) if for_weight else 1
    programs = triton.cdiv(rows, rows_each) if rows else 0
    grad_x = torch.empty_like(x)
    shares = x.new_empty((programs if for_weight else 1, H), dtype=torch.float32)
    if rows:
        with on(x):
            rms_norm_backward_kernel[(programs,)](
                gradient, x, weight, inverse, grad_x, shares, rows, rows_each, H,
                HAS_WEIGHT=for_weight, BLOCK_H=block, num_warps=warps(block),
            )  # fmt: skip
    return grad_x, shares[:programs].sum(0).to(weight.dtype) if for_weight else None


# ---- rotary embedding


@jit(do_not_specialize=["T"])
def turn_kernel(
    x, out, cos, sin, sign, N, T, x_b, x_n, x_t, out_b, out_n, out_t, angles_b,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token. Strides in elements; the D of a head lie one behind the other."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    inside = n < N
    angles = b * angles_b + t * (2 * HALF) + d
    c, s = tl.load(cos + angles), tl.load(sin + angles) * sign
    source = x + b * x_b + n.to(tl.int64) * x_n + t * x_t + d
    into = out + b * out_b + n.to(tl.int64) * out_n + t * out_t + d
    left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(into, left * c - right * s, mask=inside)
    tl.store(into + HALF, right * c + left * s, mask=inside)


def turn_heads(x, cos, sin, sign: float, out) -> None:
    """See fused.apply_rotary. A head size whose half is no power of two is not Qwen's."""
    B, N, T, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    if x.numel():
        with on(x):
            turn_kernel[(T, B, triton.cdiv(N, HEADS))](
                x, out, cos, sin, sign, N, T, *x.stride()[:3], *out.stride()[:3],
                cos.stride(0) if cos.shape[0] > 1 else 0, HALF=D // 2, HEADS=HEADS,
            )  # fmt: skip


# ---- the gate


@jit
def gated_forward_kernel(up, gate, out, count, BLOCK: tl.constexpr):
    """BLOCK elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    u, g = tl.load(up + at, mask=inside, other=0.0), tl.load(gate + at, mask=inside, other=0.0)
    wide = g.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(u.dtype)
    tl.store(out + at, u.to(tl.float32) * activated.to(tl.float32), mask=inside)


@jit
def gated_backward_kernel(gradient, up, gate, grad_up, grad_gate, count, BLOCK: tl.constexpr):
    """d up = gradient silu(gate), d gate = gradient up silu'(gate), with silu' = s (1 + gate (1 - s)), s = sigmoid(gate)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(grad_up + at, d * g * s, mask=inside)
    tl.store(grad_gate + at, d * u * s * (1.0 + g * (1.0 - s)), mask=inside)


def gated_forward(up, gate):
    """up * silu(gate)"""
    up, gate = up.contiguous(), gate.contiguous()
    out, count = torch.empty_like(up), up.numel()
    if count:
        with on(up):
            gated_forward_kernel[(triton.cdiv(count, BLOCK),)](up, gate, out, count, BLOCK=BLOCK)
    return out


def gated_backward(gradient, up, gate):
    """(the gradient of up, that of gate)"""
    gradient, up, gate = gradient.contiguous(), up.contiguous(), gate.contiguous()
    grad_up, grad_gate, count = torch.empty_like(up), torch.empty_like(gate), up.numel()
    if count:
        with on(up):
            gated_backward_kernel[(triton.cdiv(count, BLOCK),)](
                gradient, up, gate, grad_up, grad_gate, count, BLOCK=BLOCK
            )  # fmt: skip
    return grad_up, grad_gate
