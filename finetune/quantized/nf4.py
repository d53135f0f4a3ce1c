"""NF4 (4-bit normal floats, Dettmers et al., 2023) with bitsandbytes: quantized while a checkpoint is loaded."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ..errors import UserError, note
from ..folders import model_folder, quant_settings

BLOCK = quant_settings.NF4.group_size  # values that share a scale


def load(folder: Path, dtype: torch.dtype, **settings):
    """The blocks' linear layers in NF4, their scales quantized once more; all else in `dtype`, as embedding and head.

    Computes the same numbers in training and evaluation, on every machine. settings: for from_pretrained.
    """
    narrow = narrow_layers(folder)
    if narrow:
        note(f"{len(narrow)} layers stay unquantized: NF4 takes rows of a multiple of {BLOCK} values")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *narrow],  # "int8" in name only: of all kinds
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, **settings)
    quantized = layers(model)
    if not quantized or any(layer.in_features % BLOCK for layer in quantized):
        what = f"{folder}: --quant nf4 takes safetensors whose layers have inputs of a multiple of {BLOCK} values"
        raise UserError(f"{what} - train with --use_lora alone")
    for layer in quantized:
        layer.compute_type_is_set = True  # else the first input decides, under autocast a float32 one
        layer.support_avx512bf16_for_cpu = False  # else evaluating on such a CPU repacks the weights for good
    return model


def narrow_layers(folder: Path) -> list[str]:
    """The block layers whose rows do not end where a block of values ends.

    bitsandbytes 0.50.2 quantizes them rightly and, on the CPU, unpacks them wrongly (error 25% instead of 9%). No published
    Qwen has any.
    """
    return sorted(name for name, shape in block_matrices(folder).items() if shape[1] % BLOCK)


def block_matrices(folder: Path) -> dict[str, list[int]]:
    """{name: shape (out, in)} of the linear layers inside the model's blocks."""
    found = model_folder.shapes(folder).items()
    matrices = {name.removesuffix(".weight"): shape for name, shape in found if len(shape) == 2}
    return {name: shape for name, shape in matrices.items() if any(part.isdigit() for part in name.split("."))}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What a layer computes with in the place of its weight (out, in): quantized and unpacked again, in float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.float(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


def layers(model) -> list:
    """The quantized layers."""
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]
