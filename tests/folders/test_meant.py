"""The folder that was meant, from what lies around the one that was named."""

import os

import pytest

from finetune.folders import meant


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """quickstart/ with a model, an adapter and its checkpoint; and a folder of something else."""
    monkeypatch.chdir(tmp_path)
    for name, file in (
        ("quickstart/base", "config.json"),
        ("quickstart/adapter", "adapter_config.json"),
        ("quickstart/adapter/checkpoint-2", "adapter_config.json"),
        ("quickstart/notes", "notes.txt"),
        ("cache/snapshots/abc", "config.json"),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).touch()
    return tmp_path


@pytest.mark.parametrize("named, wanted, found", [
    ("quickstart", meant.MODEL, ["quickstart/base"]),
    ("quickstart", meant.ADAPTER, ["quickstart/adapter"]),
    ("quickstart", meant.EITHER, ["quickstart/adapter", "quickstart/base"]),
    ("quickstart/adaptor", meant.ADAPTER, ["quickstart/adapter"]),
    ("quickstart/adaptor", meant.MODEL, []),
    ("quickstart/bse/", meant.MODEL, ["quickstart/base"]),
    ("quickstart/note", meant.EITHER, []),
    ("cache", meant.MODEL, ["cache/snapshots/abc"]),
    ("nowhere", meant.EITHER, []),
    ("nowhere/at/all", meant.EITHER, []),
    ("n" * 300, meant.EITHER, []),
    ("quickstart/base/config.json", meant.MODEL, []),
])  # fmt: skip
def test_what_is_suggested(named, wanted, found):
    assert meant.folder(named, wanted) == (f"; did you mean {' or '.join(found)}?" if found else "")


def test_a_checkpoint_comes_after_what_is_whole(place):
    os.rename(place / "quickstart/adapter", place / "quickstart/checkpoint-9")
    (place / "quickstart/result").mkdir()
    (place / "quickstart/result/adapter_config.json").touch()
    assert meant.folder("quickstart", meant.ADAPTER) == "; did you mean quickstart/result or quickstart/checkpoint-9?"


def test_a_name_from_one_level_below(place):
    assert meant.folder("adapter", meant.ADAPTER) == "; did you mean quickstart/adapter?"
    assert meant.folder("checkpoint-2", meant.ADAPTER) == ""  # two levels below are not looked at
    os.chdir(place / "quickstart")
    assert meant.folder("checkpoint-2", meant.ADAPTER) == "; did you mean adapter/checkpoint-2?"


def test_elsewhere_paths_stay_whole(place):
    os.chdir("/")
    assert meant.folder(place / "quickstart") == f"; did you mean {place}/quickstart/base?"


def test_a_folder_that_may_not_be_looked_into(place, monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert meant.folder("quickstart", meant.EITHER) == ""
