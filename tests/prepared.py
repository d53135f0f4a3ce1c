"""Runs of three steps on four samples up to their first step, and what they leave in their output folder."""

import json

import pytest
from command_lines import write_checkpoint
from tiny import small_checkpoint

from finetune.flags import args as arguments
from finetune.folders import output_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def asked(base, tmp_path, monkeypatch):
    """asked(*flags) -> the arguments of a full-parameter run on four samples into the folder out."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    data = write_talks(tmp_path / "data.json")

    def parse(*flags, name=base):
        usual = ["-m", name, "-d", data, "-o", tmp_path / "out", "--model_max_length", "512"]
        return arguments.parse([str(word) for word in (*usual, *flags)])

    return parse


def write_talks(path, count=4):
    turns = [{"from": "user", "value": "What is {0} plus {0}?"}, {"from": "assistant", "value": "{1}."}]
    talks = [[turn | {"value": turn["value"].format(i, 2 * i)} for turn in turns] for i in range(count)]
    path.write_text(json.dumps([{"conversations": turns} for turns in talks]))
    return path


def leave_checkpoint(out, step: int, record: dict, launches: list[str], adapter: dict | None = None, **state):
    """As behind so many of three steps. state: more of transformers' state."""
    folder = write_checkpoint(out / f"checkpoint-{step}", adapter)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 3, **state}))
    (folder / output_folder.RECORD).write_text(json.dumps(record | {"launches": launches}))
    return folder
