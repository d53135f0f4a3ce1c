"""Folders that can be trusted: what is written is on the disk before it gets its name, and a manifest says what belongs there.

write_manifest(folder)   sizes and SHA-256 of all files, signed (signing.py)
verify(folder)           what is wrong with them, in words
sync(folder)             all of it on the disk, with the modes that the umask gives
"""

import contextlib
import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import json_text
from ..hashing import sha256_of_file
from . import signing

MANIFEST = "manifest.json"
RECORD = "training.json"  # a checkpoint's record says that it has a manifest: one without is not older than they are
THREADS = 8  # hashing lets other threads run, and a disk answers several at a time
HARMLESS = (".md", ".txt", ".json", ".jsonl", ".log")  # nobody unpickles a file of this name


def files_of(folder: Path) -> list[Path]:
    """All files of a folder and its folders, but the manifest."""
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path != folder / MANIFEST)


def in_threads(function, paths: list[Path]) -> list:
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, paths))


# ---- onto the disk


def sync(folder: Path) -> None:
    """Everything in a folder reaches the disk; new files get the modes of the umask (safetensors makes its own 0600).

    OSError where the disk is full or broken: some file systems find that out only now.
    """
    mode = 0o666 & ~umask()
    in_threads(lambda path: sync_file(path, mode), files_of(folder) + [folder / MANIFEST])
    for place, _, _ in os.walk(folder, topdown=False):
        sync_entries(Path(place))


def sync_file(path: Path, mode: int | None = None) -> None:
    """One file. mode: what it is to have besides what may be executed."""
    if path.is_symlink() or not path.is_file():
        return
    with open(path, "rb") as file:
        now = os.fstat(file.fileno()).st_mode & 0o777
        wanted = now if mode is None else mode | (now & 0o111 & mode >> 2)
        if now != wanted:
            with contextlib.suppress(PermissionError):
                os.fchmod(file.fileno(), wanted)
        os.fsync(file.fileno())


def sync_entries(folder: Path) -> None:
    """The names in a folder reach the disk: without that, a power cut can take a rename back."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def umask() -> int:
    """This process's umask. Asking the system sets it for a moment, which other threads could see: /proc knows it, too."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    now = os.umask(0o022)
    os.umask(now)
    return now


# ---- the manifest


known: dict[tuple, list[str]] = {}  # what faults() has found, by folder and the state of its files


def faults(folder: Path) -> list[str]:
    """verify() of a folder that has a manifest, [] for an older one without; the second time at once, unless a file was written to."""
    if not has_manifest(folder):
        return []
    if (now := state_of(folder)) not in known:
        known[now] = verify(folder)
    return known[now]


def learn(folder: Path, found: list[str]) -> None:
    """What another rank of this machine has found, so that a large folder is read once."""
    known[state_of(folder)] = found


def state_of(folder: Path) -> tuple:
    """What tells whether a file was written to since."""
    state = [str(folder.resolve())]
    for path in [*files_of(folder), folder / MANIFEST]:
        with contextlib.suppress(OSError):
            stat = path.stat()
            state.append((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(state)


def write_manifest(folder: Path, out: Path | None = None) -> None:
    """Writes the folder's manifest, and all of it onto the disk. out: the run's output folder; default: the folder above."""
    sync(folder)
    paths = files_of(folder)
    sizes = [path.stat().st_size for path in paths]
    hashes = in_threads(sha256_of_file, paths)
    files = {str(path.relative_to(folder)): [size, digest] for path, size, digest in zip(paths, sizes, hashes)}
    content = as_bytes(files)
    whole = {"files": files, "sha256": hashlib.sha256(content).hexdigest(), "signature": signing.sign(content, out or folder.parent)}
    (folder / MANIFEST).write_text(json_text.dumps(whole, indent=1), encoding="utf-8")  # whose last byte counts
    sync_file(folder / MANIFEST)
    sync_entries(folder)


def as_bytes(files: dict) -> bytes:
    """What is signed."""
    return json.dumps(files, sort_keys=True).encode()


def read_manifest(folder: Path) -> dict | None:
    """The manifest; None where it is damaged."""
    try:
        whole = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        good = whole["sha256"] == hashlib.sha256(as_bytes(whole["files"])).hexdigest() and isinstance(whole["signature"], dict)
        return whole if good and all(type(size) is int and isinstance(digest, str) for size, digest in whole["files"].values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def has_manifest(folder: Path) -> bool:
    """False for a checkpoint of an older version, which had none; True for one that has lost its manifest."""
    if (folder / MANIFEST).exists():
        return True
    try:
        return b'"manifest"' in (folder / RECORD).read_bytes()
    except OSError:
        return False


def verify(folder: Path, hashes: bool = True) -> list[str]:
    """What is wrong with a folder that has a manifest, a line a file; [] where it is whole. hashes: else sizes alone, at once."""
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST} is missing"]
    whole = read_manifest(folder)
    if whole is None:
        return [f"{MANIFEST} is damaged"]
    wrong = {name: fault for name, (size, _) in whole["files"].items() if (fault := fault_of_size(folder / name, size))}
    if hashes:
        left = [name for name in whole["files"] if name not in wrong]
        same = in_threads(lambda name: matches(folder / name, whole["files"][name][1]), left)
        wrong |= {name: "is damaged" for name, good in zip(left, same) if not good}
    return [f"{name} {wrong[name]}" for name in whole["files"] if name in wrong]


def matches(path: Path, digest: str) -> bool:
    try:
        return sha256_of_file(path) == digest
    except OSError:  # a disk that cannot read it
        return False


def fault_of_size(path: Path, size: int) -> str | None:
    try:
        found = path.stat().st_size
    except OSError:
        return "is missing"
    if found == size:
        return None
    return "is empty" if not found else f"is cut ({found:,} of {size:,} bytes)" if found < size else "is damaged (longer than it was)"


def is_ours(folder: Path, out: Path | None = None) -> bool:
    """Whether a run of this user has written all that somebody could unpickle there. It is to be whole (verify()), too."""
    whole = read_manifest(folder)
    if whole is None or not signing.is_signed(as_bytes(whole["files"]), whole["signature"], out or folder.parent):
        return False
    names = {str(path.relative_to(folder)) for path in files_of(folder) if path.suffix not in HARMLESS}
    return names <= set(whole["files"])
