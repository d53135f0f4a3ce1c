"""Checkpoints of a run: which are complete, where to go on from, which are kept, and whose are trusted."""

import re
import shutil
from pathlib import Path

from ..distributed import engines
from ..errors import UserError, listed, note, warn
from ..writing import durable
from . import output_folder

SHOWN = 3  # of the damaged files of a checkpoint


def complete(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. What is in their files, faults() of durable.py tells."""
    return [path for path in numbered(output_dir) if is_complete(path)]


def of_launch(output_dir: Path, launches: list[str]) -> bool:
    """Are there checkpoints, complete or not, written by processes of these agents (see ranks.launch)?"""
    records = [output_folder.read_record(path.parent) for path in output_dir.glob(f"checkpoint-*/{output_folder.RECORD}")]
    return any(set(launches) & set(record.get("launches", ())) for record in records)


def is_complete(path: Path) -> bool:
    """Can a run resume exactly from here? Not from an interrupted save, nor from --save_only_model.

    The optimizer's state lies in one file, or as shards in a folder that DeepSpeed (file `latest`) or FSDP (optimizer_0) made.
    """
    if durable.has_manifest(path) and durable.verify(path, hashes=False):
        return False
    optimizer = any((path / name).exists() for name in ("optimizer.pt", "latest", "optimizer_0", "optimizer.bin"))
    return optimizer and all((path / name).is_file() for name in ("trainer_state.json", "scheduler.pt"))


def keep_newest(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Removes the oldest checkpoints above `limit`; never the best or the newest, and none before the newest is read and found whole."""
    if not limit or limit < 1:
        return
    every = complete(output_dir)
    removable = [path for path in every[:-1] if best is None or path.resolve() != Path(best).resolve()]
    removable = removable[: max(0, len(every) - limit)]
    if removable and (wrong := durable.faults(every[-1])):
        warn(f"{every[-1]}: {listed(wrong, SHOWN)}; the checkpoints before it are kept, and the disk should be looked at")
        return
    for path in removable:
        output_folder.discard(path)


def remove_all(output_dir: Path) -> None:
    """Removes an earlier run's checkpoints (--overwrite_output_dir): beside this run's they would count as the newest."""
    written = [path for path in numbered(output_dir) if output_folder.is_checkpoint(path)]
    for path in [*written, *output_folder.leftovers(output_dir)]:
        note(f"removing {path}, of an earlier run")
        shutil.rmtree(path)


def wants_one(wish: str | None) -> bool:
    """Whether a value of --resume_from_checkpoint asks for a checkpoint."""
    return str(wish or "").lower() not in ("", "false", "none")


def wants_newest(wish: str | None) -> bool:
    """Whether it asks for the newest whole one."""
    return str(wish).lower() in ("auto", "true")


def resume_point(output_dir: Path, wish: str | None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means: None, the newest whole one ("auto", "True"), or a path.

    Of damaged ones, the one before is taken, which tell_of() says. UserError where a path, or all there are, cannot be gone on from.
    """
    if not wants_one(wish):
        return None
    if wants_newest(wish):
        return newest_whole(output_dir)
    path = Path(wish)
    if wrong := durable.faults(path):
        raise UserError(f"--resume_from_checkpoint {wish}: {listed(wrong, SHOWN)} - give another of checkpoint-N, or auto for the newest whole one")
    if not is_complete(path):
        raise UserError(
            f"--resume_from_checkpoint {wish}: no complete checkpoint there - give one of checkpoint-N, or auto"
        )
    return path


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint of which every file is as it was written; None where there is no checkpoint."""
    damaged = []
    for path in reversed(numbered(output_dir)):
        if wrong := durable.faults(path):
            damaged.append(f"{path.name}: {listed(wrong, SHOWN)}")
        elif is_complete(path):
            return path
    if damaged:
        remedy = "give another --output_dir, or --overwrite_output_dir to begin anew"
        raise UserError(f"{output_dir}: no checkpoint is whole ({'; '.join(damaged)}) - {remedy}")
    return None


def tell_of(path: Path, wish: str) -> None:
    """Says what is to be known of resume_point()'s answer: which newer ones are damaged, and whether it could be checked at all."""
    for newer in numbered(path.parent) if wants_newest(wish) else ():
        if number(newer) > number(path) and (wrong := durable.faults(newer)):
            warn(f"{newer}: {listed(wrong, SHOWN)}; going on from {path.name}, the newest that is whole")
    if not durable.has_manifest(path):
        note(f"{path}: is of an older version, without a manifest, so whether its files are as they were written is not known")


def numbered(output_dir: Path) -> list[Path]:
    """Folders called checkpoint-N, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if number(path) >= 0 and path.is_dir()), key=number)


def number(path: Path) -> int:
    """N of checkpoint-N; -1 for another name, as --resume_from_checkpoint may give."""
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(found[1]) if found else -1


def check_name(path: Path, step) -> None:
    """Raises UserError for a checkpoint that was renamed or copied: by its name it is found, and taken for older or newer than it is."""
    if number(path) >= 0 and isinstance(step, int) and step != number(path):
        raise UserError(f"{path}: holds step {step}, whatever its name says - name it checkpoint-{step}, or remove it")


def check_trusted(path: Path, engine: str, trusted: bool) -> None:
    """DeepSpeed and FSDP read their shards by unpickling, which can run any code: refused unless a run of this user wrote them.

    One process and DDP read weights alone (torch's weights_only). trusted: --trust_checkpoint.
    """
    if trusted or engine in (engines.ONE, engines.DDP) or durable.is_ours(path):
        return
    what = f"{path}: {engine} reads it by unpickling, which can run any code, and it has no manifest signed with this user's key"
    raise UserError(f"{what} - if you know who wrote it, add --trust_checkpoint; else do not use it")
