"""Tensors one at a time: every kind of folder is read alike, and shards have the sizes asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.folders.shards import Shards, ShardWriter
from finetune.folders.tensor_files import size_in_bytes, weight_files

TENSORS = {name: torch.full((4, 8), float(i)) for i, name in enumerate("abcde")}  # 128 bytes each


def test_sizes():
    assert [size_in_bytes(text) for text in ("2GB", "2048 mb", "1.5GiB")] == [2_000_000_000, 2_048_000_000, 3 * 2**29]
    for text in ("2", "GB", "-1GB", "0GB", "2 bytes"):
        with pytest.raises(ValueError, match="give for example 2GB"):
            size_in_bytes(text)


@pytest.mark.parametrize("max_bytes,files", [(10**6, 1), (300, 3), (1, 5)])
def test_what_is_written_is_read(tmp_path, max_bytes, files):
    writer = ShardWriter(tmp_path, max_bytes)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.close()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files and all(load_file(shard) for shard in shards)
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (files > 1)
    if files > 1:
        assert json.loads(index.read_text())["metadata"]["total_size"] == 5 * 128
        assert [shard.name for shard in shards][-1] == f"model-{files:05d}-of-{files:05d}.safetensors"
    with Shards(tmp_path) as found:
        assert list(found) == list(TENSORS) and "a" in found and "z" not in found
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
        assert found.shape("a") == [4, 8]


def test_bin_files(tmp_path):
    torch.save({name: TENSORS[name] for name in "ab"}, tmp_path / "pytorch_model-1.bin")
    torch.save({name: TENSORS[name] for name in "cde"}, tmp_path / "pytorch_model-2.bin")
    places = dict.fromkeys("ab", "pytorch_model-1.bin") | dict.fromkeys("cde", "pytorch_model-2.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with Shards(tmp_path) as found:
        assert sorted(found) == sorted(TENSORS) and found.shape("d") == [4, 8]
        assert torch.equal(found["d"], TENSORS["d"])


def test_a_missing_shard(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "1.safetensors")
    places = {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with pytest.raises(UserError, match="2.safetensors, which its index lists, is missing - download it again"):
        Shards(tmp_path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="no weights"):
        weight_files(tmp_path)
