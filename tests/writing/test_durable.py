"""Manifests: whatever happens to any file of a checkpoint is named, and the checkpoint before it is taken."""

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.distributed import engines
from finetune.errors import UserError
from finetune.folders import checkpoints
from finetune.writing import durable, signing

FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "training.json", "tokenizer_config.json", "global_step2/zero_pp_rank_0_optim_states.pt",
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def write_checkpoint(folder: Path) -> Path:
    """As a run writes one: a file of every kind, and its manifest."""
    (folder / "global_step2").mkdir(parents=True)
    for i, name in enumerate(FILES):
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps({"manifest": durable.MANIFEST, "number": i, "text": "a" * 100}))
        elif name.endswith(".safetensors"):
            save_file({"a": torch.arange(100.0)}, folder / name)
        else:
            torch.save({"a": torch.arange(100.0) + i}, folder / name)
    durable.write_manifest(folder)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "is damaged": flip,
    "is cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "is empty": lambda path: os.truncate(path, 0),
    "is missing": os.unlink,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    return [write_checkpoint(out / f"checkpoint-{step}") for step in (2, 10)]


def gone_on_from(out: Path) -> Path:
    """As preparation.prepare() does it."""
    path = checkpoints.resume_point(out, "auto")
    checkpoints.tell_of(path, "auto")
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, durable.MANIFEST])
def test_every_damage_of_every_file_is_named(tmp_path, made, capsys, name, damage):
    for folder in made:
        shutil.copytree(folder, tmp_path / folder.name)
    assert gone_on_from(tmp_path) == tmp_path / "checkpoint-10"
    assert not capsys.readouterr().err
    DAMAGES[damage](tmp_path / "checkpoint-10" / name)
    expected = f"{name} {'is damaged' if name == durable.MANIFEST and damage != 'is missing' else damage}"
    assert gone_on_from(tmp_path) == tmp_path / "checkpoint-2"
    printed = capsys.readouterr().err
    assert expected in printed and "going on from checkpoint-2" in printed and printed.count("\n") == 1
    with pytest.raises(UserError, match=f"{expected}.* - give another of checkpoint-N"):
        checkpoints.resume_point(tmp_path, str(tmp_path / "checkpoint-10"))


def test_where_none_is_whole(tmp_path):
    flip(write_checkpoint(tmp_path / "checkpoint-4") / "optimizer.pt")
    with pytest.raises(UserError, match="no checkpoint is whole .checkpoint-4: optimizer.pt is damaged. - give another --output_dir"):
        checkpoints.resume_point(tmp_path, "auto")


def test_one_of_an_older_version_is_taken_and_that_is_said(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "checkpoint-4")
    (folder / durable.MANIFEST).unlink()
    (folder / "training.json").write_text("{}")
    assert gone_on_from(tmp_path) == folder
    assert "is of an older version, without a manifest" in capsys.readouterr().err


def test_the_only_good_one_is_never_removed(tmp_path, capsys):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    flip(tmp_path / "checkpoint-3" / "optimizer.pt")
    checkpoints.keep_newest(tmp_path, 1)
    assert len(checkpoints.numbered(tmp_path)) == 3 and "checkpoint-3: optimizer.pt is damaged" in capsys.readouterr().err
    os.truncate(tmp_path / "checkpoint-3" / "optimizer.pt", 3)  # now it counts as none
    checkpoints.keep_newest(tmp_path, 1)
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


# ---- whose it is


def test_what_is_not_this_users_is_not_unpickled(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "checkpoint-4")
    checkpoints.check_trusted(folder, engines.ZERO2, trusted=False)
    planted = folder / "global_step2" / "more_optim_states.pt"
    planted.write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="ZeRO-2 reads it by unpickling, which can run any code.*--trust_checkpoint"):
        checkpoints.check_trusted(folder, engines.ZERO2, trusted=False)
    planted.unlink()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of somebody else"))
    for engine in (engines.ZERO2, engines.ZERO3, engines.FSDP):
        with pytest.raises(UserError, match=f"{engine} reads it by unpickling"):
            checkpoints.check_trusted(folder, engine, trusted=False)
        checkpoints.check_trusted(folder, engine, trusted=True)
    for engine in (engines.ONE, engines.DDP):
        checkpoints.check_trusted(folder, engine, trusted=False)


def test_a_manifest_made_anew_does_not_pass(tmp_path, monkeypatch):
    """Whoever changes a file can write the hashes, too, but not sign them."""
    folder = write_checkpoint(tmp_path / "checkpoint-4")
    flip(folder / "optimizer.pt")
    signature = durable.read_manifest(folder)["signature"]
    monkeypatch.setattr(signing, "sign", lambda content, out: signature)
    durable.write_manifest(folder)
    assert durable.verify(folder) == [] and not durable.is_ours(folder)


def test_the_key_is_made_once_and_read_by_its_user_alone(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-4")
    key = tmp_path / "state" / "qwen-finetune" / "key"
    before = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(before) == 32 and list(key.parent.iterdir()) == [key]
    assert before.hex() not in (folder / durable.MANIFEST).read_text()
    durable.write_manifest(folder)
    assert key.read_bytes() == before
    key.chmod(0o644)  # somebody else may know it
    assert not durable.is_ours(folder)


def test_without_a_home_the_output_folder_has_a_key_that_does_not_travel(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file" / "below"))
    folder = write_checkpoint(tmp_path / "out" / "checkpoint-4")
    assert durable.is_ours(folder)
    shutil.copytree(tmp_path / "out", tmp_path / "copied")
    assert not durable.is_ours(tmp_path / "copied" / "checkpoint-4") and not durable.verify(tmp_path / "copied" / "checkpoint-4")


# ---- onto the disk


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_modes_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        folder = write_checkpoint(tmp_path / "checkpoint-4")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {mode}


def test_everything_is_synced_before_the_manifest(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.path.realpath(f"/proc/self/fd/{number}")), fsync(number))[1])
    folder = write_checkpoint(tmp_path / "checkpoint-4")
    paths = [path for path in folder.rglob("*") if path.name != durable.MANIFEST]
    written = [*map(str, paths), str(folder)]
    assert set(written) <= set(synced[: synced.index(str(folder / durable.MANIFEST))])
    assert synced[-1] == str(folder)


@pytest.mark.parametrize("entry", [5, ["x", None], [1, 2], ["1", "a"], [True, "a"], {}, [], None], ids=str)
def test_a_manifest_whose_entries_are_none(made, tmp_path, entry):
    """Written by hand, with the right hash of itself."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(made[0], folder)
    whole = json.loads((folder / durable.MANIFEST).read_text())
    whole["files"]["optimizer.pt"] = entry
    whole["sha256"] = hashlib.sha256(durable.as_bytes(whole["files"])).hexdigest()
    (folder / durable.MANIFEST).write_text(json.dumps(whole))
    assert durable.verify(folder) == ["manifest.json is damaged"] and not durable.is_ours(folder)
