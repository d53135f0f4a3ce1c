"""Is a base model whole? The names and shapes of its tensors against those of the model that its config.json describes.

What a folder lacks, transformers makes up from random numbers, and what it has too much of it passes over. So both are compared
before weights are loaded: of safetensors the headers are read, and of .bin files, which have none, the tensors' sizes.
"""

import math
from pathlib import Path

from ..errors import UserError, listed, shortened
from ..folders import config_files, model_folder, quant_settings


def check(folder: Path) -> None:
    """Raises UserError for a folder whose tensors are not the model's. Loads no weight; a model of 80 layers takes a second.

    More tensors than the model has are left alone: rotary frequencies of old checkpoints, the biases of published Int4 ones.
    """
    from ..folders.shards import Shards  # with torch

    expected, prefix = tensors_of_model(folder)
    with Shards(folder) as shards:
        found = {name: shards.shape(name) for name in shards}
    if prefix and not any(name.startswith(f"{prefix}.") for name in found):  # saved without its head
        found = {name if name in expected else f"{prefix}.{name}": shape for name, shape in found.items()}
    wrong = quantized_faults(folder, found, expected)
    found |= {name: shape for name, shape in model_folder.unpacked_shapes(found).items() if name in expected}
    wrong |= {name: f"is {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape}
    missing = [name for name in expected if name not in found and name not in wrong]
    if missing:
        raise UserError(f"{folder}: misses {listed(missing, 3)} of {len(expected)} tensors - download it again")
    if wrong:
        name, fault = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{folder}: {name} {fault}{more} - take weights and config.json of one checkpoint")


def problems(folder: Path) -> list[str]:
    """check() as a list of findings."""
    try:
        check(folder)
    except UserError as error:
        return error.findings
    return []


def without_weights(folder: Path):
    """The plain model that a folder's config.json describes, on the meta device. UserError where transformers makes nothing of it."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    import qwen_model

    qwen_model.register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):  # not by from_config(), which under ZeRO-3 would share it out over the ranks
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except Exception as error:  # whatever a value makes of the classes of transformers
        what = f"{folder}/config.json: describes no model ({type(error).__name__}: {shortened(error)})"
        raise UserError(f"{what} - take the file of the published checkpoint") from error


def tensors_of_model(folder: Path) -> tuple[dict[str, list[int]], str]:
    """({name: shape} of the tensors that are stored of the plain model, the prefix of their names within it).

    Raises UserError for a config.json or generation_config.json that transformers makes nothing of.
    """
    from transformers import GenerationConfig

    from ..folders import model_writer

    model = without_weights(folder)
    if (folder / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:
            what = f"{folder}/generation_config.json: cannot be used ({shortened(error)})"
            raise UserError(f"{what} - take the file of the published checkpoint") from error
    return model_writer.tensor_shapes(model), model.base_model_prefix


def quantized_faults(folder: Path, found: dict, expected: dict) -> dict[str, str]:
    """{name: what is wrong with it} of GPTQ's packed tensors; {} for plain weights. found: {name: shape} of the files."""
    settings = quant_settings.of_folder(folder)
    if settings is None or settings.method != "gptq":
        return {}
    from ..folders import gptq_format  # with torch, whose import takes seconds

    faults = {}
    packed = {name.rsplit(".", 1)[0] for name in found if name.endswith(gptq_format.PARTS)}
    for layer in sorted(packed):
        if (weight := expected.get(f"{layer}.weight")) is None:
            continue
        for name, shape in packed_shapes(layer, weight, settings).items():
            if name not in found:
                faults[name] = "is missing"
            elif found[name] != shape:
                faults[name] = f"is {found[name]}, not {shape}"
    return faults


def packed_shapes(layer: str, weight: list[int], settings) -> dict[str, list[int]]:
    """{name: shape} of what GPTQ stores for a layer's weight (outputs, inputs)."""
    outputs, inputs = weight
    groups = 1 if settings.group_size == -1 else math.ceil(inputs / max(1, settings.group_size))
    shapes = {
        "qweight": [inputs * settings.bits // 32, outputs],
        "qzeros": [groups, outputs * settings.bits // 32],
        "scales": [groups, outputs],
        "g_idx": [inputs],
    }
    return {f"{layer}.{part}": shape for part, shape in shapes.items()}


def check_rows(tokenizer, folder: Path) -> None:
    """UserError for a tokenizer that knows more tokens than the embedding has rows, by config.json."""
    rows, most = config_files.config_of(folder).get("vocab_size"), max(tokenizer.get_vocab().values(), default=0)
    if type(rows) is int and most >= rows:
        what = f"{folder}: the tokenizer's ids go up to {most:,}, and the model has {rows:,} rows"
        raise UserError(f"{what} - take both from the same checkpoint")
