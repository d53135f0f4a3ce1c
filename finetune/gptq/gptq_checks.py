"""Checks before quantizing that need only config.json and the flags; and the tensor-parallel sizes that fit."""

import shlex
from pathlib import Path

from ..errors import Findings, UserError
from ..folders import config_files, model_folder, quant_settings
from ..model import whole_base
from ..quantized import quantized_model
from ..writing import new_folder
from .settings import FEW, MANY

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # that gptqmodel makes
ROW_PARALLEL = ("c_proj", "o_proj", "down_proj")  # tensor parallelism shares out their inputs; of all others, outputs


def check_quantizing(folder: Path, out: Path, settings, samples: int, max_length: int) -> None:
    """Raises one UserError with all findings. folder: of the model; samples, max_length: of the calibration."""
    findings = Findings()
    with findings:
        new_folder.check_free(out, "the quantized model", folder)
    with findings:
        check_model(folder)
        check_widths(layers_of(folder), settings)
    with findings:
        check_numbers(settings, samples, max_length)
    with findings:
        quantized_model.check_packages(quant_settings.Quantization("gptq", settings.bits))
    findings.raise_if_any()


def check_model(folder: Path) -> None:
    """UserError unless the folder is a complete 16-bit Qwen."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds a LoRA adapter - merge first: python -m finetune.merge {shlex.quote(str(folder))} MERGED")
    if found := quant_settings.of_folder(folder):
        plain = quant_settings.sibling(folder)
        named = f" ({plain})" if plain != config_files.name_of(folder) else ""
        what = f"{folder}: is already quantized ({found})"
        raise UserError(f"{what} - give the 16-bit model that it was made from{named}")
    if problems := model_folder.first_problems(folder):
        raise UserError(*problems)
    kind = config_files.config_of(folder).get("model_type")
    if kind not in model_folder.TRAINED_TYPES:
        known = ", ".join(model_folder.TRAINED_TYPES)
        raise UserError(f"{folder}: is of model type {kind} - give a Qwen of one of these: {known}")


def check_values(folder: Path) -> None:
    """Checks of config.json that need torch, whose import takes seconds: called after all other checks."""
    if problems := model_folder.value_problems(folder) or whole_base.problems(folder):
        raise UserError(*problems)


def check_numbers(settings, samples: int, max_length: int) -> None:
    """UserError for settings that are out of range for every model."""
    findings = []
    if settings.bits not in quant_settings.GPTQ_BITS:
        findings.append(f"--bits {settings.bits}: the format holds 2, 3, 4 or 8 bits - give one of these")
    if settings.group_size not in (-1, *GROUP_SIZES):
        sizes = f"{', '.join(map(str, GROUP_SIZES))}, and -1 for one group"
        findings.append(f"--group-size {settings.group_size}: gptqmodel knows {sizes} - give one of these")
    if not 0 < settings.damp_percent < 1:
        findings.append(f"--damp_percent {settings.damp_percent}: out of range - give a value between 0 and 1: 0.01")
    if samples < 1:
        findings.append(f"--samples {samples}: nothing to calibrate on - give {FEW} to {MANY}")
    if max_length < 16:
        findings.append(f"--max_len {max_length}: no room for a conversation - give at least 16 tokens")
    if findings:
        raise UserError(*findings)


# ---- sizes


def layers_of(folder: Path) -> dict[str, list[int]]:
    """{layer: [outputs, inputs]} of what is quantized in a model's folder. No weight is read."""
    endings = tuple(f".{name}.weight" for name in model_folder.block_layers(config_files.config_of(folder).get("model_type")))
    found = {name: shape for name, shape in model_folder.shapes(folder).items() if name.endswith(endings)}
    if found:
        return {name.removesuffix(".weight"): shape for name, shape in found.items()}
    from . import gptq_tensors  # with torch: of .bin files only the model itself tells

    skeleton = gptq_tensors.skeleton(folder)
    return {name: list(layer.weight.shape) for name, layer in gptq_tensors.quantized_layers(skeleton).items()}


def check_widths(layers: dict[str, list[int]], settings) -> None:
    """UserError unless groups divide the layers' input widths, and packed rows and columns fill whole 32-bit words."""
    bits, size = settings.bits, settings.group_size
    inputs = sorted({shape[1] for shape in layers.values()})
    if bits not in quant_settings.GPTQ_BITS or size not in (-1, *GROUP_SIZES):
        return  # said elsewhere
    findings = []
    if size != -1 and any(width % size for width in inputs):
        fitting = [str(group) for group in GROUP_SIZES if not any(width % group for width in inputs)]
        listed, remedy = " and ".join(map(str, inputs)), " or ".join([*fitting, "-1 (one group)"])
        findings.append(f"--group-size {size}: does not divide the layers' input widths ({listed}) - give {remedy}")
    widths = {width for shape in layers.values() for width in shape}
    if odd := sorted(width for width in widths if width * bits % 32):
        fitting = [str(bits) for bits in quant_settings.GPTQ_BITS if not any(width * bits % 32 for width in widths)]
        remedy = f"give --bits {' or '.join(fitting)}" if fitting else "give another model: this one cannot be packed"
        listed = ", ".join(map(str, odd))
        findings.append(f"--bits {bits}: widths of {listed} do not fill whole 32-bit words - {remedy}")
    if findings:
        raise UserError(*findings)


def tensor_parallel_sizes(folder: Path, settings) -> list[int]:
    """The tensor-parallel sizes that split no head, no packed word and no group."""
    from . import gptq_tensors

    config, layers = gptq_tensors.config_of(folder), layers_of(folder)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return [
        size
        for size in range(1, heads + 1)
        if heads % size == 0
        and (kv_heads % size == 0 or size % kv_heads == 0)
        and all(shared_out(name, shape, size, kv_heads, settings) for name, shape in layers.items())
    ]


def shared_out(name: str, shape: list[int], size: int, kv_heads: int, settings) -> bool:
    """Whether one layer can be split over `size` GPUs."""
    outputs, inputs = shape
    row_parallel = name.endswith(ROW_PARALLEL)
    if name.endswith(("k_proj", "v_proj")):
        size = min(size, kv_heads)  # beyond that, key and value are copied
    width = inputs if row_parallel else outputs // 3 if name.endswith("c_attn") else outputs
    unit = settings.group_size if row_parallel and settings.group_size != -1 else 1
    return width % size == 0 and width // size % unit == 0 and width // size * settings.bits % 32 == 0


