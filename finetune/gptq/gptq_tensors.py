"""The tensors of a GPTQ checkpoint, from a plain checkpoint and what gptqmodel made of its layers.

Shapes as in gptq_format.py: I input and O output features of a layer, G groups of input rows.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

import qwen_model

from ..folders import gptq_format, model_folder, model_writer
from ..folders.shards import Shards

PACKED = "module.safetensors"  # of a folder called as the layer: where gptqmodel leaves what it has finished


def config_of(folder: Path):
    """The model's config, read without code from its folder."""
    qwen_model.register()
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def skeleton(folder: Path):
    """The model on the meta device."""
    return model_writer.skeleton(config_of(folder))


def quantized_layers(skeleton) -> dict[str, nn.Linear]:
    """The layers that are quantized, by name: the linear ones of the blocks."""
    names = tuple(f".{name}" for name in model_folder.block_layers(skeleton.config.model_type))
    return {name: layer for name, layer in skeleton.named_modules() if name.endswith(names)}


def expected_shapes(plain: dict[str, list[int]], layers: Iterable[str], bits: int, group_size: int) -> dict:
    """{name: shape} of the quantized checkpoint. plain: of the 16-bit one."""
    shapes, layers = {}, set(layers)
    for name, shape in plain.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            shapes[name] = shape
            continue
        outputs, inputs = shape
        groups = 1 if group_size == -1 else inputs // group_size
        made = [inputs * bits // 32, outputs], [groups, outputs * bits // 32], [groups, outputs], [inputs]
        shapes |= {f"{layer}.{part}": size for part, size in zip(gptq_format.PARTS, made)}
    return shapes


def tensors(
    source: Path, made: Path, plain: dict[str, list[int]], layers: Iterable[str], bits: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor), one layer in memory at a time: packed ones from `made`, all others of `source` in float16.

    plain: the tensors that a 16-bit checkpoint of this model holds; what else lies in `source` is left there.
    """
    layers = set(layers)
    with Shards(source) as shards:
        for name in shards:
            layer = name.removesuffix(".weight")
            if layer != name and layer in layers:
                yield from ((f"{layer}.{part}", tensor) for part, tensor in packed(made / layer, bits))
            elif name in plain:
                yield name, half(name, shards[name])


def packed(folder: Path, bits: int) -> list[tuple[str, torch.Tensor]]:
    """(part, tensor) of one layer, zero points as published files have them."""
    with safe_open(folder / PACKED, framework="pt") as file:
        parts = {part: file.get_tensor(part) for part in gptq_format.PARTS}
    parts["qweight"], parts["qzeros"] = gptq_format.as_v1(parts["qweight"], parts["qzeros"], parts["g_idx"], bits)
    return [(part, tensor.contiguous()) for part, tensor in parts.items()]


def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """In float16; UserError for values that it cannot hold."""
    return model_writer.rounded(name, tensor, torch.float16, "GPTQ folders have no other type: serve this model as it is")


def check_half(source: Path, plain: dict[str, list[int]], layers: Iterable[str]) -> None:
    """half()'s error, for all tensors that stay unquantized, before hours of work."""
    quantized = {f"{layer}.weight" for layer in layers}
    with Shards(source) as shards:
        for name in shards:
            if name in plain and name not in quantized:
                half(name, shards[name])
