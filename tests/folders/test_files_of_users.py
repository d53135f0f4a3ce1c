"""What a user has in the output folder stays: only what a run of ours wrote, by its record, is removed or replaced."""

import json
import os
from pathlib import Path

import pytest

from finetune.folders import checkpoints, output_folder
from finetune.hashing import sha256_of_file
from finetune.writing.new_folder import MARK

ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": "adapter", "tokenizer.json": "t"}
FULL = {"config.json": "{}", "model.safetensors": "full", "tokenizer.json": "t"}


def result(out: Path, files: dict[str, str], record: dict | None = None) -> None:
    """A result of these files, as save_final writes one."""
    staging = output_folder.begin_staging(out)
    for name, text in files.items():
        (staging / name).write_text(text)
    output_folder.write_record(staging, {"base": {}} if record is None else record)
    output_folder.move_result(staging, out)


def content(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.iterdir() if path.name != "training.json"}


def test_files_and_folders_of_users_stay(tmp_path, capsys):
    theirs = {"dataset.bin": "1", "embeddings.safetensors": "2", "mine.index.json": "3"}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "thesis.txt").write_text("mine")
    result(tmp_path, ADAPTER)
    result(tmp_path, FULL)
    assert (tmp_path / ".unfinished" / "thesis.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, *FULL, "training.json", ".unfinished"}
    assert all((tmp_path / name).read_text() == text for name, text in theirs.items()) and not capsys.readouterr().err


def test_what_is_in_the_way_gets_another_name(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("of months of work")
    (tmp_path / "tokenizer.json").mkdir()
    result(tmp_path, FULL)
    assert (tmp_path / "model.safetensors.old").read_text() == "of months of work" and (tmp_path / "tokenizer.json.old").is_dir()
    assert capsys.readouterr().err.count("kept as") == 2
    (tmp_path / "model.safetensors").write_text("changed since")
    result(tmp_path, FULL)
    assert (tmp_path / "model.safetensors.old-2").read_text() == "changed since"
    assert (tmp_path / "model.safetensors").read_text() == "full"


def test_a_config_that_was_changed_does_not_stay_in_its_place(tmp_path):
    """An adapter's config beside a full model: the adapter would be put onto it."""
    result(tmp_path, ADAPTER)
    (tmp_path / "adapter_config.json").write_text('{"a": 1}')
    result(tmp_path, FULL)
    assert content(tmp_path) == FULL | {"adapter_config.json.old": '{"a": 1}'}


def test_a_result_of_an_older_version_makes_room(tmp_path, capsys):
    for name, text in (ADAPTER | {"training.json": "{}", "dataset.bin": "mine"}).items():
        (tmp_path / name).write_text(text)
    result(tmp_path, FULL)
    assert content(tmp_path) == FULL | {"dataset.bin": "mine"} and not capsys.readouterr().err


@pytest.mark.parametrize("killed_at", range(5))
def test_a_move_that_was_killed_is_made_good(tmp_path, monkeypatch, capsys, killed_at):
    """Whatever was moved already is known as our own, new or old."""
    old, new = FULL | {"tokenizer.json": "old"}, FULL | {"model.safetensors": "new", "tokenizer.json": "new"}
    result(tmp_path, old)
    replace, calls = os.replace, []

    def dying(source, target):
        calls.append(target)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    if killed_at < 4:
        with pytest.raises(KeyboardInterrupt):
            result(tmp_path, new)
        assert not (tmp_path / "config.json").exists()
    monkeypatch.setattr(os, "replace", replace)
    last = new | {"model.safetensors": "last"}
    result(tmp_path, last)
    assert content(tmp_path) == last and not capsys.readouterr().err


def test_the_place_to_write_in_is_marked(tmp_path):
    staging = output_folder.begin_staging(tmp_path)
    assert staging.name == ".unfinished" and (staging / MARK).exists()
    (staging / "rubbish").write_text("of a killed run")
    assert list(output_folder.begin_staging(tmp_path).iterdir()) == [staging / MARK]
    (staging / MARK).unlink()
    (staging / "mine").write_text("")
    assert output_folder.begin_staging(tmp_path).name == ".unfinished-2"


def test_a_folder_of_a_user_called_checkpoint(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "notes").write_text("mine")
    for text in ("first", "second"):
        written = output_folder.begin_staging(tmp_path) / "checkpoint-4"
        written.mkdir()
        (written / "trainer_state.json").write_text(json.dumps(text))
        output_folder.move_checkpoint(written, tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4.old" / "notes").read_text() == "mine"
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text()) == "second"
    checkpoints.remove_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4.old"]


def test_a_record_that_names_files_elsewhere(tmp_path):
    """Somebody else's folder: what its record lists is moved, or removed, only where it lies in it."""
    out, theirs = tmp_path / "out", tmp_path / "thesis.txt"
    theirs.write_text("mine")
    result(out, ADAPTER)
    record = json.loads((out / "training.json").read_text())
    digest = sha256_of_file(theirs)
    record["files"] |= {"../thesis.txt": digest, str(theirs): digest, "thesis.txt": digest}
    (out / "training.json").write_text(json.dumps(record))
    result(out, FULL)
    assert theirs.read_text() == "mine" and content(out) == FULL
