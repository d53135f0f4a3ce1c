"""One run at a time in an output folder, on every kind of storage; and a dead one's lock is taken over."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.writing import run_lock

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from finetune.errors import run
from finetune.writing import run_lock
from pathlib import Path
def main():
    run_lock.hold(Path(sys.argv[2]), sys.argv[3:])
    print("held", flush=True)
    sys.stdin.read()
with run_lock.until_the_end():
    run(main)
"""


def start(out: Path, *launches: str) -> subprocess.Popen:
    """A process that takes the lock, and keeps it until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(ROOT), str(out), *launches], **pipes)


def held(process) -> bool:
    return process.stdout.readline() == "held\n"


def hold(out: Path, launches=()) -> None:
    """Takes the lock, and gives it back."""
    with run_lock.until_the_end():
        run_lock.hold(out, launches)


def test_the_second_run_is_refused_and_the_first_named(tmp_path):
    out = tmp_path / "a" / "out"
    first = start(out)
    assert held(first)
    second = start(out)
    printed = second.communicate(timeout=60)[1]
    assert second.returncode == 2 and printed.count("\n") == 1
    assert f"--output_dir {out}: another run is at work there (process {first.pid} on {socket.gethostname()}, since 20" in printed
    assert "give another --output_dir" in printed and [path.name for path in out.iterdir()] == [run_lock.NAME]
    first.communicate("", timeout=60)
    assert not (tmp_path / "a").exists()  # nothing came into them
    hold(out)


def test_a_killed_runs_lock_is_taken_over(tmp_path):
    first = start(tmp_path)
    assert held(first)
    first.kill()
    first.communicate(timeout=60)
    assert (tmp_path / run_lock.NAME).exists()
    hold(tmp_path)
    assert not (tmp_path / run_lock.NAME).exists()


def test_a_process_of_the_same_launch_is_waited_for(tmp_path):
    """torchrun starts a worker again, while the one before is about to end."""
    first = start(tmp_path, "agent 1")
    assert held(first)
    threading.Timer(1, lambda: first.send_signal(signal.SIGKILL)).start()
    begin = time.monotonic()
    hold(tmp_path, ["agent 1", "agent 2"])
    assert 0.5 < time.monotonic() - begin < 30
    first.communicate(timeout=60)


def test_a_forked_worker_does_not_keep_it(tmp_path):
    """A worker of the data loader may outlive a run that was killed."""
    holder = os.fork()
    if not holder:
        run_lock.hold(tmp_path)
        if not os.fork():
            time.sleep(5)
        os._exit(0)
    os.waitpid(holder, 0)
    hold(tmp_path)


def no_locks(monkeypatch) -> None:
    """A file system without them."""

    def flock(*words):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("alive", [True, False])
def test_where_there_are_no_locks_the_process_counts(tmp_path, monkeypatch, alive):
    no_locks(monkeypatch)
    first = start(tmp_path)
    assert held(first)
    if alive:
        with pytest.raises(UserError, match=f"another run is at work there .process {first.pid} "):
            run_lock.hold(tmp_path)
    first.kill()
    first.communicate(timeout=60)
    hold(tmp_path)


@pytest.mark.parametrize("beats", [True, False])
@pytest.mark.parametrize("locks", [True, False])
def test_a_run_on_another_machine_is_known_by_its_heart(tmp_path, monkeypatch, capsys, beats, locks):
    """Its process cannot be asked for, and where locks are of each machine alone, its lock is not seen."""
    if not locks:
        no_locks(monkeypatch)
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 1.5)
    path = tmp_path / run_lock.NAME
    owner = {"host": "node7", "pid": 4711, "since": "2026-11-27T01:00:00+00:00", "machine": "node7 boot", "started": "1", "launches": []}
    path.write_text(json.dumps(owner))
    if beats:
        threading.Timer(0.5, lambda: os.utime(path)).start()
        with pytest.raises(UserError, match="another run is at work there .process 4711 on node7, since 2026-11-27T01:00:00"):
            run_lock.hold(tmp_path)
    else:
        hold(tmp_path)
    assert "node7 had a run in this folder" in capsys.readouterr().err


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with run_lock.until_the_end():
        run_lock.hold(tmp_path)
        os.utime(tmp_path / run_lock.NAME, (1, 1))
        end = time.monotonic() + 10
        while (tmp_path / run_lock.NAME).stat().st_mtime < 2:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_folder_that_cannot_be_written_to_is_left_to_the_checks(tmp_path):
    (tmp_path / "file").touch()
    hold(tmp_path / "file")
    hold(tmp_path / "file" / "below")
