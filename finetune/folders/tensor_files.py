"""Which files hold a folder's weights. What is in them, shards.py reads."""

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
