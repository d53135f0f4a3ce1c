"""What an adapter makes of its base's tensors, one at a time, in float32. W (O, I) is a layer's weight, A (R, I) and B (O, R):

    LoRA     W + s B A                       s = alpha / R; rsLoRA: alpha / sqrt(R)     Hu et al., 2021; Kalajdzievski, 2023
    DoRA     m (W + s B A) / |W + s B A|     the norm of each row, m (O,)               Liu et al., 2024
    PiSSA    W + s (B A - B0 A0)             of a checkpoint; see pissa.py              Meng et al., 2024

Rows of embedding and head, both whole, and biases take the place of the base's.
"""

import math
import re
from pathlib import Path

import torch

from ..errors import UserError, listed
from ..folders import config_files
from ..folders.adapter_folder import PREFIX
from ..folders.shards import Shards
from ..lora import pissa

ROWS = "token_adapter.trainable_tokens_delta"  # peft's name; they are the rows, not a difference
# Settings of peft's that change the formulas, with the values under which they do not.
OTHER_FORMULAS = {
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")  # beginnings that change the base's weights


class Adapter:
    """An adapter's folder: merged(name, tensor) is the base's tensor with the adapter in it.

    Raises UserError for an adapter whose formula is not among those above.
    """

    def __init__(self, folder: Path):
        self.folder, self.config = folder, config_files.read_json(folder / "adapter_config.json")
        self.check_formula()
        with Shards(folder) as shards:
            self.tensors = {plain(name): shards[name] for name in shards}
        self.start = {plain(name): tensor for name, tensor in pissa.read_start(folder).items()} if self.began() else {}
        self.unused = set(self.tensors)

    def began(self) -> bool:
        return pissa.stored(self.folder)

    def check_formula(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise UserError(f"{self.folder}: an adapter of type {kind}, not LoRA - merge it with peft")
        for key, usual in OTHER_FORMULAS.items():
            value = self.config.get(key)
            if value is not None and value not in usual:
                raise UserError(f"{self.folder}: {key} is {value}, which only peft merges - use its merge_and_unload()")
        begun = self.config.get("init_lora_weights")
        if isinstance(begun, str) and begun.startswith(CHANGES_BASE) and not self.began():
            what = f"{self.folder}: init_lora_weights is {begun}, so it belongs to a changed base"
            how = "save it with peft's path_initial_model_for_weight_conversion, as a plain LoRA"
            raise UserError(f"{what} - {how}")

    def take(self, name: str) -> torch.Tensor | None:
        """One of the adapter's tensors, in float32; noted as used."""
        self.unused.discard(name)
        return self.tensors[name].float() if name in self.tensors else None

    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The base's tensor `name`; as it is where the adapter has nothing for it, else in float32."""
        if (whole := self.take(name)) is not None:
            return whole
        if not name.endswith(".weight"):
            return tensor
        layer = name.removesuffix(".weight")
        if (rows := self.take(f"{layer}.{ROWS}")) is not None:
            return self.with_rows(layer, tensor.float(), rows)
        if (A_RI := self.take(f"{layer}.lora_A.weight")) is None:
            return tensor
        B_OR = self.take(f"{layer}.lora_B.weight")
        difference_OI = B_OR @ A_RI
        if self.start:
            difference_OI -= self.start[f"{layer}.lora_B.weight"] @ self.start[f"{layer}.lora_A.weight"]
        weight_OI = tensor.float() + self.scale(layer, len(A_RI)) * difference_OI
        if (magnitude_O := self.take(f"{layer}.lora_magnitude_vector")) is not None:
            weight_OI *= (magnitude_O / weight_OI.norm(dim=1))[:, None]
        return weight_OI

    def with_rows(self, layer: str, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """An embedding or head, its trained rows in place."""
        ids = self.config["trainable_token_indices"]
        if isinstance(ids, dict):
            ids = next(found for module, found in ids.items() if f".{layer}".endswith(f".{module}"))
        weight = weight.clone()
        weight[ids] = rows
        return weight

    def scale(self, layer: str, rank: int) -> float:
        """s of the layer; alpha_pattern may give it an alpha of its own."""
        patterns = self.config.get("alpha_pattern") or {}
        matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
        alpha = next(matching, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def check_places(self, tied: bool) -> None:
        """UserError for tensors that have no place in what is merged. tied: the base's head is its embedding."""
        if embedded := next((name for name in self.tensors if ".lora_embedding_" in name), None):
            what = f"{self.folder}: {embedded.split('.lora_')[0]}: LoRA on the embedding itself, which only peft merges"
            raise UserError(f"{what} - use its merge_and_unload()")
        if tied:
            self.leave_tied_head()

    def leave_tied_head(self) -> None:
        """Leaves the copies of what the adapter says of the embedding; UserError for a head of its own."""
        heads = [name for name in self.tensors if name.split(".")[0] == "lm_head"]
        for name in heads:
            same = [other for other in self.tensors if other.endswith(f".embed_tokens.{name.partition('.')[2]}")]
            if not same or not torch.equal(self.tensors[name], self.tensors[same[0]]):
                what = f"{self.folder}: trained the head ({name}) apart from the embedding, and in this base both are one"
                raise UserError(f"{what} - train again with --train_embeddings, which trains both as one")
            self.unused.discard(name)

    def check_all_used(self) -> None:
        """Raises UserError if the base had no place for one of the adapter's tensors."""
        left = sorted(self.unused)
        if left:
            raise UserError(f"{self.folder}: the base has no place for {listed(left, 1)} - give the base that the adapter was trained on with --base")


def plain(name: str) -> str:
    """A tensor's name without peft's wrappers."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
