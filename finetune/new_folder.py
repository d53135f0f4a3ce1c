"""A folder that is there only when it is whole: written beside its place and renamed at the end.

What a killed program leaves is called OUT.unfinished, does not load, and is removed by the next run with the same OUT.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

CONFIG = "config.json"  # without which nothing opens a folder


def check_free(out: Path, what: str, *sources: Path) -> None:
    """Raises UserError unless `out` is new or an empty folder outside of the `sources`. what: the thing that it is for."""
    out = out.resolve()
    for source in sources:
        if out == source.resolve() or source.resolve() in out.parents:
            raise UserError(f"{out}: lies in {source}, which is read - give a new folder for {what}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty - give a new folder for {what}")


@contextlib.contextmanager
def new_folder(out: Path, config: str = CONFIG) -> Iterator[Path]:
    """Yields a folder to write into; it becomes `out` when the block ends well, and is removed when it does not.

    Write everything but the weights first, then call withhold(), then write the weights and prove them. config: the file
    without which nothing opens the folder.
    """
    out = out.resolve()
    staging = out.with_name(out.name + ".unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}) - give a folder that you may write to") from error
    try:
        yield staging
        content = (staging / config).read_bytes()  # through the link of withhold()
        (staging / f"{config}.whole").write_bytes(content)
        os.replace(staging / f"{config}.whole", staging / config)
        if out.is_dir():
            out.rmdir()
        os.replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def withhold(staging: Path, config: str = CONFIG) -> None:
    """From here on the folder loads, for a proof of what it holds, but only as long as this process lives.

    Its config becomes a link to a file in this process's memory: should it be killed, the link leads nowhere.
    """
    path = staging / config
    descriptor = os.memfd_create(config)  # closed by the end of the process
    os.write(descriptor, path.read_bytes())
    path.unlink()
    path.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
