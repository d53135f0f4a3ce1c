"""The names of the same tensors in first-generation Qwen's layout ("qwen") and in transformers' Qwen2 ("qwen2").

    transformer.h.N.attn.c_attn    model.layers.N.self_attn.q_proj, k_proj, v_proj     each has a third of c_attn's outputs
    transformer.h.N.attn.c_proj    model.layers.N.self_attn.o_proj
    transformer.h.N.mlp.w1         model.layers.N.mlp.up_proj
    transformer.h.N.mlp.w2         model.layers.N.mlp.gate_proj                        its output goes through silu
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
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
TO_QWEN2 = {
    FUSED: QKV,
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
# The axis of a layer's outputs in each of its tensors. None: the tensor has no such axis, so q, k and v share it.
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
    """A module in the model. block: its number, None outside the blocks; kind: a key of KINDS[layout]."""

    block: int | None
    kind: str


def place_of(name: str, layout: str) -> tuple[Place, str] | None:
    """Splits a tensor's name: "lm_head.weight" -> (Place(None, "lm_head"), "weight"). None for a name of another layout."""
    found = re.match(rf"{BLOCKS[layout]}\.(\d+)\.", name)
    block, inside = (int(found[1]), name[found.end() :]) if found else (None, name)
    for kind in KINDS[layout]:
        if inside.startswith(f"{kind}.") and is_outside_blocks(kind) == (block is None):
            return Place(block, kind), inside.removeprefix(f"{kind}.")
    return None


def module_name(place: Place, layout: str) -> str:
    return place.kind if place.block is None else f"{BLOCKS[layout]}.{place.block}.{place.kind}"


def is_outside_blocks(kind: str) -> bool:
    """Embedding, final norm and head."""
    return kind.startswith(("transformer.", "model.", "lm_head"))


def split(tensor: torch.Tensor, part: str) -> list[torch.Tensor]:
    """The parts of c_attn's tensor `part` for q, k and v. Copies: safetensors refuses tensors that share memory."""
    axis = OUTPUT_AXIS[part]
    pieces = [tensor] * 3 if axis is None else tensor.chunk(3, axis)
    return [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]


class ConvertedTensors:
    """A checkpoint's tensors by their names in the other layout; each is read and converted when it is asked for.

    shards: the checkpoint; layout: its own. zero_biases: {name in the other layout: (dtype, length)} of biases to add.
    left_out: the same of the checkpoint's biases that are zero and that the other layout does not have.
    Raises UserError for a tensor that the other layout has no name for, and where one of q, k and v is missing.
    """

    def __init__(self, shards: Shards, layout: str, zero_biases: dict[str, tuple[torch.dtype, int]] | None = None):
        self.shards, self.layout, self.zero_biases = shards, layout, zero_biases or {}
        self.left_out: dict[str, tuple[torch.dtype, int]] = {}
        self.sources: dict[str, list[str]] = {}  # name -> stored names: one, or q, k and v to concatenate
        self.third_of: dict[str, int] = {}  # name -> 0, 1, 2: q, k or v of its source c_attn
        self.last: tuple[str, list[torch.Tensor]] | None = None
        for name in shards:
            self.add_source(name)
        self.check()

    def add_source(self, name: str) -> None:
        """Enters a stored tensor into sources, under the names that are made from it."""
        place, part = place_of(name, self.layout) or (None, "")
        if part not in OUTPUT_AXIS or part.startswith("lora_"):
            what = f"{self.shards.folder}: holds {name}, which has no name in the layout of {OTHER[self.layout]}"
            raise UserError(f"{what} - give a checkpoint as published")
        if part == "bias" and place.kind not in (FUSED, *QKV):
            return self.leave_out(name)
        for third, kind in enumerate(KINDS[self.layout][place.kind]):
            new = f"{module_name(Place(place.block, kind), OTHER[self.layout])}.{part}"
            self.sources.setdefault(new, []).append(name)
            if place.kind == FUSED:
                self.third_of[new] = third

    def leave_out(self, name: str) -> None:
        """Drops a zero bias of a layer without bias: published GPTQ folders hold such. UserError for one that is not zero."""
        bias = self.shards[name]
        if bias.any():
            what = f"{self.shards.folder}: {name} is not zero, and the layout of {OTHER[self.layout]} has no bias there"
            raise UserError(f"{what} - it cannot be exported; serve this model in its own layout")
        self.left_out[name] = (bias.dtype, len(bias))

    def check(self) -> None:
        """Sorts c_attn's sources as q, k, v. UserError where one is missing, or c_attn's tensor cannot be split in three."""
        for name, stored in self.sources.items():
            if self.layout == QWEN2 and f".{FUSED}." in name:
                stored.sort(key=lambda one: QKV.index(place_of(one, QWEN2)[0].kind))
                if len(stored) != 3:
                    what = f"{self.shards.folder}: of q_proj, k_proj and v_proj only {', '.join(stored)} is there"
                    raise UserError(f"{what} - {name} is made of all three; give a complete checkpoint")
            axis = OUTPUT_AXIS[part_of(name)]
            if name in self.third_of and axis is not None and self.shards.shape(stored[0])[axis] % 3:
                what = f"{stored[0]} {self.shards.shape(stored[0])} cannot be split into q, k and v"
                what = f"{self.shards.folder}: {what}"
                raise UserError(f"{what} - quantize the exported 16-bit model instead")

    def __iter__(self):
        return iter([*self.sources, *self.zero_biases])

    def __contains__(self, name: str) -> bool:
        return name in self.sources or name in self.zero_biases

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.zero_biases:
            dtype, length = self.zero_biases[name]
            return torch.zeros(length, dtype=dtype)
        stored, part = self.sources[name], part_of(name)
        if name in self.third_of:
            return self.split_cached(stored[0], part)[self.third_of[name]]
        return self.shards[stored[0]] if len(stored) == 1 else self.concatenate(stored, part)

    def split_cached(self, stored: str, part: str) -> list[torch.Tensor]:
        """split() of a stored tensor, kept for the next two calls: q, k and v are asked for in turn."""
        if self.last is None or self.last[0] != stored:
            self.last = stored, split(self.shards[stored], part)
        return self.last[1]

    def concatenate(self, stored: list[str], part: str) -> torch.Tensor:
        """c_attn's tensor `part`, of those of q, k and v. UserError where their g_idx differ."""
        tensors, axis = [self.shards[one] for one in stored], OUTPUT_AXIS[part]
        if axis is not None:
            return torch.cat(tensors, axis)
        if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
            what = f"{self.shards.folder}: {', '.join(stored)} have different g_idx, so they cannot be fused into one layer"
            raise UserError(f"{what} - export the 16-bit model and quantize that")
        return tensors[0]

    def shape(self, name: str) -> list[int]:
        if name in self.zero_biases:
            return [self.zero_biases[name][1]]
        stored, axis = self.sources[name], OUTPUT_AXIS[part_of(name)]
        shape = list(self.shards.shape(stored[0]))
        if axis is not None:
            outputs = sum(self.shards.shape(one)[axis] for one in stored)
            shape[axis] = outputs // 3 if name in self.third_of else outputs
        return shape

    def first_row(self, name: str) -> torch.Tensor:
        """The tensor's first row; only that is read."""
        if name in self.zero_biases:
            return self[name][:1]
        stored, axis = self.sources[name], OUTPUT_AXIS[part_of(name)]
        third = self.third_of.get(name, 0)
        start = third * self.shape(name)[0] if axis == 0 else 0
        rows = [self.shards.slice(one)[start : start + 1] for one in stored]
        if axis != 1:
            return rows[0]
        return torch.cat(rows, 1).chunk(3, 1)[third] if name in self.third_of else torch.cat(rows, 1)


def part_of(name: str) -> str:
    """ "weight", "qweight" and the like."""
    return name.rsplit(".", 1)[1]
