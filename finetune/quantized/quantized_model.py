"""Q-LoRA's frozen weights: GPTQ checkpoints as they lie on disk, or NF4 made while a 16-bit checkpoint is loaded.

What a folder is, and what does not go together with it, is read from its json files; weights are loaded last.
"""

import importlib.metadata
import re
from pathlib import Path

from ..compat import on_torch
from ..compat.on_gptqmodel import contained
from ..errors import UserError
from ..folders import config_files, output_folder, quant_settings
from ..folders.quant_settings import NF4, Quantization
from ..quiet import errors_only

PACKAGES = {"gptq": ("gptqmodel", "optimum"), "nf4": ("bitsandbytes",)}


def of_run(folder: Path, lora) -> Quantization | None:
    """What the weights of a run are: as the folder has them, or NF4 where --quant asks for it."""
    return quant_settings.of_folder(folder) or (NF4 if lora.q_lora and lora.quant == "nf4" else None)


# ---- what cannot work. Each yields findings, from the json files and the flags alone


def flag_problems(lora) -> list[str]:
    """A finding for --quant without --q_lora."""
    if lora.quant == "none" or lora.q_lora:
        return []
    return [f"--quant {lora.quant}: quantized weights are trained over with LoRA only - add --q_lora"]


def run_problems(folder: Path, lora) -> list[str]:
    """Findings for --q_lora on this folder and with the other flags of `lora`."""
    found = quant_settings.of_folder(folder)
    if found is None and lora.quant == "none":
        name = config_files.name_of(folder)
        infix = "" if config_files.config_of(folder).get("model_type") == "qwen" else "-GPTQ"  # as published ones are called
        published = f"{name}{infix}-Int4" if re.fullmatch(r"Qwen[\w.-]*-(Chat|Instruct)", name) else "a published ...-Int4"
        return [f"{folder} is not quantized - add --quant nf4, or give a GPTQ model: {published}, or what run_gptq.py makes of this one"]
    if found is not None and lora.quant != "none":
        return [f"--quant {lora.quant}: {folder} is quantized already ({found}) - leave out --quant"]
    return quant_settings.folder_problems(folder) or missing_packages(found or NF4)


def missing_packages(quantization: Quantization) -> list[str]:
    """One line with the pip command, or nothing."""
    missing = [name for name in PACKAGES[quantization.method] if not installed(name)]
    pip = f"pip install {' '.join(missing)}"
    return [f"{quantization} needs {' and '.join(missing)}, not installed here - {pip}"] if missing else []


def installed(package: str) -> bool:
    """Whether a package is installed. Imports nothing."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def check_packages(quantization: Quantization) -> None:
    """UserError where something is missing: for folders that come without a command line to check."""
    if missing := missing_packages(quantization):
        raise UserError(*missing)


# ---- adapters and their bases


def of_adapter(adapter: Path) -> Quantization | None:
    """NF4 if an adapter's record says that it was trained over that. (A GPTQ base says so itself.)"""
    over = (output_folder.read_record(adapter).get("method") or {}).get("quantization") or {}
    return NF4 if over.get("method") == "nf4" else None


# ---- loading


def packed_away(model) -> int:
    """How many more weights the quantized layers have than their parameters have elements."""
    total = 0
    for module in model.modules():
        gptq = "g_idx" in module._buffers  # whose weights are buffers
        packed = module._parameters.get("weight")  # not by name: a wrapper may compute one
        nf4 = type(packed).__name__ == "Params4bit"  # two to a byte
        if gptq or nf4:
            total += module.in_features * module.out_features - (packed.numel() if nf4 else 0)
    return total


def leave_to_each_rank(model) -> None:
    """Keeps DistributedDataParallel from broadcasting quantized weights: at the start, and GPTQ's buffers before each pass.

    model: as it will be wrapped. Every rank has loaded the same file.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    names = [*frozen, *(name for name, _ in model.named_buffers())]
    on_torch.ignore_in_ddp(model, names)


def load(folder: Path, quantization: Quantization, dtype, device, **settings):
    """The model on `device`, frozen weights quantized, all else in `dtype` ("auto": as stored). settings: for from_pretrained.

    Gradients flow through the quantized layers to what lies before them; nothing of the quantized layers trains.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

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
