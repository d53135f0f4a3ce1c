"""What the processes of a run tell each other before the process group: agreement, errors, one at a time."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import warm

from finetune.distributed import ranks
from finetune.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def test_findings_of_all_ranks_are_said_once():
    told = [("rank 0 on a", ["x"]), ("rank 1 on a", ["x", "y"]), ("rank 2 on b", ["x", "y"])]
    assert ranks.merged(told) == ["x", "rank 1 on a: y"]
    assert ranks.merged([("rank 0 on a", []), ("rank 1 on b", [])]) == []


def test_a_run_of_one_process_needs_no_store():
    meeting = ranks.Meeting()
    assert meeting.exchange("anything", 3) == [3]
    with pytest.raises(UserError, match="wrong"), meeting.as_one("checks"):
        raise UserError("wrong")
    with pytest.raises(KeyError), meeting.as_one("checks"):
        raise KeyError("ours")
    said = []
    meeting.speak("line", lambda: said.append("line"))
    assert said == ["line"] and not meeting.restarted


def together(script: str, count: int = 2, timeout: float = 60, **environment):
    """Runs `script` as several ranks, whose store rank 0 keeps; -> [(exit code, what it printed)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    begin = "import json, os, sys, time\nfrom finetune import errors\nfrom finetune.distributed import ranks\nfrom finetune.distributed.ranks import meeting\n"
    own = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [warm.python(), "-c", begin + textwrap.dedent(script)],
            env=os.environ | own | {"RANK": str(i), "LOCAL_RANK": str(i)} | environment, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    return [(process.wait(timeout), process.stdout.read()) for process in processes]


def test_ranks_exchange_values_and_agree():
    done = together(
        """
        found = meeting.exchange("a", {"me": ranks.rank()})
        ranks.agree({"data": "same"})
        print(json.dumps([found, meeting.exchange("b", ranks.rank() * 10)]))
        meeting.exchange("end", 0)
    """,
        count=3,
    )
    expected = [[{"me": 0}, {"me": 1}, {"me": 2}], [0, 10, 20]]
    assert [(code, json.loads(printed)) for code, printed in done] == [(0, expected)] * 3


def test_a_difference_is_named_once():
    done = together(
        """
        def main():
            ranks.agree({"data as rendered": "ab12" if ranks.rank() < 1 else "cd34", "--learning_rate": 1e-4})
        errors.run(main, speak=meeting.speak)
    """,
        count=3,
    )
    assert [code for code, _ in done] == [2, 2, 2]
    printed = "".join(text for _, text in done)
    assert printed.count("error:") == 1 and "learning_rate" not in printed
    host = socket.gethostname()
    assert f"data as rendered: ab12 for rank 0 on {host}, cd34 for rank 1 on {host} - start all machines alike" in printed


def test_differing_parts_and_what_to_do(monkeypatch):
    """Of a dict the parts that differ, by themselves, also where only one rank has them."""
    there = {"versions": {"torch": "2.11.0", "peft": "0.21"}, "point": None, "deepspeed": {"zero": {"stage": 3}}}
    here = {"versions": {"torch": "2.13.0", "peft": "0.21", "deepspeed": "0.19"}, "point": "checkpoint-3"}
    here["deepspeed"] = {"zero": {"stage": 2}}
    told = [["rank 0 on a", here], ["rank 8 on b", there], ["rank 9 on b", there]]
    monkeypatch.setattr(ranks.meeting, "exchange", lambda what, card: told)
    with pytest.raises(UserError) as error:
        ranks.agree(here, {"versions": "install the same", "point": "share the folder"})
    assert error.value.findings == [
        "torch: 2.13.0 for rank 0 on a, 2.11.0 for rank 8 on b - install the same",
        "deepspeed: 0.19 for rank 0 on a, none for rank 8 on b - install the same",
        "point: checkpoint-3 for rank 0 on a, none for rank 8 on b - share the folder",
        "stage: 2 for rank 0 on a, 3 for rank 8 on b - start all machines alike",
    ]


def test_an_agent_is_the_same_over_its_restarts(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert ranks.launch() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "finetune")
    assert ranks.launch() == ranks.launch() != None  # noqa: E711
    print_one = "from finetune.distributed import ranks; print(ranks.launch())"
    words = [sys.executable, "-c", print_one]
    started = [subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert started[0] == started[1] != f"{ranks.launch()}\n"  # this process is their agent, and has one of its own


@pytest.mark.parametrize("error,code", [("errors.UserError('no such file')", 2), ("RuntimeError('no such file')", 1)])
def test_an_error_of_one_ends_all_and_is_shown_once(error, code):
    done = together(f"""
        def main():
            with meeting.as_one("checks"):
                if ranks.rank() == 1:
                    raise {error}
            time.sleep(100)
        errors.run(main, speak=meeting.speak)
    """)
    printed = "".join(text for _, text in done)
    assert {code for code, _ in done} <= {1, 2} and done[1][0] in (code, 2)
    assert printed.count("no such file") <= 2 and "rank 1 on" in printed or "RuntimeError: no such file" in printed
    assert printed.count("error:") + printed.count("Traceback") == 1


def test_the_watch_for_failures_ends_before_the_process():
    """A thread that is in the store's C++ code when the interpreter ends would abort it with signal 6."""
    done = together("""
        ranks.WATCH_SECONDS = 0.0
        meeting.exchange("a", 0)
        time.sleep(0.3)
    """)
    assert done == [(0, ""), (0, "")]


def test_an_error_in_training_is_shown_by_the_first_that_fails():
    done = together("""
        def main():
            meeting.begin()
            time.sleep(1.0 * (1 - ranks.rank()))
            raise FloatingPointError("the loss became nan at step 3")
        errors.run(main, speak=meeting.speak)
    """)
    assert done == [(1, ""), (1, "error: the loss became nan at step 3\n")]


def test_the_first_rank_speaks_for_all_that_fail_together():
    """It can close its progress bar. Where it does not fail, the line of another begins below that."""
    done = together("""
        def main():
            meeting.begin()
            meeting.bar_is_elsewhere = ranks.rank() > 0
            time.sleep(0.2 * (1 - ranks.rank()))
            raise FloatingPointError("no number")
        errors.run(main, speak=meeting.speak)
    """)
    assert done == [(1, "error: no number\n"), (1, "")]
    done = together("""
        ranks.WATCH_SECONDS = 0.1
        def main():
            meeting.begin()
            meeting.bar_is_elsewhere = ranks.rank() > 0
            if ranks.rank() == 1:
                raise FloatingPointError("no number")
            time.sleep(60)
        errors.run(main, speak=meeting.speak)
    """)
    assert done == [(1, ""), (1, "\nerror: no number\n")]


@pytest.mark.parametrize("words", ["errors.note('a b')", "errors.tell('a b')", "errors.run(lambda: 1 / 0)"])
def test_a_line_is_written_in_one_piece(words):
    """torchrun starts processes without a buffer. Each write into this pipe is a packet of its own."""
    readable, writable = os.pipe2(os.O_DIRECT)
    subprocess.run([warm.python(), "-u", "-c", f"from finetune import errors; {words}"], cwd=ROOT, stderr=writable)
    os.close(writable)
    packets = [os.read(readable, 9999)]
    while packets[-1]:
        packets.append(os.read(readable, 9999))
    os.close(readable)
    assert len(packets) == 2 and packets[0].endswith(b"\n") and (b"a b" in packets[0] or b"ZeroDivisionError" in packets[0]), packets


def test_a_rank_that_waits_for_a_failed_one_ends():
    done = together("""
        ranks.WATCH_SECONDS = 0.2
        if ranks.rank() == 0:  # as if it were on another machine
            ranks.socket.gethostname = lambda: "elsewhere"
        def main():
            meeting.begin()
            if ranks.rank() == 1:
                raise FloatingPointError("no number")
            time.sleep(60)
        errors.run(main, speak=meeting.speak)
    """)
    host = socket.gethostname()
    assert done == [(1, f"error: rank 1 on {host} failed: no number\n"), (1, "error: no number\n")]


def test_a_rank_that_fails_before_all_have_met_says_so():
    done = together("""
        def main():
            if ranks.rank() == 1:
                raise RuntimeError("the disk is gone")
        errors.run(main, speak=meeting.speak)
    """)
    assert done[0] == (0, "") and done[1][0] == 1 and "RuntimeError: the disk is gone" in done[1][1]


def test_ranks_wait_for_the_last(tmp_path):
    """Nobody goes on before all have come, as often as they do; a long wait is told."""
    done = together(
        """
        from pathlib import Path
        meeting.begin()
        ranks.PATIENCE_SECONDS = 0.5
        for i in range(3):
            time.sleep(1.5 * (ranks.rank() == i))
            Path(os.environ["FOLDER"], f"{i}-{ranks.rank()}").touch()
            meeting.wait("a result is written")
            assert len(list(Path(os.environ["FOLDER"]).glob(f"{i}-*"))) == 3
        meeting.exchange("end", 0)
    """,
        count=3,
        FOLDER=str(tmp_path),
    )
    assert done == [(0, "note: waiting for the other ranks (a result is written)\n" * 2), (0, ""), (0, "")]


def test_a_restart_of_any_rank_is_known_to_all():
    done = together("""
        if ranks.rank() == 1:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        meeting.begin()
        print(meeting.restarted)
        meeting.exchange("end", 0)
    """)
    assert [text for _, text in done] == ["True\n"] * 2


def test_shared_and_own_folders(tmp_path):
    script = """
        from pathlib import Path
        print(ranks.sees_the_same(Path(os.environ["FOLDER"].replace("RANK", os.environ["RANK"]))))
        meeting.exchange("end", 0)
    """
    assert [text for _, text in together(script, FOLDER=str(tmp_path / "one"))] == ["True\n"] * 2
    assert [text for _, text in together(script, FOLDER=str(tmp_path / "RANK"))] == ["False\n"] * 2
    assert list(tmp_path.glob("*/.seen*")) == []


def test_one_at_a_time(tmp_path):
    """Three processes, each begun while the one before it is inside or waiting; none goes in before that one has ended."""
    script = """
        time.sleep(float(os.environ["BEGIN"]) + 0.3 * ranks.rank() - time.time())
        with ranks.one_at_a_time(os.environ["NAME"]):
            begin = time.time()
            time.sleep(0.5)
            print(begin, time.time())
    """
    told = together(script, count=3, NAME=tmp_path.name, BEGIN=str(time.time() + 4))
    spans = sorted(tuple(map(float, text.split())) for _, text in told)
    assert len(spans) == 3 and all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))


def test_a_lock_is_on_the_file_that_others_will_open(tmp_path):
    """One holds the lock, another waits for it; the first removes the file, and a third that comes then must wait, too."""
    script = """
        import fcntl
        from pathlib import Path
        def flock(file, how, locks=fcntl.flock):
            locks(file, how)
            if os.environ.pop("REMOVE", ""):  # by the one that held it, between opening and locking
                Path(file.name).unlink()
        fcntl.flock = flock
        os.environ["REMOVE"] = "1"
        path = Path(os.environ["FOLDER"], "lock")
        with ranks.locked(path, "test"):
            print(path.exists())
    """
    [(code, told)] = together(script, count=1, FOLDER=str(tmp_path))
    assert (code, told) == (0, "True\n")


def test_a_waiting_rank_says_for_whom():
    done = together("""
        meeting.begin()
        ranks.PATIENCE_SECONDS = 0.5
        time.sleep(2 * (ranks.rank() == 1))
        meeting.exchange("data", 0)
        meeting.exchange("end", 0)
    """)
    assert done[0] == (0, "note: waiting for rank 1 (data)\n") and done[1] == (0, "")
