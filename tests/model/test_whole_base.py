"""A base that lacks a tensor, or has one of another shape, is told before weights are loaded; one with numbers that are none, when they are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_shards, small_checkpoint, tiny_gptq, tiny_later_qwen
from transformers import AutoModelForCausalLM

from finetune.errors import UserError
from finetune.folders import finite, model_folder
from finetune.model import loading, whole_base

FILE = "model.safetensors"


def changed(folder, change):
    """Applies change(tensors) to the folder's one file of weights."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, {"format": "pt"})


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    return {tied: tiny_later_qwen(tmp_path_factory.mktemp("later") / "base", "qwen3", tied=tied) for tied in (False, True)}


@pytest.fixture(autouse=True)
def as_it_was(later):
    before = {folder: (folder / FILE).read_bytes() for folder in later.values()}
    yield
    for folder, content in before.items():
        (folder / FILE).write_bytes(content)


@pytest.mark.parametrize("tied", [False, True])
def test_a_missing_tensor_is_named(later, tied):
    folder = later[tied]
    assert whole_base.problems(folder) == []
    changed(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    count = 24 + (not tied)
    expected = f"{folder}: misses model.layers.1.mlp.up_proj.weight of {count} tensors - download it again"
    assert whole_base.problems(folder) == [expected]
    with pytest.raises(UserError, match="misses model.layers.1.mlp.up_proj.weight"):
        loading.load_weights(folder, torch.float32, False)


def test_a_head_that_is_not_tied_must_be_there(later):
    changed(later[False], lambda tensors: tensors.pop("lm_head.weight"))
    assert "misses lm_head.weight of 25 tensors" in whole_base.problems(later[False])[0]


def test_a_wrong_shape_is_named(later):
    name = "model.layers.0.mlp.down_proj.weight"
    changed(later[True], lambda tensors: tensors.update({name: tensors[name][:, :-8]}))
    line = f"{later[True]}: {name} is [32, 56], not [32, 64] - take weights and config.json of one checkpoint"
    assert whole_base.problems(later[True]) == [line]


def test_more_tensors_and_a_model_without_its_head_are_welcome(later):
    changed(later[True], lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert whole_base.problems(later[True]) == []

    def without_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    changed(later[True], lambda tensors: tensors.pop("model.layers.0.self_attn.rotary_emb.inv_freq"))
    changed(later[True], without_prefix)
    assert whole_base.problems(later[True]) == []


def test_first_generation_and_its_bin_files(tmp_path):
    folder = small_checkpoint(tmp_path / "base")
    assert whole_base.problems(folder) == []
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    for since_1_6 in (True, False):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=since_1_6)
        assert whole_base.problems(folder) == []
        loaded = loading.load_weights(folder, torch.float32, False)
        assert torch.equal(loaded.state_dict()["lm_head.weight"], tensors["lm_head.weight"].float())
    torch.save({name: tensor for name, tensor in tensors.items() if "ln_f" not in name}, folder / "pytorch_model.bin")
    assert "misses transformer.ln_f.weight" in whole_base.problems(folder)[0]


def test_packed_tensors(tmp_path):
    folder = tiny_gptq(tmp_path / "base", published_style=False)
    assert whole_base.problems(folder) == []
    layer = "transformer.h.1.mlp.w2"
    changed(folder, lambda tensors: tensors.pop(f"{layer}.qzeros"))
    assert whole_base.problems(folder) == [f"{folder}: {layer}.qzeros is missing - take weights and config.json of one checkpoint"]
    changed(folder, lambda tensors: tensors.update({f"{layer}.qzeros": torch.zeros(1, 1, dtype=torch.int32)}))
    assert f"{layer}.qzeros is [1, 1], not [" in whole_base.problems(folder)[0]
    changed(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(layer)])
    assert f"misses {layer}.weight" in whole_base.problems(folder)[0]


def test_published_int4_folders_with_their_biases_are_whole(tmp_path):
    assert whole_base.problems(tiny_gptq(tmp_path / "base", published_style=True)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_told_with_their_tensor(later, value):
    name = "model.layers.1.self_attn.q_proj.weight"

    def spoil(tensors):
        tensors[name][3, 5] = value

    changed(later[True], spoil)
    wanted = f"{later[True]}: {name} holds infinities, or what is no number - download it again"
    with pytest.raises(UserError, match=wanted):
        loading.load_weights(later[True], torch.float32, False)
    with pytest.raises(UserError, match=wanted):
        finite.check_files(later[True], loading.NOT_FINITE)


def test_finite_numbers_whose_sum_is_not_are_no_fault(later):
    changed(later[True], lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].fill_(3e38))
    loading.load_weights(later[True], torch.float32, False)


def test_a_tokenizer_with_more_ids_than_rows(later):
    folder = later[True]
    before = (folder / "config.json").read_text()
    tokenizer = loading.load_tokenizer(folder)
    most = max(tokenizer.get_vocab().values())
    (folder / "config.json").write_text(json.dumps(json.loads(before) | {"vocab_size": most}))
    with pytest.raises(UserError, match=f"the tokenizer's ids go up to {most}, and the model has {most} rows - take both from"):
        loading.load_tokenizer(folder)
    (folder / "config.json").write_text(before)


def test_a_tokenizer_without_its_vocabulary(tmp_path):
    folder = tiny_later_qwen(tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.json, nor vocab.json with merges.txt - copy them from the published"):
        loading.load_tokenizer(folder)
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="its tokenizer loses text|its tokenizer cannot be opened"):
        loading.load_tokenizer(folder)


def test_what_is_checked_of_an_index_is_what_transformers_opens(later, tmp_path):
    """It reads no index without "metadata"; and one file rather than an index beside it, which may be of an older checkpoint."""
    whole = load_file(later[False] / FILE)
    folder = tmp_path / "shards"
    shutil.copytree(later[False], folder)
    (folder / FILE).unlink()
    save_shards(whole, folder, 2)
    index = folder / f"{FILE}.index.json"
    assert model_folder.problems(folder) == whole_base.problems(folder) == []
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.get_input_embeddings().weight, whole["model.embed_tokens.weight"])
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"]}))
    with pytest.raises(KeyError):  # if this no longer fails, "metadata" need not be asked for
        AutoModelForCausalLM.from_pretrained(folder)
    for found in (model_folder.first_problems(folder), whole_base.problems(folder)):
        assert found == [f'{index}: has no "metadata", without which transformers reads no index - add "metadata": {{}} to it']
    (folder / FILE).write_bytes((later[False] / FILE).read_bytes())
    changed(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "misses model.norm.weight" in whole_base.problems(folder)[0]
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(report["missing_keys"]) == {"model.norm.weight"}
