"""NF4 (4-bit normal floats, Dettmers et al., 2023) with bitsandbytes: quantized while a checkpoint is loaded."""

import torch
from transformers import BitsAndBytesConfig


def config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The blocks' linear layers in NF4, their scales quantized once more; embedding and head as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],  # "int8" in name only: of all kinds
    )


def adjust(model):
    """The same numbers in training and evaluation, on every machine."""
    for layer in layers(model):
        layer.compute_type_is_set = True  # else the first input decides, under autocast a float32 one
        layer.support_avx512bf16_for_cpu = False  # else evaluating on such a CPU repacks the weights for good
    return model


def layers(model) -> list:
    """The quantized layers."""
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]
