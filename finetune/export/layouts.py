"""The two layouts of the same network, first-generation Qwen's and transformers' Qwen2: which tensor is which.

    transformer.h.N.attn.c_attn    model.layers.N.self_attn.q_proj, k_proj, v_proj     a third of the outputs each
    transformer.h.N.attn.c_proj    model.layers.N.self_attn.o_proj
    transformer.h.N.mlp.w1         model.layers.N.mlp.up_proj
    transformer.h.N.mlp.w2         model.layers.N.mlp.gate_proj                        the one that goes through silu
    transformer.h.N.mlp.c_proj     model.layers.N.mlp.down_proj
    transformer.h.N.ln_1, ln_2     model.layers.N.input_layernorm, post_attention_layernorm
    transformer.wte, ln_f, lm_head     model.embed_tokens, model.norm, lm_head
"""

import re
from typing import NamedTuple

import torch

from ..errors import UserError
from ..folders.shards import Shards
from .export_checks import OTHER, QWEN, QWEN2

BLOCKS = {QWEN: "transformer.h", QWEN2: "model.layers"}
FUSED = "attn.c_attn"
THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
TO_QWEN2 = {
    FUSED: THIRDS,
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "transformer.wte": ("model.embed_tokens",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}
TO_QWEN = {new: (old,) for old, several in TO_QWEN2.items() for new in several}
KINDS = {QWEN: TO_QWEN2, QWEN2: TO_QWEN}  # {layout: {kind: kinds of the other layout}}
# Which axis of a layer's tensor its outputs are on; None: a tensor of its inputs, the same for all thirds.
OUTPUT_AXIS = {
    "weight": 0,
    "bias": 0,
    "qweight": 1,
    "qzeros": 1,
    "scales": 1,
    "g_idx": None,
    "lora_A.weight": None,
    "lora_B.weight": 0,
    "lora_magnitude_vector": 0,
}


class Place(NamedTuple):
    """A module: the number of its block (None outside of them), and what it is, a key of KINDS."""

    block: int | None
    kind: str


def place_of(name: str, layout: str) -> tuple[Place, str] | None:
    """(module, the rest of the name) of a tensor: "lm_head.weight" -> (Place(None, "lm_head"), "weight")."""
    found = re.match(rf"{BLOCKS[layout]}\.(\d+)\.", name)
    block, inside = (int(found[1]), name[found.end() :]) if found else (None, name)
    for kind in KINDS[layout]:
        if inside.startswith(f"{kind}.") and is_outside(kind) == (block is None):
            return Place(block, kind), inside.removeprefix(f"{kind}.")
    return None


def module_name(place: Place, layout: str) -> str:
    return place.kind if place.block is None else f"{BLOCKS[layout]}.{place.block}.{place.kind}"


def is_outside(kind: str) -> bool:
    """Of all blocks."""
    return kind.startswith(("transformer.", "model.", "lm_head"))


def split(tensor: torch.Tensor, part: str) -> list[torch.Tensor]:
    """Query's, key's and value's share of c_attn's tensor `part`, copied: files take no two names for one memory."""
    axis = OUTPUT_AXIS[part]
    pieces = [tensor] * 3 if axis is None else tensor.chunk(3, axis)
    return [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]


class Relaid:
    """A checkpoint's tensors in the other layout, made of the stored ones when they are asked for.

    shards: the checkpoint, whose layout is `layout`. zeros: {name in the other layout: (dtype, length)} of biases that
    are not stored. Biases that the other layout has no place for are in left_out, if they are zero.
    Raises UserError where something stored has no place, or a part of c_attn is missing.
    """

    def __init__(self, shards: Shards, layout: str, zeros: dict[str, tuple[torch.dtype, int]] | None = None):
        self.shards, self.layout, self.zeros = shards, layout, zeros or {}
        self.left_out: dict[str, tuple[torch.dtype, int]] = {}
        self.sources: dict[str, list[str]] = {}  # name -> stored names: one, or three to stack
        self.thirds: dict[str, int] = {}  # name -> which third of its source it is
        self.last: tuple[str, list[torch.Tensor]] | None = None
        for name in shards:
            self.find_place(name)
        self.check()

    def find_place(self, name: str) -> None:
        place, part = place_of(name, self.layout) or (None, "")
        if part not in OUTPUT_AXIS or part.startswith("lora_"):
            what = f"{self.shards.folder}: holds {name}, which the layout of {OTHER[self.layout]} has no place for"
            raise UserError(f"{what} - give a checkpoint of the published form")
        if part == "bias" and place.kind not in (FUSED, *THIRDS):
            return self.leave_out(name)
        for third, kind in enumerate(KINDS[self.layout][place.kind]):
            new = f"{module_name(Place(place.block, kind), OTHER[self.layout])}.{part}"
            self.sources.setdefault(new, []).append(name)
            if place.kind == FUSED:
                self.thirds[new] = third

    def leave_out(self, name: str) -> None:
        """A bias on a layer that has none in 16 bit, as published GPTQ folders hold them."""
        bias = self.shards[name]
        if bias.any():
            what = f"{self.shards.folder}: {name} is not zero, and the layout of {OTHER[self.layout]} has no bias there"
            raise UserError(f"{what} - it cannot go along; serve this model in its own layout")
        self.left_out[name] = (bias.dtype, len(bias))

    def check(self) -> None:
        """Of c_attn's parts there must be three, in the order of the rows, and thirds must be whole words of qzeros."""
        for name, stored in self.sources.items():
            if self.layout == QWEN2 and f".{FUSED}." in name:
                stored.sort(key=lambda one: THIRDS.index(place_of(one, QWEN2)[0].kind))
                if len(stored) != 3:
                    what = f"{self.shards.folder}: of q_proj, k_proj and v_proj only {', '.join(stored)} is there"
                    raise UserError(f"{what} - {name} is made of all three; give a complete checkpoint")
            axis = OUTPUT_AXIS[part_of(name)]
            if name in self.thirds and axis is not None and self.shards.shape(stored[0])[axis] % 3:
                what = f"{stored[0]} {self.shards.shape(stored[0])} does not fall into three parts"
                what = f"{self.shards.folder}: {what}"
                raise UserError(f"{what} - quantize the exported 16-bit model instead")

    def __iter__(self):
        return iter([*self.sources, *self.zeros])

    def __contains__(self, name: str) -> bool:
        return name in self.sources or name in self.zeros

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.zeros:
            dtype, length = self.zeros[name]
            return torch.zeros(length, dtype=dtype)
        stored, part = self.sources[name], part_of(name)
        if name in self.thirds:
            return self.split_once(stored[0], part)[self.thirds[name]]
        return self.shards[stored[0]] if len(stored) == 1 else self.stack(stored, part)

    def split_once(self, stored: str, part: str) -> list[torch.Tensor]:
        """Query, key and value are asked for one after the other: c_attn is read once."""
        if self.last is None or self.last[0] != stored:
            self.last = stored, split(self.shards[stored], part)
        return self.last[1]

    def stack(self, stored: list[str], part: str) -> torch.Tensor:
        tensors, axis = [self.shards[one] for one in stored], OUTPUT_AXIS[part]
        if axis is not None:
            return torch.cat(tensors, axis)
        if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
            what = f"{self.shards.folder}: {', '.join(stored)} group their inputs differently, so they are no one layer"
            raise UserError(f"{what} - export the 16-bit model and quantize that")
        return tensors[0]

    def shape(self, name: str) -> list[int]:
        if name in self.zeros:
            return [self.zeros[name][1]]
        stored, axis = self.sources[name], OUTPUT_AXIS[part_of(name)]
        shape = list(self.shards.shape(stored[0]))
        if axis is not None:
            outputs = sum(self.shards.shape(one)[axis] for one in stored)
            shape[axis] = outputs // 3 if name in self.thirds else outputs
        return shape

    def beginning(self, name: str) -> torch.Tensor:
        """The first row of the tensor, of which few bytes are read."""
        if name in self.zeros:
            return self[name][:1]
        stored, axis = self.sources[name], OUTPUT_AXIS[part_of(name)]
        third = self.thirds.get(name, 0)
        start = third * self.shape(name)[0] if axis == 0 else 0
        rows = [self.shards.slice(one)[start : start + 1] for one in stored]
        if axis != 1:
            return rows[0]
        return torch.cat(rows, 1).chunk(3, 1)[third] if name in self.thirds else torch.cat(rows, 1)


def part_of(name: str) -> str:
    """ "weight", "qweight" and the like."""
    return name.rsplit(".", 1)[1]
