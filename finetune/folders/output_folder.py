"""A run's output folder, in which a user may have files, too: what is not by the record of a run of ours is never removed.

Written beside its place, in a folder with a mark (new_folder.MARK), on the disk before it gets its name. The record of a result
(training.json, "files") has the hash of each of its files.
"""

import itertools
import os
import shutil
from pathlib import Path

from .. import json_text
from ..errors import UserError, warn
from ..hashing import sha256_of_file
from ..writing import durable, new_folder
from ..writing.durable import RECORD
from ..writing.new_folder import MARK
from . import config_files, settings_files

STAGING = ".unfinished"
CONFIGS = ("adapter_config.json", "config.json")  # without these nothing loads
# what a version without a list of files wrote of these was its own
WEIGHTS = (*CONFIGS, "adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def begin_staging(out: Path) -> Path:
    """An empty folder to write in. One that a killed run left is emptied; one without its mark is a user's, and another name is taken."""
    names = itertools.chain([STAGING], (f"{STAGING}-{number}" for number in itertools.count(2)))
    staging = next(out / name for name in names if may_take(out / name))
    before = files_of_records(staging / MARK, staging / RECORD)
    new_folder.remove(staging)
    staging.mkdir(parents=True)
    try:
        write_mark(staging, before)
    except OSError:  # a full disk
        new_folder.remove(staging)
        raise
    return staging


def may_take(staging: Path) -> bool:
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        return False
    return not staging.exists() or (staging / MARK).is_file() or not any(staging.iterdir())


def leftovers(out: Path) -> list[Path]:
    """What killed runs have left half written."""
    return [path for path in out.glob(f"{STAGING}*") if not path.is_symlink() and (path / MARK).is_file()]


# ---- the record, and the files of a result


def write_record(folder: Path, record: dict | None) -> None:
    """training.json, with the hash of every other file of the folder, so that a later run knows its own, and a reader a damaged one."""
    if record:
        names = [path for path in durable.files_of(folder) if path.name not in (RECORD, MARK)]
        hashes = durable.in_threads(sha256_of_file, names)
        files = {str(path.relative_to(folder)): digest for path, digest in zip(names, hashes)}
        json_text.write(folder / RECORD, record | {"files": files})


def read_record(folder: Path) -> dict:
    """training.json, or {} for a folder that this toolkit did not write; without the hashes of the folder's own files."""
    path = folder / RECORD
    record = config_files.read_json(path) if path.is_file() else {}
    if wrong := settings_files.value_problems(path, record, settings_files.OF_RECORD):
        raise UserError(*wrong)
    return {key: value for key, value in record.items() if key != "files" and not (key in settings_files.OF_RECORD and value is None)}


def own_files(out: Path, staging: Path) -> dict[str, list[str]]:
    """{name: hashes that it may have} of what an earlier run wrote into `out`, [] for any; of a save that was killed, what both wrote.

    staging: with a new result. One of an older version, without a list of its files, had the same names.
    """
    found = files_of_records(out / RECORD, staging / MARK)
    if found or not (out / RECORD).is_file():
        return found
    names = [path.name for pattern in WEIGHTS for path in out.glob(pattern)]
    return {name: [] for name in [*names, *(path.name for path in staging.iterdir())]}


def files_of_records(*records: Path) -> dict[str, list[str]]:
    """The lists of files of several records, {name: hashes}; of one that is not there or damaged, nothing.

    A name that leads out of the folder is of nothing that a run wrote there.
    """
    found: dict[str, list[str]] = {}
    for record in records:
        try:
            files = config_files.read_json(record).get("files") if record.is_file() and record.stat().st_size else None
        except (ValueError, AttributeError):
            files = None
        for name, hashes in files.items() if isinstance(files, dict) else ():
            if not Path(name).is_absolute() and ".." not in Path(name).parts:
                found.setdefault(name, []).extend(hashes if isinstance(hashes, list) else [hashes])
    return found


def write_mark(staging: Path, files: dict[str, list[str]]) -> None:
    """What was there before, for a run that comes after a kill."""
    json_text.write(staging / MARK, {"files": files}, indent=None)


def move_result(staging: Path, out: Path) -> None:
    """Moves a result to its place, file by file, and removes what an earlier one left: an adapter beside a full model would be put onto it.

    The config comes last, and its forerunner goes first: a run that is killed here leaves no half model. A file in the way that no run
    wrote, or that was changed since, is kept under another name.
    """
    earlier = own_files(out, staging)
    write_mark(staging, earlier)
    durable.sync(staging)
    for name in sorted(earlier, key=lambda name: name not in CONFIGS):
        if name in CONFIGS or not (staging / name).exists():
            make_room(out / name, earlier)
    for path in sorted(staging.iterdir(), key=lambda path: (path.name in CONFIGS, path.name != RECORD)):
        if path.name != MARK:
            make_room(out / path.name, earlier, replaced=True)
            os.replace(path, out / path.name)
    durable.sync_entries(out)
    new_folder.remove(staging)


def make_room(path: Path, own: dict[str, list[str]], replaced: bool = False) -> None:
    """Removes what a run of ours wrote, unless it is to be replaced, which takes no moment; anything else gets another name."""
    if path.name == RECORD or not os.path.lexists(path):
        return
    if path.is_file() and (path.name in own and (not own[path.name] or sha256_of_file(path) in own[path.name])):
        if not replaced:
            path.unlink()
        return
    keep(path)


def keep(path: Path) -> None:
    """Gives a user's file or folder another name."""
    names = itertools.chain([f"{path.name}.old"], (f"{path.name}.old-{number}" for number in itertools.count(2)))
    kept = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    os.replace(path, kept)
    warn(f"{path}: is in the way of the result and was not written by a run of this toolkit, or was changed since: kept as {kept.name}")


def move_checkpoint(written: Path, place: Path) -> None:
    """Renames a whole checkpoint to its place, in the place of one of that name; it is on the disk when this returns."""
    if os.path.lexists(place):
        if not is_checkpoint(place):
            keep(place)
        else:
            os.replace(place, written.with_name("before"))
    os.replace(written, place)
    durable.sync_entries(place.parent)
    shutil.rmtree(written.with_name("before"), ignore_errors=True)


def discard(path: Path) -> None:
    """Removes a folder of ours: out of its place first, so that a kill leaves no half one there."""
    staging = begin_staging(path.parent)
    os.replace(path, staging / path.name)
    new_folder.remove(staging)


def is_checkpoint(path: Path) -> bool:
    """Whether a run wrote this folder, whole or not."""
    return path.is_dir() and any((path / name).is_file() for name in (durable.MANIFEST, RECORD, "trainer_state.json"))
