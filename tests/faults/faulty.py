"""Runs a program that something happens to at its N-th file operation in a folder: faulty.py KIND N FOLDER SCRIPT [its arguments]

KIND: a signal's name (SIGKILL, SIGTERM), which this process sends itself, or ENOSPC: from then on the disk is full. N 0: nothing happens.
What Python does to files is seen by its audit hook, before it is done. A file that safetensors or torch writes counts twice: before, and
when half of it is there. FAULT_RANK: the rank that it happens to (0). FAULT_COUNT: a file that gets the number of operations at the end.
"""

import errno
import os
import runpy
import signal
import sys
from pathlib import Path

kind, number, folder = sys.argv[1], int(sys.argv[2]), os.path.realpath(sys.argv[3])
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PATHS = {  # audit event: which of its arguments are paths
    "os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "os.truncate": (0,), "os.link": (0, 1), "os.chmod": (0,),
}  # fmt: skip
NEEDS_ROOM = ("open", "os.mkdir", "written", "fsync")
count = 0


def audit(event: str, words) -> None:
    if event == "open":
        path, _, flags = words
        if isinstance(path, (str, bytes, os.PathLike)) and (flags or 0) & WRITES:
            happens(event, path)
    elif event in PATHS and any(inside(words[i]) for i in PATHS[event]):
        happens(event, words[0], words[-1] if len(PATHS[event]) > 1 else words[0])


def inside(path) -> bool:
    """Whether a path, or an open file, lies in the folder."""
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}") if os.path.exists(f"/proc/self/fd/{path}") else ""
    return os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep)


def happens(event: str, *paths) -> None:
    """One operation. ENOSPC is an OSError for what needs room; what makes room works on."""
    global count
    if not any(map(inside, paths)):
        return
    count += 1
    if number == 0 or count < number:
        return
    if kind != "ENOSPC" and count == number:
        os.kill(os.getpid(), getattr(signal, kind))
    elif kind == "ENOSPC" and event in NEEDS_ROOM and os.path.basename(os.fsdecode(paths[0])) != ".run.lock":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(paths[0]))


def written_by(module, name: str, position: int, failure) -> None:
    """Counts a writer in another language, whose path is an argument. failure: what it raises where the disk is full."""
    function = getattr(module, name)

    def writes(*words, **more):
        result = function(*words, **more)
        path = words[position] if len(words) > position else more.get("f") or more.get("filename")
        if isinstance(path, (str, os.PathLike)) and inside(path):
            half(Path(path), failure)
        return result

    setattr(module, name, writes)


def half(path: Path, failure) -> None:
    """A moment in which half of a file is written: it comes back where nothing happens."""
    content = path.read_bytes() if number and count + 1 >= number else None
    if content is not None:
        with open(path, "rb+") as file:
            os.ftruncate(file.fileno(), len(content) // 2)
    try:
        happens("written", path)
    except OSError as full:
        raise failure(full) from None
    if content is not None:
        os.truncate(path, len(content))
        path.write_bytes(content)


def install() -> None:
    import safetensors.torch
    import torch

    # as they say it
    written_by(safetensors.torch, "serialize_file", 1, lambda full: safetensors.SafetensorError(f"I/O error: {full.strerror} (os error 28)"))
    written_by(torch, "save", 1, lambda full: RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"))
    fsync = os.fsync

    def counted(file) -> None:
        happens("fsync", os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
        fsync(file)

    os.fsync = counted
    sys.addaudithook(audit)


def main() -> None:
    sys.argv = sys.argv[4:]
    sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
    if os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0"):
        install()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if path := os.environ.get("FAULT_COUNT"):
            Path(path).write_text(str(count))


if __name__ == "__main__":
    main()
