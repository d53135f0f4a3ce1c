"""Converts a LoRA adapter to the other layout. A layer's weight is W (O, I); the adapter adds s B A, A (R, I) and B (O, R).

to qwen2    c_attn's outputs are those of q_proj, k_proj and v_proj, concatenated. Each of the three gets c_attn's A, and a
            third of the rows of B, of DoRA's magnitudes and of the bias.
to qwen     q_proj, k_proj and v_proj have an A each. c_attn's A is these three concatenated, its B is block-diagonal, and its
            rank is the sum of theirs. Where the three A are equal, as in an exported adapter, c_attn gets that A.

Both are exact. So is DoRA: its norms are those of single rows of W + s B A, and no row is split.
"""

import math
from collections import Counter

import torch

from ..errors import UserError
from ..folders.adapter_folder import PREFIX
from ..merge.formulas import ROWS, Adapter
from . import layouts
from .export_checks import OTHER, QWEN2
from .layouts import FUSED, QKV, Place

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
Parts = dict[str, torch.Tensor]  # the adapter's tensors of one module, by the last part of their names


class ConvertedAdapter:
    """The adapter's tensors and config in the other layout.

    layout: the adapter's own; blocks: how many the model has. tensors: {name without peft's prefix: tensor}.
    Raises UserError for a tensor that the other layout has no name for.
    """

    def __init__(self, adapter: Adapter, layout: str, blocks: int):
        self.adapter, self.layout, self.blocks = adapter, layout, blocks
        self.target = OTHER[layout]
        self.modules: dict[Place, Parts] = {}
        self.scales: dict[Place, float] = {}
        for place, parts in self.by_module().items():
            self.add_module(place, parts)
        if layout == QWEN2:
            self.fuse()
        for place, parts in self.modules.items():
            self.drop_bias(place, parts)
        self.tensors = {
            f"{layouts.module_name(place, self.target)}.{part}": tensor
            for place, parts in self.modules.items()
            for part, tensor in parts.items()
        }

    def by_module(self) -> dict[Place, Parts]:
        """{module: its tensors} in the adapter's own layout."""
        found: dict[Place, Parts] = {}
        for name, tensor in self.adapter.tensors.items():
            place, part = layouts.place_of(name, self.layout) or (None, None)
            if part not in (*layouts.OUTPUT_AXIS, ROWS):
                self.refuse(name)
            found.setdefault(place, {})[part] = tensor
        return found

    def refuse(self, name: str, why: str = ""):
        """UserError for something that the other layout does not have."""
        what = f"{self.adapter.folder}: holds {name}{why}, which the layout of {self.target} does not have"
        raise UserError(f"{what} - merge it into its base and export the result")

    def add_module(self, place: Place, parts: Parts) -> None:
        """Enters a module's tensors under its names in the other layout. q, k and v stay as they are until fuse()."""
        kinds = layouts.KINDS[self.layout][place.kind]
        unfused = self.layout == QWEN2 and place.kind in QKV
        pieces = split_qkv(parts) if place.kind == FUSED else [parts]
        for kind, piece in zip([place.kind] if unfused else kinds, pieces):
            new = Place(place.block, kind)
            self.modules[new] = piece
            if A in parts:
                self.scales[new] = self.adapter.scale(layouts.module_name(place, self.layout), len(parts[A]))

    def fuse(self) -> None:
        """Replaces q_proj, k_proj and v_proj of each block by c_attn."""
        for block in sorted({place.block for place in self.modules if place.kind in QKV}):
            three = [Place(block, kind) for kind in QKV]
            scales = [self.scales.pop(place, None) for place in three]
            parts = [self.modules.pop(place, {}) for place in three]
            fused = Place(block, FUSED)
            self.modules[fused] = self.fused(fused, parts)
            if any(scales):
                self.modules[fused] |= self.fused_lora_matrices(parts, scales)
                self.scales[fused] = next(filter(None, scales))

    def fused(self, place: Place, parts: list[Parts]) -> Parts:
        """c_attn's tensors other than A and B. UserError for one that only some of q, k and v have."""
        found = {}
        for part in dict.fromkeys(part for one in parts for part in one if part not in (A, B)):
            if any(part not in one for one in parts):
                there = ", ".join(kind.split(".")[-1] for kind, one in zip(QKV, parts) if part in one)
                what = f"{part} of block {place.block} is trained for {there} only, and c_attn has one for q, k and v together"
                what = f"{self.adapter.folder}: {what}"
                raise UserError(f"{what} - merge it into its base and export the result")
            found[part] = torch.cat([one[part] for one in parts])
        return found

    def fused_lora_matrices(self, parts: list[Parts], scales: list[float | None]) -> Parts:
        """c_attn's A and B. Its scale is that of the first of q, k and v that is adapted; the others' B are rescaled to it."""
        first = next(filter(None, scales))
        there = [one for one in parts if A in one]
        if len(there) == 3 and len(set(scales)) == 1 and all(torch.equal(there[0][A], one[A]) for one in there[1:]):
            return {A: there[0][A], B: torch.cat([one[B] for one in there])}
        outputs = len(there[0][B])
        empty = there[0][B].new_zeros(outputs, 0)
        diagonal = [one[B] * (scale / first) if scale else empty for one, scale in zip(parts, scales)]
        return {A: torch.cat([one[A] for one in there]), B: torch.block_diag(*diagonal)}

    def drop_bias(self, place: Place, parts: Parts) -> None:
        """Drops a zero bias of a layer that has none in the other layout. UserError for one that is not zero."""
        if "bias" in parts and place.kind not in (FUSED, *QKV):
            if parts["bias"].any():
                self.refuse(f"{layouts.module_name(place, self.target)}.bias", " (not zero)")
            del parts["bias"]

    # ---- adapter_config.json

    def config(self, base: str) -> dict:
        """adapter_config.json: the same layers are adapted, each with the same rank and scale. base: folder or hub id."""
        ranks = {place: len(parts[A]) for place, parts in self.modules.items() if A in parts}
        root = self.adapter.config.get("use_rslora")
        per_scale = {place: math.sqrt(rank) if root else rank for place, rank in ranks.items()}
        alphas = {place: round_if_close(self.scales[place] * per_scale[place]) for place in ranks}
        usual = {"r": most_common(ranks, self.adapter.config["r"])}
        usual["lora_alpha"] = most_common(alphas, self.adapter.config["lora_alpha"])
        unused = ("layers_to_transform", "layers_pattern", "exclude_modules", "auto_mapping", "revision")
        return (
            self.adapter.config
            | dict.fromkeys(unused)
            | usual
            | {
                "base_model_name_or_path": base,
                "target_modules": self.module_names(list(ranks)),
                "rank_pattern": self.pattern(ranks, usual["r"]),
                "alpha_pattern": self.pattern(alphas, usual["lora_alpha"]),
                "modules_to_save": self.modules_to_save(),
                "trainable_token_indices": self.token_indices(),
            }
        )

    def module_names(self, places: list[Place]) -> list[str]:
        """target_modules that match exactly these modules: a short name where every block has the module, else full names."""
        found = []
        for kind in dict.fromkeys(place.kind for place in places):
            of_kind = [place for place in places if place.kind == kind]
            whole = layouts.is_outside_blocks(kind) or len(of_kind) == self.blocks
            found += [short_name(kind)] if whole else [layouts.module_name(place, self.target) for place in of_kind]
        return found

    def pattern(self, values: dict[Place, float], usual: float) -> dict[str, float]:
        """rank_pattern or alpha_pattern: {module name: value} where it is not the usual value."""
        found = {}
        for kind in dict.fromkeys(place.kind for place in values):
            of_kind = {place: value for place, value in values.items() if place.kind == kind}
            if len(set(of_kind.values())) == 1:
                found[short_name(kind)] = next(iter(of_kind.values()))
            else:
                found |= {layouts.module_name(place, self.target): value for place, value in of_kind.items()}
        return {name: value for name, value in found.items() if value != usual}

    def modules_to_save(self) -> list[str] | None:
        """modules_to_save with the other layout's names."""
        return self.names_in_target(self.adapter.config.get("modules_to_save") or []) or None

    def names_in_target(self, names: list[str]) -> list[str]:
        """The other layout's names for all modules that `names` match.

        peft matches the ends of names, so "norm" matches three kinds of Qwen2's modules.
        """
        found = []
        for name in names:
            kinds = [kind for kind in layouts.KINDS[self.layout] if kind.endswith(name)]
            if not kinds:
                self.refuse(name, " in its settings")
            found += [short_name(new) for kind in kinds for new in layouts.KINDS[self.layout][kind]]
        return list(dict.fromkeys(found))

    def token_indices(self):
        """trainable_token_indices: {module: ids}; a plain list means the embedding in every layout."""
        found = self.adapter.config.get("trainable_token_indices")
        return {self.names_in_target([name])[0]: ids for name, ids in found.items()} if isinstance(found, dict) else found

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors by the names under which peft saves them."""
        adapted = {layouts.module_name(place, self.target) for place in self.scales}
        found = {}
        for name, tensor in self.tensors.items():
            module, part = name.rsplit(".", 1)
            inside = ".base_layer" if part == "bias" and module in adapted else ""
            found[f"{PREFIX}{module}{inside}.{part}"] = tensor.contiguous()
        return found


def split_qkv(parts: Parts) -> list[Parts]:
    """c_attn's tensors, split into those of q, k and v."""
    split = {part: layouts.split(tensor, part) for part, tensor in parts.items()}
    return [{part: three[i] for part, three in split.items()} for i in range(3)]


def short_name(kind: str) -> str:
    """The shortest name that matches only this kind: several kinds end in c_proj (first-generation Qwen) or norm (Qwen2)."""
    name = kind.split(".")[-1]
    return kind if name in ("c_proj", "norm") else name


def round_if_close(number: float) -> float:
    """16 for 16.000000000000004, which products of scales and ranks give."""
    return round(number) if abs(number - round(number)) < 1e-9 * max(1, abs(number)) else number


def most_common(values: dict[Place, float], otherwise: float) -> float:
    return Counter(values.values()).most_common(1)[0][0] if values else otherwise
