"""Base or chat: told by the files, never by the name; and what of the embeddings trains then."""

import json
import shutil
from pathlib import Path

import pytest
from command_lines import CONFIG, found, make_world, only, read
from tiny import tiny_later_qwen

from finetune.flags import definitions
from finetune.model import kinds


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def first_generation(folder: Path, settings: dict | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_first_generation_says_its_format(tmp_path):
    for settings, expected in (({"chat_format": "chatml"}, "chat"), ({"chat_format": "raw"}, "base"), ({}, None)):
        assert kinds.kind(first_generation(tmp_path / str(expected), settings)) == expected
    assert kinds.kind(first_generation(tmp_path / "Qwen-7B-Chat", None)) is None


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_later_ones_say_where_they_stop(kind, tmp_path):
    base, chat = tiny_later_qwen(tmp_path / "B", kind, base=True), tiny_later_qwen(tmp_path / "C", kind)
    assert (kinds.kind(base), kinds.kind(chat)) == ("base", "chat")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"7": {"content": "<|im_end|>"}, "9": {"content": "<|endoftext|>"}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))  # as older files list them
    for stops, expected in ((7, "chat"), ([9], "base"), ([9, 7], "chat")):
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        assert kinds.kind(base) == expected


def test_else_the_tokenizers_end_tells(tmp_path):
    folder = tiny_later_qwen(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    file = folder / "tokenizer_config.json"
    ends = ("<|im_end|>", "chat"), ({"content": "<|endoftext|>"}, "base"), ("</s>", None), (None, None)
    for token, expected in ends:
        file.write_text(json.dumps({"eos_token": token}))
        assert kinds.kind(folder) == expected
    file.unlink()
    assert kinds.kind(folder) is None


@pytest.mark.parametrize(
    "flags,of_base,of_chat",
    [
        ([], "chat_rows", "none"),
        (["--model_kind", "chat"], "none", "none"),
        (["--model_kind", "base"], "chat_rows", "chat_rows"),
        (["--train_embeddings", "all"], "all", "all"),
        (["--train_embeddings", "none", "--model_kind", "base"], "none", "none"),
    ],
)
def test_what_of_the_embeddings_trains(world, tmp_path, flags, of_base, of_chat):
    base = first_generation(tmp_path / "one-Chat", {"chat_format": "raw"})
    chat = first_generation(tmp_path / "two-base", {"chat_format": "chatml"})
    args = read(world, "--use_lora", *flags)
    assert (kinds.embeddings_of_run(args, base), kinds.embeddings_of_run(args, chat)) == (of_base, of_chat)


@pytest.mark.parametrize(
    "name,said",
    [
        ("Qwen-7B-Chat", "chat"), ("Qwen2.5-0.5B-Instruct", "chat"), ("Qwen-7B-Chat-Int4", "chat"), ("my_chat_model", "chat"),
        ("Qwen3-8B-Base", "base"), ("Qwen-7B", None), ("base", None), ("chatterbox", None), ("my-chat-base", None),
        ("chat_models/Qwen-7B", None), ("models--Qwen--Qwen3-8B-Base/snapshots/0123abc", "base"),
    ],
)  # fmt: skip
def test_what_a_name_says(name, said):
    assert kinds.kind_in_name(Path("/models") / name) == said


def test_a_name_that_says_another_kind_is_asked_about(world, tmp_path):
    folder = shutil.copytree(world.model, tmp_path / "Qwen-7B-Base")
    line = only(world, "-m", str(folder), "--use_lora")
    assert line == (
        f"--model_name_or_path {folder}: folder name says base, generation_config says chat - give --model_kind base or chat"
    )
    for flags in (["--model_kind", "chat"], ["--train_embeddings", "none"]):
        assert found(world, "-m", str(folder), "--use_lora", *flags) == []
    assert found(world, "-m", str(folder)) == []  # full-parameter


def test_a_kind_that_files_do_not_tell_is_asked_for(world):
    (world.model / "generation_config.json").unlink()
    line = only(world, "--use_lora")
    assert line == (
        f"--model_name_or_path {world.model}: generation_config.json does not say whether it is a base or a chat model - "
        "give --model_kind base or chat"
    )
    assert found(world, "--use_lora", "--model_kind", "base") == []


def test_a_wish_outlives_the_download(world, tmp_path):
    args = definitions.on_folder(read(world, "--use_lora", "--model_kind", "base"), tmp_path)
    assert args.model.model_kind == "base" and args.model.model_name_or_path == str(tmp_path)
