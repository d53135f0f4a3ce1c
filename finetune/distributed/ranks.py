"""The processes of one run, before and beside torch's process group: who they are, that they agree, whose error is shown.

torchrun starts every process (a rank) with its place in the environment, and keeps a key-value store that all of them
reach. Everything that takes long or may fail before training (checking, rendering) happens with this store alone: nobody
waits inside a collective operation, so nothing times out, however large the data, and an error of one ends all.
"""

import atexit
import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

from ..errors import PEER_GONE, UserError, note, put

PATIENCE_SECONDS = 20  # then a rank says what it is waiting for
WAKE_SECONDS = 3  # a rank whose only error is a lost peer prints nothing for so long
FLOOR_SECONDS = 0.5  # the first rank, which has the progress bar, may speak for all that fail together within that time
WATCH_SECONDS = 5  # between two looks at whether another rank has failed
LEAVE_SECONDS = 10  # a process that ends waits so long for its watching thread


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def gpu(visible: int) -> int:
    """The number of this rank's GPU among those that it sees. Some schedulers show each process one, whatever its place on the machine."""
    return local_rank() % max(1, visible)


def count() -> int:
    """The number of processes, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def machines() -> int:
    return -(-count() // int(os.environ.get("LOCAL_WORLD_SIZE", count())))


def name() -> str:
    """This process's name in messages: rank and host."""
    return f"rank {rank()} on {socket.gethostname()}"


def launch() -> str | None:
    """An id of the torchrun agent that started this process, the same after a restart; None where it was started by hand."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent = os.getppid()
    with contextlib.suppress(OSError):  # numbers of processes are used again, so its start counts (ticks, field 22)
        agent = f"{agent} {Path(f'/proc/{agent}/stat').read_text().rsplit(')', 1)[1].split()[19]}"
    return hashlib.sha256(f"{socket.gethostname()} {agent}".encode()).hexdigest()[:12]


class Meeting:
    """What the ranks tell each other through torch's key-value store. With one process, nothing happens.

    restarted: torchrun has started one of the ranks again, so the run goes on from its newest checkpoint.
    bar_is_elsewhere: the first rank's progress bar may stand on the last line, and this rank cannot close it.
    """

    def __init__(self):
        self.store, self.topics, self.restarted, self.bar_is_elsewhere = None, 0, False, False
        self.over = threading.Event()

    def is_alone(self) -> bool:
        """One process, started by hand: nobody to agree with, and no earlier start of the same run."""
        return count() == 1 and launch() is None

    def begin(self) -> None:
        """Every rank comes here first. Waits for the others, for as long as it takes."""
        from torch.distributed import rendezvous

        self.store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(days=7)))
        told = self.exchange("restarts", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
        self.restarted = any(told)
        watcher = threading.Thread(target=self.watch, daemon=True)
        watcher.start()
        atexit.register(self.leave, watcher)

    def leave(self, watcher: threading.Thread) -> None:
        """At the end of this process. Where rank 0 keeps the store (no torchrun), it stays until the others have read what they wait for."""
        # A thread that the interpreter's end finds inside the store's C++ code would abort the process (SIGABRT).
        self.over.set()
        watcher.join(LEAVE_SECONDS)
        with contextlib.suppress(Exception):  # the store may be gone with the process that kept it
            self.store.add("finetune/left", 1)
            if rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                end = time.monotonic() + LEAVE_SECONDS  # a rank that was killed does not come
                while self.store.add("finetune/left", 0) < count() and time.monotonic() < end:
                    time.sleep(0.02)

    def watch(self) -> None:
        """Ends this rank when another has failed: otherwise it would wait in a collective operation until the time-out."""
        with contextlib.suppress(Exception):  # the store is gone: its machine is, or the run is over
            while not self.store.check(["finetune/failure"]):
                if self.over.wait(WATCH_SECONDS):
                    return
            if self.over.wait(2 * WATCH_SECONDS):  # time to fail by itself, and to say so
                return
            who, _, line = self.store.get("finetune/failure").decode().partition(": ")
            if not who.endswith(f" on {socket.gethostname()}") and local_rank() == 0:
                put(f"error: {who} failed: {line}")
            os._exit(1)

    def exchange(self, what: str, value) -> list:
        """The values (anything JSON can write) of all ranks, in their order. All ranks must call it in the same order."""
        if count() == 1:
            return [value]
        if self.store is None:
            self.begin()
        self.topics += 1
        topic = f"finetune/{self.topics}/{what}"
        self.store.set(f"{topic}/{rank()}", json.dumps(value))
        return [json.loads(self.get(f"{topic}/{other}", what, other)) for other in range(count())]

    def wait(self, what: str) -> None:
        """Waits until all ranks have come here, without a time-out, which collective operations have."""
        if count() == 1:
            return
        if self.store is None:
            self.begin()
        self.topics += 1
        topic = f"finetune/{self.topics}/{what}"
        if self.store.add(f"{topic}/arrived", 1) == count():
            self.store.set(f"{topic}/all", "")
        self.wait_for_key(f"{topic}/all", f"the other ranks ({what})")

    def get(self, key: str, what: str, other: int) -> bytes:
        """Waits for a value of another rank."""
        self.wait_for_key(key, f"rank {other} ({what})")
        return self.store.get(key)

    def wait_for_key(self, key: str, whom: str) -> None:
        """Waits for a key, and says for whom when that takes long."""
        if not self.poll_key(key, PATIENCE_SECONDS):
            note(f"waiting for {whom}")
            self.poll_key(key, math.inf)

    def first_wish(self, what: str, wish):
        """What the first rank that had a wish has wished (anything JSON can write); None as long as none has. Nobody waits.

        The same on all ranks, once it is there. wish: this rank's, or None. Alone, its own.
        """
        if count() == 1:
            return wish
        if self.store is None:
            self.begin()
        key = f"finetune/{what}"
        if wish is not None:
            return json.loads(self.store.compare_set(key, "", json.dumps(wish)))
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def poll_key(self, key: str, seconds: float) -> bool:
        """Polls for a key; False when it is not there after so many seconds. (torch's own wait prints when it gives up.)"""
        begin, pause = time.monotonic(), 0.01
        while not self.store.check([key]):
            if time.monotonic() - begin > seconds:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return True

    @contextlib.contextmanager
    def as_one(self, what: str):
        """Around work that every rank does for itself: an error on one of them is raised on all of them.

        A finding that not all ranks share says where it was made.
        """
        findings, error = [], None
        try:
            yield
        except UserError as found:
            findings = found.findings
        except Exception as other:  # a fault of ours: the others must not wait for this rank
            findings, error = [f"{type(other).__name__}: {other}"], other
        told = self.exchange(what, [name(), findings])
        if error is not None:
            raise error
        if found := merged(told):
            raise UserError(*found)

    def speak(self, line: str, say) -> None:
        """Lets the first rank that fails print why; ranks that fail because of it wait until it has.

        Else torchrun, which ends all ranks with the first that ends, might cut it short.
        """
        if self.store is None:  # alone, or not together yet: nobody else can say it
            return say()
        if any(word in line for word in PEER_GONE):
            time.sleep(WAKE_SECONDS)  # the cause is elsewhere: let that rank speak, or torchrun end this one
        with contextlib.suppress(Exception):  # the store may be gone with the machine that kept it
            if rank() > 0:
                self.poll_key("finetune/failure", FLOOR_SECONDS)
            speaker = self.store.compare_set("finetune/failure", "", f"{name()}: {line}").decode()
            if not speaker.startswith(f"{name()}: "):
                self.poll_key("finetune/said", 10)
                return None
        if self.bar_is_elsewhere:
            put("")
        say()
        with contextlib.suppress(Exception):
            self.store.set("finetune/said", "")
        return None


def merged(told: list[tuple[str, list[str]]]) -> list[str]:
    """Every finding once. One that only some ranks made begins with the name of the first of them."""
    result = []
    for who, findings in told:
        for finding in findings:
            shared = all(finding in others for _, others in told)
            line = finding if shared else f"{who}: {finding}"
            if not any(line == before or before.endswith(f": {finding}") for before in result):
                result.append(line)
    return result


meeting = Meeting()


ALIKE = "start all machines alike"


def agree(card: dict, remedies: dict[str, str] | None = None) -> None:
    """All ranks hold equal cards (what: value, or a dict of them), or a UserError says which differ, and where first.

    remedies: what to do where a thing differs, if that is not to start all machines alike.
    """
    cards, findings = meeting.exchange("what they have", [name(), card]), {}
    (first, expected), *others = cards
    for who, other in others:
        for what in {**expected, **other}:
            remedy = (remedies or {}).get(what, ALIKE)
            for part, one, two in differences(what, expected.get(what), other.get(what)):
                findings.setdefault(part, f"{part}: {one} for {first}, {two} for {who} - {remedy}")
    if findings:
        raise UserError(*findings.values())


def differences(what: str, one, two):
    """Yields (name, value here, value there): of a dict, its differing entries under their own names."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in {**one, **two}:
            yield from differences(key, one.get(key), two.get(key))
    elif one != two:
        yield what, "none" if one is None else one, "none" if two is None else two


def sees_the_same(folder: Path) -> bool:
    """Whether all machines see what the first writes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".seen-by-all-{meeting.exchange('marking a folder', os.getpid())[0]}"
    if rank() == 0:
        mark.touch()
    meeting.exchange("marked a folder", True)
    seen = meeting.exchange("looked for the mark", mark.exists())
    if rank() == 0:
        mark.unlink()
    return all(seen)


@contextlib.contextmanager
def one_at_a_time(what: str):
    """No other process of this machine is in a block of the same name meanwhile.

    The lock is a file in the system's temporary folder; for a process that dies, the operating system unlocks it.
    """
    path = Path(tempfile.gettempdir(), f"finetune-{os.getuid()}-{what}.lock")
    with locked(path, what):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, what: str):
    """The lock on the file that is at `path` now: who held it before has removed the one that others were waiting for."""
    begin = time.monotonic()
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - begin > PATIENCE_SECONDS:
                    note(f"waiting for another process of this machine ({what})")
                    begin = float("inf")
                time.sleep(0.2)
                continue
            if lies_at(path, file.fileno()):
                yield
                return


def lies_at(path: Path, descriptor: int) -> bool:
    """Whether this open file is the one at `path`: who held it before may have removed it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
