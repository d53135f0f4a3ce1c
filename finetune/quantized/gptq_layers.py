"""GPTQ layers to train over (Frantar et al., 2023), on gptqmodel's, which is imported here: import this file only when needed.

What differs from gptqmodel's own layers: a pass keeps no unpacked weight for the backward pass (over all layers that would be
the 16-bit model, in the memory of activations), scales stay in the precision that they were stored in, and on a GPU one
kernel of ours (gptq_kernel.py) unpacks; elsewhere, and numbers of 3 bits, gptqmodel does.

Shapes: N tokens, I input and O output features of a layer; unpacked weights are (I, O).
"""

from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from torch import nn

from qwen_model.on_triton import why_no_triton

from ..folders.shards import Shards


def settings(quantization) -> dict:
    """A quantization_config for transformers that asks for the layers which can be trained over."""
    return {
        "quant_method": "gptq",
        "bits": quantization.bits,
        "group_size": quantization.group_size,
        "sym": quantization.symmetric,
        "desc_act": quantization.desc_act,
        "act_group_aware": False,  # of quantizing only, and not allowed beside desc_act
        "checkpoint_format": quantization.format,
        "backend": "gptq_torch",
    }


class Unpacked(torch.autograd.Function):
    """x (N, I) times a layer's weight (I, O), unpacked once for each pass, forward and backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.input_dtype = layer, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x @ layer.unpack(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return (gradient @ ctx.layer.unpack(gradient.dtype).T).to(ctx.input_dtype), None


class FrozenLinear(TorchLinear):
    """gptqmodel's layer, frozen. Loaded ones are given this class by adjust().

    pass_dtype: of the passes, and so of adapters that are loaded to be used.
    """

    @property
    def weight(self):
        """(O, I), for those who ask for its type, place and shape: there are no values, and no memory."""
        nothing = torch.full((), torch.nan, dtype=self.pass_dtype, device=self.qweight.device)
        return nothing.expand(self.out_features, self.in_features)

    def unpack(self, dtype: torch.dtype):
        """The weight (I, O), unpacked in the precision of its scales."""
        with torch.no_grad():
            if self.bits != 3 and not why_no_triton(self.qweight.device, "gptq"):
                from .gptq_kernel import unpack

                return unpack(self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, dtype)
            return self.dequantize_weight().to(dtype)

    def forward(self, x):
        if x.ndim != 2:
            return self.forward(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)
        out = Unpacked.apply(x, self)  # of rows no view: what is added to it (LoRA's share) is added in its place
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def train(self, mode: bool = True):
        """Stays as for evaluation: gptqmodel's unpacking of 2, 4 and 8 bits is slower in layers in training."""
        return self

    def _apply(self, fn, recurse=True):
        """model.half() and the like, which engines call, leave the scales alone: bfloat16 would round them."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


def adjust(model, folder: Path, info: dict):
    """Makes what from_pretrained returned with its loading info ready to train over; RuntimeError if tensors are missing."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise RuntimeError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    model.__dict__.pop("hf_device_map", None)  # one device: nothing that a trainer would have to heed
    quantized = layers(model)
    for layer in quantized.values():
        layer.__class__ = FrozenLinear
        layer.__dict__.pop("dequantize_weight", None)  # torch.compile's, minutes for what a kernel does on GPUs anyway
        nn.Module.train(layer, False)
        layer.pass_dtype = model.dtype
        if model.dtype == torch.float32:
            layer.scales = layer.scales.float()
    add_biases(quantized, folder, set(info["unexpected_keys"]))
    return model


def layers(model) -> dict[str, TorchLinear]:
    """The quantized layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TorchLinear)}


def add_biases(quantized: dict, folder: Path, unexpected: set[str]) -> None:
    """The biases that published folders have on layers where the 16-bit model has none. Zeros are left out: they add nothing."""
    wanted = {f"{name}.bias": layer for name, layer in quantized.items() if f"{name}.bias" in unexpected}
    if not wanted:
        return
    with Shards(folder) as shards:
        for name, layer in wanted.items():
            bias = shards[name]
            if not bias.any():
                continue
            del layer.bias  # None so far, a plain attribute
            layer.register_buffer("bias", bias.to(layer.qweight.device))
