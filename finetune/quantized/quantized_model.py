"""Q-LoRA's frozen weights: GPTQ checkpoints as they lie on disk, or NF4 made while a 16-bit checkpoint is loaded.

What a folder is, and what does not go together with it, is read from its json files; weights are loaded last.
"""

import dataclasses
import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..folders import model_folder

GPTQ_BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")  # how zero points are stored: less one, or as they are
WORKS = "this toolkit trains over GPTQ (2, 3, 4 or 8 bits), and over a 16-bit checkpoint with --q_lora --quant nf4"
PACKAGES = {"gptq": ("gptqmodel", "optimum"), "nf4": ("bitsandbytes",)}


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


# ---- what a folder is


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
        what = f"{folder}/{source}: {wrong[0]} is {json.dumps(values[wrong[0]])}, not a whole number"
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
    settings = model_folder.config_of(folder).get("quantization_config")
    if settings is None and (folder / "quantize_config.json").is_file():
        return model_folder.read_json(folder / "quantize_config.json"), "quantize_config.json"
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{folder}/config.json: quantization_config is no JSON object - take the published file")
    return settings or {}, "config.json"


def of_run(folder: Path, lora) -> Quantization | None:
    """What the weights of a run are: as the folder has them, or NF4 where --quant asks for it."""
    return of_folder(folder) or (NF4 if lora.q_lora and lora.quant == "nf4" else None)


# ---- what cannot work. Each yields findings, from the json files and the flags alone


def folder_problems(folder: Path) -> list[str]:
    """A quantized folder whose kind nothing here can train over or load."""
    found = of_folder(folder)
    if found is None:
        return []
    if found.method != "gptq":
        return [f"{folder} is quantized ({found.method}) - give another checkpoint: {WORKS}"]
    if found.bits not in GPTQ_BITS or found.format not in FORMATS:
        what = f"{folder} is quantized (GPTQ, {found.bits} bits, format {found.format})"
        return [f"{what} - give another checkpoint: {WORKS}"]
    return []


def needs_q_lora(folder: Path) -> str:
    """The line for --use_lora or full-parameter training on a quantized folder."""
    name, plain = model_folder.name_of(folder), sibling(folder)
    other = f", or give the 16-bit checkpoint ({plain})" if plain != name else ""
    return f"{folder} is GPTQ-quantized: use finetune_qlora_*.sh (--q_lora){other}"


def sibling(folder: Path) -> str:
    """What the 16-bit checkpoint is called, by the name that published ones have; its own name where that is all."""
    return re.sub(r"-(GPTQ-)?Int[48]$", "", model_folder.name_of(folder))


def flag_problems(lora) -> list[str]:
    """--quant without --q_lora."""
    if lora.quant == "none" or lora.q_lora:
        return []
    return [f"--quant {lora.quant}: quantized weights are trained over with LoRA only - add --q_lora"]


def run_problems(folder: Path, lora) -> list[str]:
    """--q_lora (lora.q_lora is True) on this folder, and with the other flags of `lora`."""
    found = of_folder(folder)
    if found is None and lora.quant == "none":
        infix = "" if model_folder.config_of(folder).get("model_type") == "qwen" else "-GPTQ"  # as published ones are called
        what = f"{folder} is not quantized"
        return [f"{what}; Q-LoRA needs an Int4 model ({model_folder.name_of(folder)}{infix}-Int4) or --quant nf4"]
    if found is not None and lora.quant != "none":
        return [f"--quant {lora.quant}: {folder} is quantized already ({found}) - leave out --quant"]
    return folder_problems(folder) or missing_packages(found or NF4)


def missing_packages(quantization: Quantization) -> list[str]:
    """One line with the pip command, or nothing."""
    missing = [name for name in PACKAGES[quantization.method] if not installed(name)]
    pip = f"pip install {' '.join(missing)}"
    return [f"{quantization} needs {' and '.join(missing)}, not installed here - {pip}"] if missing else []


def installed(package: str) -> bool:
    """Does pip know it? Nothing is imported."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def check_packages(quantization: Quantization) -> None:
    """UserError where something is missing: for folders that come without a command line to check."""
    if missing := missing_packages(quantization):
        raise UserError(*missing)


# ---- adapters and their bases


def may_take(made_for: dict, base: dict, folder: Path) -> bool:
    """May an adapter be put onto another base than its own: the 16-bit sibling of its quantized one?

    made_for, base: fingerprints (checkpoint.fingerprint); folder: of `base`. Quantizing changes every weight a little and no
    size, so an adapter trained over the quantized model fits.
    """
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    same = all(made_for.get(key) == base.get(key) for key in sizes)
    return same and made_for.get("quantization") is not None and of_folder(folder) is None


def describe(quantization: Quantization | None) -> dict | None:
    """For a run's record and a base's fingerprint."""
    return quantization and dataclasses.asdict(quantization)


def of_adapter(adapter: Path) -> Quantization | None:
    """NF4 if an adapter's record says that it was trained over that. (A GPTQ base says so itself.)"""
    from ..folders import checkpoint

    over = checkpoint.read_record(adapter).get("method", {}).get("quantization") or {}
    return NF4 if over.get("method") == "nf4" else None


# ---- loading


def packed_away(model) -> int:
    """How many weights quantized layers stand for, beyond the elements of their parameters."""
    total = 0
    for module in model.modules():
        gptq = "g_idx" in module._buffers  # whose weights are buffers
        packed = module._parameters.get("weight")  # not by name: a wrapper may compute one
        nf4 = type(packed).__name__ == "Params4bit"  # two to a byte
        if gptq or nf4:
            total += module.in_features * module.out_features - (packed.numel() if nf4 else 0)
    return total


def leave_to_each_rank(model) -> None:
    """DistributedDataParallel would send all quantized weights to every rank, and GPTQ's, which are buffers, before each pass.

    model: as it will be wrapped. Every rank has loaded the same file.
    """
    from torch.nn.parallel import DistributedDataParallel

    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    names = [*frozen, *(name for name, _ in model.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def load(folder: Path, quantization: Quantization, dtype, device, **settings):
    """The model on `device`, frozen weights quantized, all else in `dtype` ("auto": as stored). settings: for from_pretrained.

    Gradients flow through the quantized layers to what lies before them; nothing of the quantized layers trains.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..quiet import contained, errors_only

    check_packages(quantization)
    settings |= {"device_map": {"": device}, "trust_remote_code": False}
    if quantization.method == "nf4":
        from . import nf4

        return nf4.load(folder, dtype, **settings)
    with contained():
        from . import gptq_layers  # and with it gptqmodel
    with contained(), errors_only():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.quantization_config = gptq_layers.settings(quantization)
        settings |= {"config": config, "dtype": dtype, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(folder, **settings)
    return gptq_layers.adjust(model, folder, info)
