"""A folder written tensor by tensor is the one that save_pretrained writes."""

import filecmp
import json

import pytest
import torch
from tiny import small_checkpoint, tiny_later_qwen
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import qwen_model
from finetune.folders import model_writer
from finetune.folders.shards import Shards, read_tensors
from finetune.model import loading
from finetune.steps import saving
from finetune.writing.new_folder import new_folder


@pytest.fixture(params=["qwen", "qwen2, tied"])
def base(request, tmp_path):
    qwen_model.register()
    folder = tmp_path / "base"
    return small_checkpoint(folder) if request.param == "qwen" else tiny_later_qwen(folder, tied=True)


def written(base, out, tensors, max_bytes=10**9):
    tokenizer, skeleton = loading.load_tokenizer(base), model_writer.skeleton(AutoConfig.from_pretrained(base))
    with new_folder(out) as folder:
        settings = GenerationConfig.from_pretrained(base)
        model_writer.write_frame(folder, skeleton, tokenizer, settings, torch.float32, {"a": 1}, "card\n")
        assert (folder / "config.json").is_symlink()  # killed from here on, it does not load
        model_writer.write_weights(folder, tensors, max_bytes, model_writer.tensor_shapes(skeleton))


def test_the_folder_is_the_one_that_save_pretrained_writes(base, tmp_path):
    saving.save_model(
        AutoModelForCausalLM.from_pretrained(base), loading.load_tokenizer(base), tmp_path / "a", record={"a": 1}
    )
    with Shards(base) as shards:
        written(base, tmp_path / "b", ((name, shards[name]) for name in shards))
    compared = filecmp.dircmp(tmp_path / "a", tmp_path / "b")
    assert (compared.left_only, compared.right_only) == ([], ["README.md"])
    different = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", compared.common_files, shallow=False)[1:]
    assert set(different[0]) <= {"model.safetensors", "training.json"} and not different[1]  # order of tensors; the list of files
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in "ab"]
    assert set(records[0].pop("files")) == {path.name for path in (tmp_path / "a").iterdir()} - {"training.json"}
    assert records[0] == records[1]
    expected = dict(read_tensors(tmp_path / "a"))
    found = dict(read_tensors(tmp_path / "b"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)


def test_what_does_not_fit_the_model_is_not_written(base, tmp_path):
    with Shards(base) as shards:
        names = list(shards)
        cases = {
            "1 tensors were not made, the first is ": names[1:],
            "is not expected": [*names, "more"],
            r"should be \[": ["wrong", *names[1:]],
        }
        for line, asked in cases.items():
            take = {"more": ("more", torch.zeros(1)), "wrong": (names[0], torch.zeros(1))}
            with pytest.raises(RuntimeError, match=line):
                written(base, tmp_path / "out", (take.get(name) or (name, shards[name]) for name in asked))
            assert not list(tmp_path.glob("out*"))
