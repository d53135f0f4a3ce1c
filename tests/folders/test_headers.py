"""Headers of safetensors files: what is damaged is named, and what safetensors itself opens passes."""

import errno
import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import UserError
from finetune.folders import headers
from finetune.folders.shards import Shards


def write(path, header: dict | bytes, data: bytes = bytes(32)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 16), "b": entry(16, 32)}
DAMAGED = {
    "overlapping": (GOOD | {"b": entry(8, 24), "c": entry(24, 32, (2,))}, "b overlaps the tensor before it"),
    "a gap": ({"a": entry(0, 8, (2,)), "b": entry(16, 32)}, "b leaves a gap before it"),
    "another size": (GOOD | {"b": entry(16, 32, (5,))}, "b takes 16 bytes, which is not [5] of F32"),
    "another type": (GOOD | {"b": entry(16, 32, dtype="F99")}, "b is of the unknown type F99"),
    "a negative shape": (GOOD | {"b": entry(16, 32, (-2, -2))}, "b has the shape [-2, -2]"),
    "no texts": (GOOD | {"__metadata__": {"format": 1}}, "__metadata__ holds more than texts"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_wrong_with_a_header_is_named(name, tmp_path):
    header, fault = DAMAGED[name]
    path = write(tmp_path / "model.safetensors", header)
    for read in (headers.tensors_of, lambda path: Shards(path.parent)):
        with pytest.raises(UserError) as error:
            read(path)
        assert error.value.findings == [f"{path}: its header is damaged ({fault}) - download it again"]


@pytest.mark.parametrize("header", [b"", b"[1]", b'{"a": 1}', b'{"a":' * 100_000, b'{"a": {"data_offsets": []}}', b"\xff\xfe{}"])
def test_what_is_no_header(header, tmp_path):
    path = write(tmp_path / "model.safetensors", header)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        headers.tensors_of(path)


def test_a_header_longer_than_any_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + bytes(100))
    with pytest.raises(UserError, match=r"not a whole safetensors file \(108 bytes\) - download it again"):
        headers.tensors_of(path)


def test_every_type_that_safetensors_writes_passes(tmp_path):
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
             torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
    tensors = {str(kind): torch.zeros(3, 5).to(kind) for kind in types} | {"empty": torch.zeros(0, 4), "one": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert headers.tensors_of(tmp_path / "model.safetensors") == {name: list(tensor.shape) for name, tensor in tensors.items()}


def test_a_cut_bin_file_is_no_advice_to_run_code(tmp_path):
    for since_1_6 in (True, False):
        path = tmp_path / "pytorch_model.bin"
        torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=since_1_6)
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(UserError) as error:
            Shards(tmp_path)
        assert error.value.findings == [f"{path}: damaged, or holds more than tensors - download it again"]


def test_what_is_pickled_in_a_bin_file_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    for since_1_6 in (True, False):
        torch.save({"a": torch.ones(3), "b": Payload()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=since_1_6)
        with pytest.raises(UserError, match="holds more than tensors"):
            Shards(tmp_path)
    assert not (tmp_path / "was_run").exists()


def test_an_index_names_files_beside_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../x.safetensors", "/etc/passwd", "sub/x.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="which is no file beside it - download it again"):
            Shards(tmp_path)


PLACES = {"a": "1.safetensors", "b": "2.safetensors"}
INDEXES = {  # what is in the index: what is said of it; None: it is read
    '{"metadata": {}, "weight_map": {}}': "lists no shards - download it again",
    "{}": "is no index of shards (KeyError('weight_map')) - download it again",
    '{"metadata": {}, "weight_map": null}': "is no index of shards (AttributeError(",
    '{"metadata": {}, "weight_map": ["1.safetensors"]}': "is no index of shards (AttributeError(",
    '{"metadata": {}, "weight_map": {"a": 1}}': "is no index of shards (TypeError(",
    '{"metadata": {}, "weight_map": {"a": ["1.safetensors"]}}': "is no index of shards (TypeError(",
    '{"metadata": {}, "weight_map": {"a": "\\ud800.safetensors"}}': "is no index of shards (UnicodeEncodeError(",
    '{"metadata": {}, "weight_map": {"a": "1.bin"}}': "lists 1.bin, which is no .safetensors file - download it again",
    json.dumps({"weight_map": PLACES}): 'has no "metadata", without which transformers reads no index - add "metadata": {} to it',
    json.dumps({"metadata": None, "weight_map": PLACES}): 'has no "metadata", without which',
    json.dumps({"metadata": {}, "weight_map": PLACES}): None,
}


@pytest.mark.parametrize("content,said", INDEXES.items())
def test_an_index_of_another_shape(tmp_path, content, said):
    for name in PLACES:
        save_file({name: torch.ones(2)}, tmp_path / PLACES[name])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    if said is None:
        with Shards(tmp_path) as shards:
            assert sorted(shards) == ["a", "b"]
        return
    with pytest.raises(UserError, match=re.escape(f"{index}: {said}")):
        Shards(tmp_path)


def test_weights_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read \(Permission denied\) - change whose it is or its modes"):
        headers.tensors_of(tmp_path / "model.safetensors")
