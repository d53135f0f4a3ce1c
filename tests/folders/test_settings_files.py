"""Values of a wrong type, or beyond all measure, in a folder's settings are a line each; what is published passes."""

import json

import pytest
from command_lines import make_world, only, write_adapter, write_config
from tiny import small_checkpoint, tiny_later_qwen

from finetune.errors import UserError
from finetune.folders import adapter_base, adapter_files, config_files, output_folder, settings_files


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path)


def test_what_is_published_passes(tmp_path):
    assert settings_files.problems(small_checkpoint(tmp_path / "first")) == []
    assert settings_files.problems(tiny_later_qwen(tmp_path / "later")) == []
    assert settings_files.problems(write_adapter(tmp_path / "adapter")) == []


@pytest.mark.parametrize("value", ["abc", -32, 0, 10**12, 32.5, True, [32], {}])
def test_sizes_that_are_none(world, value):
    write_config(world.model, hidden_size=value)
    said = f"{world.model}/config.json: hidden_size is {value!r}, not a whole number from 1 to 10,000,000 - take the file of"
    assert only(world).startswith(said)


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id is [[1]], not a token's id or a list of ids"),
        ("generation_config.json", {"chat_format": 3}, "chat_format is 3, not a text"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}, "added_tokens_decoder is {'x': 1}, not an object of tokens"),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "weight_map is {'a': 1}, not an object of files' names"),
        ("config.json", {"rope_scaling": {"factor": [1.0, float("inf")]}}, "rope_scaling holds NaN or Infinity, which is no JSON"),
        ("generation_config.json", {"typical_p": float("nan")}, "typical_p holds NaN or Infinity, which is no JSON"),
        ("config.json", {"model_type": ["qwen"]}, "model_type is ['qwen'], not a text"),
        ("config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, not a whole number from 1 to 10,000"),
    ],
)
def test_other_values_of_a_base(world, name, content, said):
    (world.model / name).write_text(json.dumps(content))
    assert f"{world.model / name}: {said}" in only(world)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"])
def test_what_is_no_json_object(world, name):
    for content, said in ((b'{"a":' * 100_000, "nested too deeply"), (b'{"\xe9": 1}', "utf-8"), (b"[1]", "found a list"), (b"", "Expecting value")):
        (world.model / name).write_bytes(content)
        line = only(world)
        assert line.startswith(f"{world.model / name}: ") and said in line and line.endswith(" - download it again")


def test_a_link_to_nothing(world):
    (world.model / "generation_config.json").unlink()
    (world.model / "generation_config.json").symlink_to("blobs/123")
    assert only(world) == f"{world.model}/generation_config.json: a link to blobs/123, where nothing is - copy the file itself"


@pytest.mark.parametrize(
    "change,said",
    [
        ({"peft_type": "NOSUCH"}, "an adapter of type NOSUCH, not LoRA"),
        ({"r": "many"}, "r is 'many', not a whole number"),
        ({"target_modules": 7}, "target_modules is 7, not a list of layers' names, or one pattern"),
        ({"target_modules": "*.w1"}, "target_modules *.w1 is no pattern (nothing to repeat at position 0)"),
        ({"trainable_token_indices": {"wte": ["a"]}}, "trainable_token_indices is {'wte': ['a']}, not a list of ids"),
        ({"bias": "some"}, "bias is 'some', not none, all or lora_only"),
    ],
)
def test_an_adapters_settings(world, tmp_path, change, said):
    adapter = write_adapter(tmp_path / "adapter", **change)
    with pytest.raises(UserError) as error:
        adapter_base.find(adapter, str(world.model))
    assert said in error.value.findings[0] and len(error.value.findings) == 1
    assert said in only(world, "--use_lora", "--lora_weight_path", str(adapter))


def test_hashes_of_an_adapter(world, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    adapter_files.check(adapter)  # of other hands: nothing to compare with
    (adapter / "README.md").write_text("a card")
    output_folder.write_record(adapter, {"seed": 1})
    assert sorted(json.loads((adapter / "training.json").read_text())["files"]) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    (adapter / "README.md").write_text("another card")  # which changes nothing
    adapter_files.check(adapter)
    assert output_folder.read_record(adapter) == {"seed": 1}  # so no folder made of it inherits them
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    line = f"--lora_weight_path {adapter}: adapter_model.safetensors is not as it was written (another SHA-256 than in training.json) - "
    assert only(world, "--use_lora", "--lora_weight_path", str(adapter)).startswith(line)
    weights.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing, which training.json lists - copy the whole folder"):
        adapter_files.check(adapter)


def test_a_record_of_another_shape(tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "training.json").write_text('{"base": [1]}')
    with pytest.raises(UserError, match="base is .1., not an object"):
        output_folder.read_record(adapter)


@pytest.mark.parametrize("name, remedy", [
    ("config.json", "download it again"),
    ("training.json", "it is the record of the run that wrote this folder: copy the folder again, or remove the file to do without it"),
    ("trainer_state.json", "it tells how far a run was: remove this checkpoint, and go on from the one before it"),
])  # fmt: skip
@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_what_to_do_about_a_file_that_cannot_be_read(tmp_path, name, remedy, text):
    """Nobody can download what a run has written."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: .* - {remedy}$"):
        config_files.read_json(tmp_path / name)
