"""The files that hold a folder's weights, safetensors or .bin, and the tensors in them."""

import json
from pathlib import Path

from ..errors import UserError

MAX_SHARD_SIZE = "2GB"  # of the files that are written


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: the index's shards, or the one file; safetensors before .bin."""
    for name in ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / shard for shard in sorted(shards)]
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(
        f"{folder}: no weights (model.safetensors, pytorch_model.bin or an index of shards) - give a complete folder"
    )


def read_tensors(folder: Path):
    """Yields (name, tensor), one at a time; .bin files are read with weights_only."""
    import torch
    from safetensors import safe_open

    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


def stored_dtype(folder: Path):
    """The torch.dtype of a folder's weights as they lie there."""
    return next(tensor.dtype for _, tensor in read_tensors(folder) if tensor.is_floating_point())
