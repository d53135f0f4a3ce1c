"""A folder that is there only when it is whole: written beside its place and renamed at the end.

What a killed program leaves is called OUT.unfinished, does not load, and is removed by the next run with the same OUT. A file in
it (MARK) tells it from a folder of the user's, and is locked while the program lives. Killed between the last two steps of all,
a program leaves a folder that is whole, proven, and has not got its name yet.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import DiskFull, UserError, is_full
from . import durable

CONFIG = "config.json"  # without which nothing opens a folder
MARK = ".being-written"


def check_free(out: Path, what: str, *sources: Path) -> None:
    """Raises UserError unless `out` is new or an empty folder outside of the `sources`. what: the thing that it is for."""
    out = out.resolve()
    for source in sources:
        if out == source.resolve() or source.resolve() in out.parents:
            raise UserError(f"{out}: lies in {source}, which is read - give a new folder for {what}")
    check_staging(staging_of(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty - give a new folder for {what}")


def staging_of(out: Path) -> Path:
    """Where a folder is written before it is whole."""
    return out.with_name(f"{out.name}.unfinished")


def check_staging(staging: Path) -> None:
    """Raises UserError if the place to write in is taken: by a run that goes on, or by something that no run left."""
    if not staging.exists() or staging.is_dir() and not any(staging.iterdir()):
        return
    if not (staging / MARK).is_file():
        what = f"{staging}: is in the way, and without the mark of a run that was interrupted ({MARK})"
        raise UserError(f"{what} - move it, or give another folder for the result")
    with (staging / MARK).open() as mark, contextlib.suppress(OSError):  # some file systems have no locks
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{staging}: another run is writing it now - wait for it, or give another folder") from None


def remove(staging: Path) -> None:
    """Deletes a staging folder, its lock file last, so that an interrupted delete is still recognized."""
    for path in staging.iterdir() if staging.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def new_folder(out: Path, config: str = CONFIG) -> Iterator[Path]:
    """Yields a folder to write into; it becomes `out` when the block ends well, and is removed when it does not.

    Write everything but the weights first, then call hide_config_until_done(), then write the weights and prove them.
    config: the file without which nothing opens the folder.
    """
    out = out.resolve()
    staging = staging_of(out)
    check_staging(staging)
    remove(staging)
    try:
        staging.mkdir(parents=True)
        mark = (staging / MARK).open("w")
    except OSError as error:
        if is_full(error):
            raise no_room(out) from error
        raise UserError(f"{out}: cannot be made ({error.strerror}) - give a folder that you may write to") from error
    try:
        with mark:
            with contextlib.suppress(OSError):
                fcntl.flock(mark, fcntl.LOCK_EX)
            yield staging
            content = (staging / config).read_bytes()  # through the link of hide_config_until_done()
            (staging / f"{config}.whole").write_bytes(content)
            os.replace(staging / f"{config}.whole", staging / config)
            durable.sync(staging)
            if out.is_dir():
                out.rmdir()
            os.replace(staging, out)
            durable.sync_entries(out.parent)
            (out / MARK).unlink()
    except BaseException as error:
        remove(staging)
        if isinstance(error, Exception) and is_full(error):
            raise no_room(out) from error
        raise


def no_room(out: Path) -> DiskFull:
    what = f"{out}: could not be written, the disk or its quota is full; what was half written is removed"
    return DiskFull(f"{what} - make room, and start again")


def hide_config_until_done(staging: Path, config: str = CONFIG) -> None:
    """From here on the folder loads, for a proof of what it holds, but only as long as this process lives.

    Its config becomes a link to a file in this process's memory: should it be killed, the link leads nowhere.
    """
    path = staging / config
    descriptor = os.memfd_create(config)  # closed by the end of the process
    os.write(descriptor, path.read_bytes())
    path.unlink()
    path.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
