"""The tensors of a checkpoint, read one at a time and written shard by shard: memory holds a shard, never a model."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import json_text
from ..errors import UserError, shortened
from . import headers, tensor_files


class Shards:
    """A folder's tensors by name, from safetensors or .bin files; each is read when it is asked for.

    names are in the order of the files. Use it in a with statement: it keeps the files open.
    """

    def __init__(self, folder: Path):
        self.folder, self.open_files, self.files = folder, contextlib.ExitStack(), {}
        for path in tensor_files.weight_files(folder):
            if not path.is_file():
                raise UserError(f"{folder}: {path.name}, which its index lists, is missing - download it again")
            if path.suffix == ".safetensors":
                file = self.open_files.enter_context(opened(path))
            else:
                file = Mapped(read_bin(path))
            self.files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *failure) -> None:
        self.open_files.close()
        self.files = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """Without reading the tensor."""
        return self.slice(name).get_shape()

    def slice(self, name: str):
        """A slice object: indexing it reads a part of the tensor."""
        return self.files[name].get_slice(name)


def opened(path: Path):
    """A safetensors file, opened. UserError where it is damaged."""
    headers.tensors_of(path)  # which says what is wrong with it
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be opened ({shortened(error)}) - download it again") from error


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file: mapped, or read whole in the format of before torch 1.6. Never runs what is pickled in it.

    Raises UserError for a damaged file, or one that holds more than tensors.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # of the unpickler, whatever the bytes make it do; its advice is to let the file run code
        raise UserError(f"{path}: damaged, or holds more than tensors - download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: holds more than tensors by their names - give a file of weights alone")
    return tensors


class Mapped(dict):
    """The tensors of a memory-mapped .bin file, with the methods of safetensors' files."""

    def get_tensor(self, name: str) -> torch.Tensor:
        return self[name]

    def get_slice(self, name: str) -> "MappedSlice":
        return MappedSlice(self[name])


class MappedSlice:
    """A tensor's shape and parts, without reading all of it, as safetensors' slices have them."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index) -> torch.Tensor:
        return self.tensor[index]


class ShardWriter:
    """Writes tensors into `folder` as model.safetensors, or where they take more than max_bytes, as shards with an index.

    A tensor larger than that gets a shard of its own. close() gives the files their names.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.shard: dict[str, torch.Tensor] = {}
        self.bytes, self.total = 0, 0
        self.written: list[list[str]] = []  # names, shard by shard

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.shard and self.bytes + size > self.max_bytes:
            self.flush()
        self.shard[name] = tensor.contiguous()
        self.bytes, self.total = self.bytes + size, self.total + size

    def flush(self) -> None:
        """Writes the collected tensors as one shard."""
        save_file(self.shard, self.part(len(self.written)), metadata={"format": "pt"})
        self.written.append(list(self.shard))
        self.shard, self.bytes = {}, 0

    def part(self, number: int) -> Path:
        """A shard's path while the number of shards is not known yet."""
        return self.folder / f"part-{number}.safetensors"

    def close(self) -> None:
        if self.shard:
            self.flush()
        count, weight_map = len(self.written), {}
        for number, names in enumerate(self.written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            os.replace(self.part(number), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            json_text.write(self.folder / "model.safetensors.index.json", index)


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of a folder, one at a time."""
    with Shards(folder) as shards:
        for name in shards:
            yield name, shards[name]


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that a folder's weights are stored in."""
    return next(tensor.dtype for _, tensor in read_tensors(folder) if tensor.is_floating_point())
