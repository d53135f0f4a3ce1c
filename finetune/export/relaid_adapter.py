"""A LoRA adapter in the other layout. With W (O, I) a layer's weight, A (R, I) and B (O, R), the layer adds s B A:

to qwen2    c_attn's outputs are those of q_proj, k_proj and v_proj, one after the other. Each of these gets c_attn's A
            and a third of the rows of B, of DoRA's magnitudes and of the bias.
to qwen     q_proj, k_proj and v_proj have an A each. c_attn's A is the three stacked, its B holds the three along its
            diagonal, and its rank is their sum; where the three are one A, as exported ones are, it stays one.

Both are exact, DoRA too: its norms are of single rows of W + s B A, and rows stay whole.
"""

import math
from collections import Counter

import torch

from ..errors import UserError
from ..folders.adapter_folder import PREFIX
from ..merge.formulas import ROWS, Adapter
from . import layouts
from .export_checks import OTHER, QWEN2
from .layouts import FUSED, THIRDS, Place

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
Parts = dict[str, torch.Tensor]  # what the adapter has for one module, by the end of its name


class RelaidAdapter:
    """The adapter's tensors and config in the other layout.

    adapter: read; layout: its own; blocks: how many the model has. tensors: {name without peft's wrapping: tensor}.
    """

    def __init__(self, adapter: Adapter, layout: str, blocks: int):
        self.adapter, self.layout, self.blocks = adapter, layout, blocks
        self.other = OTHER[layout]
        self.modules: dict[Place, Parts] = {}
        self.scales: dict[Place, float] = {}
        for place, parts in self.places().items():
            self.take(place, parts)
        if layout == QWEN2:
            self.fuse()
        for place, parts in self.modules.items():
            self.drop_bias(place, parts)
        self.tensors = {
            f"{layouts.module_name(place, self.other)}.{part}": tensor
            for place, parts in self.modules.items()
            for part, tensor in parts.items()
        }

    def places(self) -> dict[Place, Parts]:
        """The adapter's tensors, module by module, where they are."""
        found: dict[Place, Parts] = {}
        for name, tensor in self.adapter.tensors.items():
            place, part = layouts.place_of(name, self.layout) or (None, None)
            if part not in (*layouts.OUTPUT_AXIS, ROWS):
                self.refuse(name)
            found.setdefault(place, {})[part] = tensor
        return found

    def refuse(self, name: str, why: str = ""):
        what = f"{self.adapter.folder}: holds {name}{why}, which the layout of {self.other} has no place for"
        raise UserError(f"{what} - merge it into its base and export the result")

    def take(self, place: Place, parts: Parts) -> None:
        """Puts a module's tensors into their places in the other layout; q_proj and its like wait for each other."""
        kinds = layouts.KINDS[self.layout][place.kind]
        waiting = self.layout == QWEN2 and place.kind in THIRDS
        pieces = thirds(parts) if place.kind == FUSED else [parts]
        for kind, piece in zip([place.kind] if waiting else kinds, pieces):
            new = Place(place.block, kind)
            self.modules[new] = piece
            if A in parts:
                self.scales[new] = self.adapter.scale(layouts.module_name(place, self.layout), len(parts[A]))

    def fuse(self) -> None:
        """c_attn of each block, of what there is for q_proj, k_proj and v_proj."""
        for block in sorted({place.block for place in self.modules if place.kind in THIRDS}):
            three = [Place(block, kind) for kind in THIRDS]
            scales = [self.scales.pop(place, None) for place in three]
            parts = [self.modules.pop(place, {}) for place in three]
            fused = Place(block, FUSED)
            self.modules[fused] = self.fused(fused, parts)
            if any(scales):
                self.modules[fused] |= self.fused_matrices(parts, scales)
                self.scales[fused] = next(filter(None, scales))

    def fused(self, place: Place, parts: list[Parts]) -> Parts:
        """What is not a matrix of an adapter: of all three, or of none."""
        found = {}
        for part in dict.fromkeys(part for one in parts for part in one if part not in (A, B)):
            if any(part not in one for one in parts):
                there = ", ".join(kind.split(".")[-1] for kind, one in zip(THIRDS, parts) if part in one)
                what = f"{part} of block {place.block} is trained for {there} alone, and c_attn has one"
                what = f"{self.adapter.folder}: {what}"
                raise UserError(f"{what} - merge it into its base and export the result")
            found[part] = torch.cat([one[part] for one in parts])
        return found

    def fused_matrices(self, parts: list[Parts], scales: list[float | None]) -> Parts:
        """c_attn's A and B, for the scale of the first that has one."""
        first = next(filter(None, scales))
        there = [one for one in parts if A in one]
        if len(there) == 3 and len(set(scales)) == 1 and all(torch.equal(there[0][A], one[A]) for one in there[1:]):
            return {A: there[0][A], B: torch.cat([one[B] for one in there])}
        outputs = len(there[0][B])
        nothing = there[0][B].new_zeros(outputs, 0)
        diagonal = [one[B] * (scale / first) if scale else nothing for one, scale in zip(parts, scales)]
        return {A: torch.cat([one[A] for one in there]), B: torch.block_diag(*diagonal)}

    def drop_bias(self, place: Place, parts: Parts) -> None:
        """A bias that the other layout has no place for, if it is zero."""
        if "bias" in parts and place.kind not in (FUSED, *THIRDS):
            if parts["bias"].any():
                self.refuse(f"{layouts.module_name(place, self.other)}.bias", " (not zero)")
            del parts["bias"]

    # ---- adapter_config.json

    def config(self, base: str) -> dict:
        """That exactly the layers are adapted that were, each with its rank and its scale."""
        ranks = {place: len(parts[A]) for place, parts in self.modules.items() if A in parts}
        root = self.adapter.config.get("use_rslora")
        per_scale = {place: math.sqrt(rank) if root else rank for place, rank in ranks.items()}
        alphas = {place: tidy(self.scales[place] * per_scale[place]) for place in ranks}
        usual = {"r": most_common(ranks, self.adapter.config["r"])}
        usual["lora_alpha"] = most_common(alphas, self.adapter.config["lora_alpha"])
        unused = ("layers_to_transform", "layers_pattern", "exclude_modules", "auto_mapping", "revision")
        return (
            self.adapter.config
            | dict.fromkeys(unused)
            | usual
            | {
                "base_model_name_or_path": base,
                "target_modules": self.names(list(ranks)),
                "rank_pattern": self.pattern(ranks, usual["r"]),
                "alpha_pattern": self.pattern(alphas, usual["lora_alpha"]),
                "modules_to_save": self.modules_to_save(),
                "trainable_token_indices": self.token_indices(),
            }
        )

    def names(self, places: list[Place]) -> list[str]:
        """Names that mean these modules and no others: of a kind where every block has it, else in full."""
        found = []
        for kind in dict.fromkeys(place.kind for place in places):
            of_kind = [place for place in places if place.kind == kind]
            whole = layouts.is_outside(kind) or len(of_kind) == self.blocks
            found += [short(kind)] if whole else [layouts.module_name(place, self.other) for place in of_kind]
        return found

    def pattern(self, values: dict[Place, float], usual: float) -> dict[str, float]:
        """rank_pattern or alpha_pattern: what is not as usual, by names() of the modules."""
        found = {}
        for kind in dict.fromkeys(place.kind for place in values):
            of_kind = {place: value for place, value in values.items() if place.kind == kind}
            if len(set(of_kind.values())) == 1:
                found[short(kind)] = next(iter(of_kind.values()))
            else:
                found |= {layouts.module_name(place, self.other): value for place, value in of_kind.items()}
        return {name: value for name, value in found.items() if value != usual}

    def modules_to_save(self) -> list[str] | None:
        """Each name that is listed, as those that mean the same modules."""
        return self.meant_by(self.adapter.config.get("modules_to_save") or []) or None

    def meant_by(self, names: list[str]) -> list[str]:
        """peft takes a name for every module whose own ends in it: "norm" means three kinds of Qwen2's."""
        found = []
        for name in names:
            kinds = [kind for kind in layouts.KINDS[self.layout] if kind.endswith(name)]
            if not kinds:
                self.refuse(name, " in its settings")
            found += [short(new) for kind in kinds for new in layouts.KINDS[self.layout][kind]]
        return list(dict.fromkeys(found))

    def token_indices(self):
        """{module: ids}; a plain list means the embedding, whatever it is called."""
        found = self.adapter.config.get("trainable_token_indices")
        return {self.meant_by([name])[0]: ids for name, ids in found.items()} if isinstance(found, dict) else found

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors under the names that peft gives them."""
        adapted = {layouts.module_name(place, self.other) for place in self.scales}
        found = {}
        for name, tensor in self.tensors.items():
            module, part = name.rsplit(".", 1)
            inside = ".base_layer" if part == "bias" and module in adapted else ""
            found[f"{PREFIX}{module}{inside}.{part}"] = tensor.contiguous()
        return found


def thirds(parts: Parts) -> list[Parts]:
    """What c_attn has, for query, key and value."""
    split = {part: layouts.split(tensor, part) for part, tensor in parts.items()}
    return [{part: three[i] for part, three in split.items()} for i in range(3)]


def short(kind: str) -> str:
    """A name that means this kind alone: two of first-generation Qwen's end in c_proj, three of Qwen2's in norm."""
    name = kind.split(".")[-1]
    return kind if name in ("c_proj", "norm") else name


def tidy(number: float) -> float:
    """16 for 16.000000000000004."""
    return round(number) if abs(number - round(number)) < 1e-9 * max(1, abs(number)) else number


def most_common(values: dict[Place, float], otherwise: float) -> float:
    return Counter(values.values()).most_common(1)[0][0] if values else otherwise
