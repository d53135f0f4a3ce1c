"""Does an adapter fit its base? Put onto the base's model without weights, by peft itself, before any weight of the base is loaded.

What adapter_config.json asks for (a pattern of layers, layers by number or left out, ranks by pattern) may be right in itself and mean
no layer of this base, or fewer than the file has tensors for: these peft would pass over.
"""

import re
from pathlib import Path

from ..errors import UserError, shortened
from ..folders import config_files, model_folder
from ..folders.adapter_folder import PREFIX
from . import whole_base

FACTORS = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.weight)?$")
PATTERNS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")


def check(base: Path, adapter: Path) -> None:
    """Raises UserError for an adapter that peft cannot put onto the base, or whose A and B lie elsewhere or have other shapes.

    adapter: a folder that adapter_files.check() lets pass. Half a second for a model of 80 layers.
    """
    remedy = "give the base that it was trained on, or the settings as the run wrote them"
    asked = settings_in_words(adapter)
    try:
        expected = factors(of_model(base, adapter))
    except Exception as error:  # whatever a setting makes of peft's classes
        what = f"{adapter}/adapter_config.json: cannot be put onto {base} ({shortened(error, 200)}{layers_of(base)})"
        raise UserError(f"{what} - {remedy}") from error
    found = factors(stored_shapes(adapter))
    for name in (*found, *expected):
        if name not in expected:
            raise UserError(f"{adapter}: has {shortened(name)}, for which {base} has no place with {asked} - {remedy}")
        if name not in found:
            raise UserError(f"{adapter}: misses {name}, which {base} needs with {asked} - {remedy}")
        if found[name] != expected[name]:
            what = f"{adapter}: does not fit {base} ({name} is {found[name]}, not {expected[name]})"
            raise UserError(f"{what} - {remedy}")


def of_model(base: Path, adapter: Path) -> dict[str, list[int]]:
    """{name: shape} of what peft would store of such an adapter on the base."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    from ..lora import adapters

    settings = PeftConfig.from_pretrained(adapter)
    settings.init_lora_weights = True  # whatever it began with, the shapes are the same
    settings.trainable_token_indices = None  # rows are checked by name; peft would read the embedding's numbers
    with torch.device("meta"):
        adapted = adapters.apply_peft(lambda: get_peft_model(whole_base.without_weights(base), settings))
        stored = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: list(tensor.shape) for name, tensor in stored.items()}


def factors(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The A and B among them, without peft's prefix and its `.base_layer`, which peft before 0.6 did not write."""
    return {name.removeprefix(PREFIX).replace(".base_layer.", "."): shape for name, shape in shapes.items() if FACTORS.search(name)}


def stored_shapes(adapter: Path) -> dict[str, list[int]]:
    from ..folders.shards import Shards  # with torch

    with Shards(adapter) as shards:
        return {name: shards.shape(name) for name in shards}


def settings_in_words(adapter: Path) -> str:
    """The settings that say which layers are adapted: "target_modules ['c_attn'], layers_to_transform [0]"."""
    config = config_files.read_json(adapter / "adapter_config.json")
    return shortened(", ".join(f"{key} {config[key]}" for key in PATTERNS if config.get(key)) or "no target_modules", 200)


def layers_of(base: Path) -> str:
    """The base's layers, for the message."""
    there = model_folder.adaptable_layers(base)
    return f"; it has {', '.join(there)}" if there else ""
