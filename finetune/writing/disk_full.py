"""A disk that is full while something is saved: one line, and what is half written goes."""

import contextlib
import shutil
from pathlib import Path

from ..errors import DiskFull, is_full
from . import durable, new_folder


@contextlib.contextmanager
def told(out: Path, what: str, needed: float, staging: Path):
    """A block that saves: where the disk is full, `staging` is removed and DiskFull says what is needed and free. needed: bytes."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        written = size_of(staging)
        new_folder.remove(staging)
        takes = f"about {gigabytes(needed)}" if needed > written else f"more than {gigabytes(written)}"
        sizes = f"it takes {takes}, {gigabytes(free_bytes(out))} are free (a quota may allow less)"
        what = f"{out}: no room for {what}: {sizes}; the half one is removed, earlier checkpoints are whole"
        raise DiskFull(f"{what} - make room, and start the same command with --resume_from_checkpoint auto") from error


def size_of(folder: Path) -> float:
    """Bytes of a folder's files, in its folders too."""
    try:
        return float(sum(path.lstat().st_size for path in durable.files_of(folder)))
    except OSError:
        return 0.0


def free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0.0


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
