"""A folder is there when it is whole, and what a killed program leaves does not load."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.writing.new_folder import MARK, check_free, hide_config_until_done, new_folder, remove

ROOT = Path(__file__).parent.parent.parent


def test_it_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty one is as good as none
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / MARK).touch()  # of a killed run
    (tmp_path / "out.unfinished" / "rubbish" / "inside").mkdir(parents=True)
    with new_folder(out) as folder:
        (folder / "config.json").write_text('{"a": 1}')
        hide_config_until_done(folder)
        (folder / "weights").write_text("w")
        assert json.loads((folder / "config.json").read_text()) == {"a": 1}  # it could be loaded now
        assert list(out.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "weights"]
    assert not (out / "config.json").is_symlink() and json.loads((out / "config.json").read_text()) == {"a": 1}


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_that_loads(tmp_path):
    code = """
import pathlib, sys, time
from finetune.writing.new_folder import hide_config_until_done, new_folder
with new_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "config.json").write_text("{}")
    hide_config_until_done(folder)
    (folder / "config.json").read_text()
    print("proving", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "proving\n"
        assert (tmp_path / "out.unfinished" / "config.json").read_text() == "{}"  # other processes see it as well
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        (tmp_path / "out.unfinished" / "config.json").read_text()


def test_what_is_in_the_way(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(UserError, match="full: exists and is not empty - give a new folder for the merged model"):
        check_free(full, "the merged model")
    with pytest.raises(UserError, match="lies in .*full, which is read - give a new folder for the merged model"):
        check_free(full / "inside", "the merged model", full)
    check_free(tmp_path / "new", "the merged model", full)


def test_a_folder_of_the_users_is_never_removed(tmp_path):
    """Not even one that is called as the place to write in."""
    theirs = tmp_path / "out.unfinished"
    theirs.mkdir()
    (theirs / "work").write_text("of weeks")
    refused = f"out.unfinished: is in the way, and without the mark of a run that was interrupted .{MARK}. - move it"
    with pytest.raises(UserError, match=refused):
        check_free(tmp_path / "out", "the merged model", theirs)
    with pytest.raises(UserError, match=refused), new_folder(tmp_path / "out"):
        pass
    assert (theirs / "work").read_text() == "of weeks"


def test_two_runs_do_not_write_to_one_place(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(UserError, match="out.unfinished: another run is writing it now - wait for it, or give another"):
            with new_folder(tmp_path / "out"):
                pass
        assert (folder / "config.json").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_what_an_interrupted_removal_leaves_still_has_its_mark(tmp_path, monkeypatch):
    folder = tmp_path / "out.unfinished"
    (folder / "layers").mkdir(parents=True)
    for name in (MARK, "a", "z"):
        (folder / name).touch()

    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        remove(folder)
    assert (folder / MARK).exists()


def test_the_current_folder_and_one_that_cannot_be_made(tmp_path, monkeypatch):
    """OUT may be "." in an empty folder, like any other that is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path(".")) as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "here" / "config.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out: cannot be made .Not a directory. - give a folder that you may write"):
        with new_folder(tmp_path / "file" / "out"):
            pass
