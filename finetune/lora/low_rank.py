"""LoRA's layers (Hu et al., 2022) without the copies that peft's forward makes: y = base(x) + s dropout(x) A^T B^T.

Storage, files, merging and everything unusual (DoRA, several adapters, mixed batches) stay peft's. What differs in the usual
case: x is read in the precision of the pass, instead of a copy in float32; the product with B is added to the base layer's
output where that lies, in one matrix product; and dropout keeps no mask. Over a plain linear layer all of it is one step of
autograd (LoraLinear), over others two. For the backward pass there are kept x, which the base layer or its neighbours keep anyway, and
x A^T, of r numbers a token.

Shapes: N tokens (rows), I input and O output features, r the rank.
"""

import functools

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..compat import on_peft, on_torch
from .dropout import draw_seed, drop, scale_of


class Down(nn.Linear):
    """lora_A: (..., I) -> (..., r), with dropout on its input."""

    def forward(self, x, p: float = 0.0):
        if p == 0.0:
            return super().forward(x)
        return DroppedProduct.apply(x, self.weight.to(x.dtype), p, draw_seed())


class Up(nn.Linear):
    """lora_B: (..., r) -> (..., O); added, `scaling` fold, to `out` in place where one is given."""

    def forward(self, low, out=None, scaling: float = 1.0):
        if out is None:
            return super().forward(low)
        if out.dtype != low.dtype:  # a base that computes in a precision of its own
            return out + super().forward(low).to(out.dtype) * scaling
        return AddedProduct.apply(out, low, self.weight.to(low.dtype), scaling)


class DroppedProduct(torch.autograd.Function):
    """dropout(x) A^T for x (N, I), A (r, I). The mask is drawn again in the backward pass."""

    @staticmethod
    def forward(ctx, x, A, p, seed):
        x = x.contiguous()  # as its gradient will be: the kernel and torch, which does the rest, draw masks of their own
        ctx.save_for_backward(x, A)
        ctx.p, ctx.seed = p, seed
        return (drop(x, p, seed) @ A.T).mul_(scale_of(p))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, A = ctx.saved_tensors
        grad_x = grad_A = None
        gradient = gradient * scale_of(ctx.p)
        if ctx.needs_input_grad[1]:
            grad_A = gradient.T @ drop(x, ctx.p, ctx.seed)
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ A
            drop(grad_x, ctx.p, ctx.seed, out=grad_x)
        return grad_x, grad_A, None, None


class AddedProduct(torch.autograd.Function):
    """out + s low B^T for out (N, O), low (N, r), B (O, r). In place: `out` must not be used elsewhere.

    But not where `out` is a view, over which autograd would copy gradients.
    """

    @staticmethod
    def forward(ctx, out, low, B, scaling):
        ctx.save_for_backward(low, B)
        ctx.scaling = scaling
        if on_torch.is_view(out):
            return out.addmm(low, B.T, alpha=scaling)
        ctx.mark_dirty(out)
        return out.addmm_(low, B.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        low, B = ctx.saved_tensors
        grad_low = grad_B = None
        if ctx.needs_input_grad[1]:
            grad_low = (gradient @ B).mul_(ctx.scaling)
        if ctx.needs_input_grad[2]:
            grad_B = (gradient.T @ low).mul_(ctx.scaling)
        return gradient, grad_low, grad_B, None


class LoraLinear(torch.autograd.Function):
    """x W^T + bias + s dropout(x) A^T B^T for x (N, I), W (O, I) frozen, A (r, I), B (O, r): the gradient of x is added up in one place."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, p, seed, scaling):
        x = x.contiguous()  # as its gradient will be, see DroppedProduct
        ctx.dtypes, ctx.p, ctx.seed, ctx.scaling = (A.dtype, B.dtype), p, seed, scaling * scale_of(p)
        A, B = A.to(x.dtype), B.to(x.dtype)
        low = (drop(x, p, seed) if p else x) @ A.T
        low.mul_(ctx.scaling)
        ctx.save_for_backward(x, W, A, B, low)
        return nn.functional.linear(x, W, bias).addmm_(low, B.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, W, A, B, low = ctx.saved_tensors
        p, seed, grad_x, grad_A, grad_B = ctx.p, ctx.seed, None, None, None
        grad_low = (gradient @ B).mul_(ctx.scaling)
        if ctx.needs_input_grad[3]:
            grad_A = (grad_low.T @ (drop(x, p, seed) if p else x)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            grad_B = (gradient.T @ low).to(ctx.dtypes[1])
        if ctx.needs_input_grad[0]:
            grad_x = nn.functional.linear(gradient, W.T)  # by that name, a profile knows the frozen product
            if p:
                drop(grad_low @ A, p, seed, out=grad_x, add=True)
            else:
                grad_x.addmm_(grad_low, A)
        return grad_x, None, None, grad_A, grad_B, None, None, None


def is_plain(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a base layer's weight may be read without calling the layer: a plain frozen nn.Linear in x's type, without hooks."""
    if type(layer) is not nn.Linear or on_torch.has_forward_hooks(layer):
        return False
    if type(layer.weight) is not nn.Parameter or layer.weight.dtype != x.dtype:
        return False
    return not any(parameter.requires_grad for parameter in layer.parameters())


def autocasts(x) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def in_pass_dtype(x):
    """x in what the pass computes in: autocast's type, or its own."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) else x


class FusedLora:
    """Mixin that overrides the forward of a peft LoRA layer."""

    def forward(self, x, *args, **kwargs):
        adapter = self.usual_adapter(x, args, kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        # once, for base layer and adapter; rows, because a matrix product of more dimensions returns a view
        x_NI = in_pass_dtype(x).reshape(-1, x.shape[-1])
        dropout = self.lora_dropout[adapter]
        p = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        if is_plain(base := self.base_layer, x_NI):
            A, B, seed = self.lora_A[adapter].weight, self.lora_B[adapter].weight, draw_seed() if p else 0
            out = LoraLinear.apply(x_NI, base.weight, base.bias, A, B, p, seed, self.scaling[adapter])
            return out.unflatten(0, x.shape[:-1])
        out = base(x_NI)
        low_NR = self.lora_A[adapter](x_NI, p)
        out = self.lora_B[adapter](low_NR, out, self.scaling[adapter])
        return out.unflatten(0, x.shape[:-1])

    def usual_adapter(self, x, args, kwargs) -> str | None:
        """The one adapter at work, where nothing about it is unusual."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or not isinstance(self.lora_A[name], Down):
            return None
        # without autocast, a base in another precision than its adapter is peft's to reconcile
        return name if autocasts(x) or x.dtype == self.lora_A[name].weight.dtype else None


@functools.cache
def fused(cls):
    """A LoRA layer's class with FusedLora in front, under its own name."""
    return type(cls.__name__, (FusedLora, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def install(model) -> None:
    """Turns the LoRA layers that peft put into `model` into ours. Without any, nothing happens."""
    on_peft.check_names()
    for layer in list(model.modules()):
        if not on_peft.is_lora_linear(layer):
            continue
        for down, up in zip(layer.lora_A.values(), layer.lora_B.values()):
            if type(down) is nn.Linear and type(up) is nn.Linear and up.bias is None:
                down.__class__, up.__class__ = Down, Up
        layer.__class__ = fused(type(layer))
