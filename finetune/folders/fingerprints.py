"""Fingerprints of models and adapters: which base an adapter belongs to, told without reading all of it."""

import hashlib
import json
from pathlib import Path

from . import config_files, quant_settings

SPOTS, RUN = 16, 8  # places in each tensor that a fingerprint looks at, and values at each


def of_model(folder: Path) -> dict:
    """Identifies a base model: its sizes, a hash of the first values of every tensor, and one of values spread over them.

    Sharding and file format do not matter, nor does a type that holds the same values. What differs between a model and
    its fine-tuned sister differs nearly everywhere; a few values changed by hand may lie between the places looked at.
    """
    config = config_files.read_json(folder / "config.json")
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    found = {key: config.get(key) for key in keys} | {"sha256": hash_of_tensors(folder), "spread": hash_of_spread(folder)}
    quantization = quant_settings.as_record(quant_settings.of_folder(folder))
    return found | ({"quantization": quantization} if quantization else {})


def of_adapter(folder: Path) -> str:
    """SHA-256 of an adapter's tensors and settings, without the path of its base."""
    settings = config_files.read_json(folder / "adapter_config.json")
    settings["base_model_name_or_path"] = None
    return hashlib.sha256((hash_of_tensors(folder) + json.dumps(settings, sort_keys=True)).encode()).hexdigest()


def hash_of_tensors(folder: Path) -> str:
    """SHA-256 of the names, shapes and first values of all tensors."""
    return hash_of_lines(beginnings(folder))


def hash_of_spread(folder: Path) -> str:
    """SHA-256 of names, shapes and values all over the tensors: SPOTS places in each, evenly spread, RUN values at each."""
    from .shards import Shards  # which imports torch

    with Shards(folder) as shards:
        return hash_of_lines(spread(name, shards) for name in shards)


def hash_of_lines(lines) -> str:
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode())
    return digest.hexdigest()


def beginnings(folder: Path, values: int = 8):
    """A line for each tensor: name, shape, first values. Reads a few bytes of each, not the file."""
    from .shards import Shards  # which imports torch

    with Shards(folder) as shards:
        for name in shards:
            shape = shards.shape(name)
            yield beginning(name, shape, shards.slice(name)[:1] if shape else shards[name], values)


def beginning(name: str, shape: list[int], tensor, values: int) -> str:
    return f"{name} {shape} {tensor.flatten()[:values].double().tolist()}\n"


def spread(name: str, shards) -> str:
    """A line with a tensor's shape and values at places that its shape decides, the last one its end. Reads these values alone."""
    shape = shards.shape(name)
    if not shape or 0 in shape:
        return f"{name} {shape}\n"
    part, rows, width = shards.slice(name), shape[0] if len(shape) > 1 else 1, shape[-1]
    places, found = [spot * (rows * width - 1) // (SPOTS - 1) for spot in range(SPOTS)], []
    for row, column in (divmod(place, width) for place in places):
        begin = min(column, max(0, width - RUN))
        run = slice(begin, begin + RUN)
        values = part[run] if len(shape) == 1 else part[row : row + 1, ..., run]
        found += values.flatten()[:RUN].double().tolist()
    return f"{name} {shape} {found}\n"


def is_same(one: dict, other: dict) -> bool:
    """Whether two fingerprints are of the same base. An older one has no "spread": then the first values decide."""
    if "spread" in one and "spread" in other:
        return one == other
    return {**one, "spread": None} == {**other, "spread": None}


def short(print_: dict, beside: dict) -> str:
    """A fingerprint in short, with what both have in common: to be compared with `beside`, and shown."""
    both = "spread" in print_ and "spread" in beside
    return print_["sha256"][:12] + (f"-{print_['spread'][:8]}" if both else "")


def describe(print_: dict) -> str:
    """A fingerprint in words."""
    sizes = (
        f"hidden size {print_['hidden_size']}, {print_['num_hidden_layers']} layers, vocabulary {print_['vocab_size']}"
    )
    return f"{print_['model_type']}, {sizes}, fingerprint {print_['sha256'][:12]}" + (f"-{print_['spread'][:8]}" if "spread" in print_ else "")
