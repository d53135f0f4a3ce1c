"""RMSNorm, rotary embedding and the MLP's gate, each as one step of autograd that keeps only what it cannot do without.

Left to autograd, they keep float32 copies, activated gates and rotated copies of queries and keys: as much memory as all linear
layers' inputs together. The same calls serve every device; on CUDA, Triton's kernels do the arithmetic (fused_kernels.py), elsewhere
plain torch, with the same roundings. What is kept for the backward pass is the same either way.

Shapes: B batch, T tokens, H hidden size, N heads, D head size, F MLP width; cos and sin are (B or 1, 1, T, D) in float32.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from .on_triton import switched_off, why_no_triton


def describe_kernels(device: torch.device) -> str:
    """What computes norms, rotary embedding, gate and the head's softmax, for people."""
    why = why_no_triton(torch.device(device))
    if why:
        return f"plain torch ({why})"
    return f"Triton, but for {', '.join(switched_off)}" if switched_off else "Triton"


# ---- RMSNorm


def rms_norm(x, weight, eps: float):
    """x / rms(x) in float32, rounded to x's type, times the weight (Zhang and Sennrich, 2019). x (..., H), weight (H,)."""
    return RMSNorm.apply(x, weight, eps)


class RMSNorm(torch.autograd.Function):
    """Keeps x, which the residual stream keeps anyway, and 1 / rms(x), a number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        if why_no_triton(x.device, "norm"):
            inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
            out = (x.float() * inverse).to(x.dtype) * weight.to(x.dtype)
        else:
            from .fused_kernels import rms_norm_forward

            out, inverse = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """With n = x / rms, g = gradient * weight:  dx = (g - n mean(g n)) / rms,  dweight = sum gradient * n."""
        x, weight, inverse = ctx.saved_tensors
        if not why_no_triton(x.device, "norm"):
            from .fused_kernels import rms_norm_backward

            return *rms_norm_backward(gradient, x, weight, inverse, ctx.needs_input_grad[1]), None
        normed, gradient = x.float() * inverse, gradient.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            gradient = gradient * weight.float()
            grad_x = gradient.addcmul_(normed, -(gradient * normed).mean(-1, keepdim=True)).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None


# ---- rotary embedding


def rotated_heads(qkv_BTF, cos, sin, head_dim: int):
    """(B, T, 3 N D) -> query, key, value (B, N, T, D), of which query and key are rotated, in float32 and back.

    In place: the three lie in qkv_BTF's memory, whose content is theirs from here on. Only for a qkv_BTF that nothing reads
    afterwards, as what a linear layer returns. Where the operation before needs its result for its own backward pass (an
    activation does), autograd raises an error there: all share one version counter.
    """
    return RotatedHeads.apply(qkv_BTF, cos, sin, head_dim)


class RotatedHeads(torch.autograd.Function):
    """Keeps cos and sin, which all layers share."""

    @staticmethod
    def forward(ctx, qkv_BTF, cos, sin, head_dim):
        ctx.save_for_backward(cos, sin)
        # Not mark_dirty, which a view with several outputs may not have, as the output of a quantized layer can be.
        qkv = qkv_BTF.detach().contiguous().unflatten(-1, (3, -1, head_dim))
        query_and_key = qkv[:, :, :2].flatten(2, 3).transpose(1, 2)  # (B, 2N, T, D), no copy: they lie side by side
        apply_rotary(query_and_key, cos, sin, 1.0, out=query_and_key)
        return tuple(part.transpose(1, 2) for part in qkv.unbind(2))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        """The inverse rotation is that by the negative angle; all three gradients go to one tensor, as qkv was one."""
        cos, sin = ctx.saved_tensors
        B, N, T, D = gradients[0].shape
        grad_qkv = gradients[0].new_empty((B, T, 3, N, D))
        for i, gradient in enumerate(gradients):
            into = grad_qkv[:, :, i].transpose(1, 2)
            if i < 2:
                apply_rotary(gradient, cos, sin, -1.0, out=into)
            else:
                into.copy_(gradient)
        return grad_qkv.flatten(2), None, None, None


def apply_rotary(x, cos, sin, sign: float, out) -> None:
    """out = x turned by sign times the angles; x, out (B, N, T, D), the same tensor possibly."""
    if not why_no_triton(x.device, "rotary"):
        from .fused_kernels import turn_heads

        turn_heads(x, cos, sin, sign, out)
        if not out.is_inference():  # torch does not see what a kernel writes
            torch.autograd.graph.increment_version(out)
        return
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half] * sign  # both halves have the same angles
    # In float32 where the result belongs, else in a copy: fresh memory costs a CPU more than the arithmetic does.
    wide = out.copy_(x) if out.dtype == torch.float32 else x.to(torch.float32, copy=True)
    left, right = wide[..., :half], wide[..., half:]
    from_left = left * sin
    left.mul_(cos).sub_(right * sin)
    right.mul_(cos).add_(from_left)
    if wide is not out:
        out.copy_(wide)


# ---- the gate


def gated(up, gate):
    """up * silu(gate) (Shazeer, 2020), silu rounded to the type before the product; (..., F) each."""
    return Gated.apply(up, gate)


class Gated(torch.autograd.Function):
    """Keeps up and gate; what silu gave is computed again."""

    @staticmethod
    def forward(ctx, up, gate):
        ctx.save_for_backward(up, gate)
        if why_no_triton(up.device, "gate"):
            return silu(gate).mul_(up)
        from .fused_kernels import gated_forward

        return gated_forward(up, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        up, gate = ctx.saved_tensors
        if why_no_triton(up.device, "gate"):
            product = gradient * up  # whose memory the result takes: fresh memory is dear on a CPU
            grad_gate = torch.ops.aten.silu_backward(product, gate, grad_input=product)
            return silu(gate).mul_(gradient), grad_gate
        from .fused_kernels import gated_backward

        return gated_backward(gradient, up, gate)
