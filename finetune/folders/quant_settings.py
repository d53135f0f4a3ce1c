"""How a folder's weights are quantized, read from its json files."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, shortened
from . import config_files

GPTQ_BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")  # how zero points are stored: less one, or as they are
WORKS = "this toolkit trains over GPTQ (2, 3, 4 or 8 bits), and over a 16-bit checkpoint with --q_lora --quant nf4"


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized. group_size: input rows that share a scale, -1 for all of them."""

    method: str  # gptq, nf4, or what else a folder names
    bits: int
    group_size: int = 128
    symmetric: bool = True
    desc_act: bool = False  # rows grouped by their activations' size, not in order
    format: str = "gptq"

    def __str__(self) -> str:
        return "NF4, double quantization" if self.method == "nf4" else f"{self.method.upper()} Int{self.bits}"


NF4 = Quantization("nf4", 4, group_size=64)


def of_folder(folder: Path) -> Quantization | None:
    """What a checkpoint's folder says of its quantization; None for plain weights. UserError if it cannot be read."""
    settings, source = settings_of(folder)
    if not settings:
        return None
    method = str(settings.get("quant_method", "gptq" if source == "quantize_config.json" else "?")).lower()
    if method != "gptq":
        return Quantization(method, 0)
    values = {"bits": settings.get("bits"), "group_size": settings.get("group_size", 128)}
    if wrong := [key for key, value in values.items() if type(value) is not int]:
        what = f"{folder}/{source}: {wrong[0]} is {shortened(json.dumps(values[wrong[0]]))}, not a whole number"
        raise UserError(f"{what} - take the file of the published checkpoint")
    return Quantization(
        "gptq",
        **values,
        symmetric=bool(settings.get("sym", True)),
        desc_act=bool(settings.get("desc_act", False)),
        format=str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower(),
    )


def settings_of(folder: Path) -> tuple[dict, str]:
    """(the quantization's settings or {}, the file that holds them). quantize_config.json is the older place."""
    settings = config_files.config_of(folder).get("quantization_config")
    if settings is None and (folder / "quantize_config.json").is_file():
        return config_files.read_json(folder / "quantize_config.json"), "quantize_config.json"
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{folder}/config.json: quantization_config is no JSON object - take the published file")
    return settings or {}, "config.json"


def folder_problems(folder: Path) -> list[str]:
    """A finding for a quantized folder of a kind that cannot be trained over or loaded here."""
    found = of_folder(folder)
    if found is None:
        return []
    if found.method != "gptq":
        return [f"{folder} is quantized ({shortened(found.method)}) - give another checkpoint: {WORKS}"]
    if found.bits not in GPTQ_BITS or found.format not in FORMATS:
        what = f"{folder} is quantized (GPTQ, {found.bits} bits, format {shortened(found.format)})"
        return [f"{what} - give another checkpoint: {WORKS}"]
    return []


def needs_q_lora(folder: Path) -> str:
    """The line for --use_lora or full-parameter training on a quantized folder."""
    name, plain = config_files.name_of(folder), sibling(folder)
    other = f", or give the 16-bit checkpoint ({plain})" if plain != name else ""
    return f"{folder} is GPTQ-quantized: use finetune_qlora_*.sh (--q_lora){other}"


def sibling(folder: Path) -> str:
    """The 16-bit checkpoint's name: the folder's own without -Int4, -GPTQ-Int8 and the like."""
    return re.sub(r"-(GPTQ-)?Int[48]$", "", config_files.name_of(folder))


def may_take(made_for: dict, base: dict, folder: Path) -> bool:
    """May an adapter be put onto another base than its own: the 16-bit sibling of its quantized one?

    made_for, base: fingerprints (checkpoint.fingerprint); folder: of `base`. Quantizing changes every weight a little and no
    size, so an adapter trained over the quantized model fits.
    """
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    same = all(made_for.get(key) == base.get(key) for key in sizes)
    return same and made_for.get("quantization") is not None and of_folder(folder) is None


def as_record(quantization: Quantization | None) -> dict | None:
    """As it stands in a run's record and in a base's fingerprint."""
    return quantization and dataclasses.asdict(quantization)
