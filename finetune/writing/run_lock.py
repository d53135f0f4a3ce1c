"""One run at a time in an output folder: a second one is refused before it writes, wherever it runs.

The lock is flock on a file in the folder, which the operating system takes back from a process that dies. Some file systems have no
locks, some shared ones have them for each machine alone. So the file says who holds it, and a beating heart (the file's time) says that
it lives: a run on another machine is watched for some seconds, and taken for dead where its heart does not beat.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from datetime import datetime
from pathlib import Path

from .. import json_text
from ..distributed.ranks import lies_at
from ..errors import UserError, note

NAME = ".run.lock"
BEAT_SECONDS = 5.0
WATCH_SECONDS = 20.0  # an owner on another machine whose heart does not beat for so long is dead
LEAVE_SECONDS = 60.0  # so long the torchrun of this run may take to end the process that it starts again


class Lock:
    """The lock on a folder, held until the program ends. made: folders that were made for it, gone again if nothing comes into them."""

    def __init__(self, descriptor: int, path: Path, made: list[Path]):
        self.descriptor, self.path, self.made, self.over = descriptor, path, made, threading.Event()
        self.process = os.getpid()

    def beat(self) -> None:
        while not self.over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.descriptor)

    def release(self) -> None:
        """Removes the file, and what was made for it."""
        if self.over.is_set() or os.getpid() != self.process:
            return
        self.over.set()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.descriptor), self.path.stat()):
                self.path.unlink()
        os.close(self.descriptor)
        with contextlib.suppress(OSError):
            for folder in self.made:
                folder.rmdir()


held: dict[Path, Lock] = {}  # of this process


def hold(out: Path, launches: list[str] = ()) -> None:
    """Takes the lock, until until_the_end() or the end of this process. UserError where another run holds it.

    launches: the agents of this run (ranks.launch): a process that one of them started is about to end, and is waited for.
    A folder that cannot be written to has no lock; the checks of the flags say so.
    """
    out = out.expanduser()
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = out.resolve() / NAME
        if path in held:
            return
        lock = Lock(taken(path, set(launches)), path, made)
    except OSError:
        return
    held[path] = lock
    with contextlib.suppress(OSError):
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, json_text.dumps(card(list(launches))).encode(), 0)
    threading.Thread(target=lock.beat, daemon=True).start()
    # a forked worker would keep the lock of a run that was killed
    os.register_at_fork(after_in_child=lambda: forget(path))


def forget(path: Path) -> None:
    if path in held:
        with contextlib.suppress(OSError):
            os.close(held.pop(path).descriptor)


@contextlib.contextmanager
def until_the_end():
    """A block, the whole program, after which the locks that were taken in it are gone."""
    try:
        yield
    finally:
        while held:
            held.popitem()[1].release()


def taken(path: Path, launches: set[str]) -> int:
    """An open file with the lock on it."""
    end = time.monotonic() + LEAVE_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            owner = read_card(descriptor)
            before = os.fstat(descriptor).st_mtime_ns
            locks = try_lock(descriptor)
            if locks is not False and lies_at(path, descriptor) and not lives(owner, descriptor, before, locks, launches):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        ours = bool(launches & set(owner.get("launches", ())))
        gone = not lies_at(path, descriptor)
        os.close(descriptor)
        if not gone and not (ours and time.monotonic() < end):
            raise UserError(in_words(path.parent, owner))
        time.sleep(0.2)


def try_lock(descriptor: int) -> bool | None:
    """True: it has the lock; False: another process has; None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def lives(owner: dict, descriptor: int, before: int, locks: bool | None, launches: set[str]) -> bool:
    """Whether the owner that the file names still runs. locks: as of try_lock(); before: the file's time when it was opened."""
    if not owner or launches & set(owner.get("launches", ())):
        return False  # of this very run, whose agent has ended it
    if owner.get("machine") == machine():
        return locks is None and started(owner.get("pid")) == owner.get("started") is not None
    note(f"{owner.get('host')} had a run in this folder: looking for {WATCH_SECONDS:.0f} seconds whether it still runs")
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_SECONDS / 10))
        if os.fstat(descriptor).st_mtime_ns != before:
            return True
    return False


def card(launches: list[str]) -> dict:
    """Who holds the lock."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
    return own | {"machine": machine(), "started": started(os.getpid()), "launches": launches}


def read_card(descriptor: int) -> dict:
    """{} for a file that nobody has written to."""
    try:
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def machine() -> str:
    """Where numbers of processes mean the same: the machine, since it was started, and its container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def started(pid: int | None) -> str | None:
    """When a process of this machine was started (ticks): numbers of processes are used again. None where it is gone."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return None


def in_words(out: Path, owner: dict) -> str:
    who = f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}" if owner.get("pid") else "another process"
    return f"--output_dir {out}: another run is at work there ({who}) - wait for it or end it, or give another --output_dir"
