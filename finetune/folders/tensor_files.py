"""Which files hold a folder's weights, and how large they may be. What is in them, shards.py reads."""

import re
from pathlib import Path

from ..errors import UserError, shortened
from . import config_files

MAX_SHARD_SIZE = "2GB"  # of the files that are written
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, in transformers' order: safetensors before .bin, one file before an index's shards."""
    for name in ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / shard for shard in shards_of(index)]
    raise UserError(
        f"{folder}: no weights (model.safetensors, pytorch_model.bin or an index of shards) - give a complete folder"
    )


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index lists, all of them beside it. UserError for what is no index, or none for transformers."""
    values, ending = config_files.read_json(index), Path(index.name.removesuffix(".index.json")).suffix
    try:
        names = sorted(set(values["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name == ".." or len(name.encode()) > 255]
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise UserError(f"{index}: is no index of shards ({shortened(repr(error))}) - download it again") from error
    if outside or not names:
        what = f"lists {shortened(outside[0])}, which is no file beside it" if outside else "lists no shards"
        raise UserError(f"{index}: {what} - download it again")
    if others := [name for name in names if not name.endswith(ending)]:
        raise UserError(f"{index}: lists {shortened(others[0])}, which is no {ending} file - download it again")
    if not isinstance(values.get("metadata"), dict):
        raise UserError(f'{index}: has no "metadata", without which transformers reads no index - add "metadata": {{}} to it')
    return names


def size_in_bytes(text: str) -> int:
    """ "2GB" -> 2,000,000,000. ValueError for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    if not found or float(found[1]) <= 0:
        raise ValueError(f'"{text}" is no size - give for example 2GB, 500MB, 4GiB')
    return int(float(found[1]) * UNITS[found[2]])


def max_shard_bytes(text: str) -> int:
    """--max_shard_size in bytes; UserError for what is no size."""
    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise UserError(f"--max_shard_size: {error}") from error
