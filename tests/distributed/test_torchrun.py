"""finetune/distributed/torchrun.py: what is told before torch is imported, and, slow, real launches of small workers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from networks import free_port, two_machines

from finetune.distributed import network, torchrun

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = ROOT / "finetune" / "distributed" / "torchrun.py"
# A worker without torch: notes its start and its environment, and does what its first argument says.
WORKER = """
import json, os, pathlib, signal, sys, time
folder, wish = pathlib.Path(__file__).parent, sys.argv[1]
rank, attempt = int(os.environ["RANK"]), len(list(folder.glob("started-*"))) // int(os.environ["WORLD_SIZE"])
note = {"pid": os.getpid(), "arguments": sys.argv[1:], "path": sys.path[0], **os.environ}
(folder / f"started-{rank}-{os.getpid()}").write_text(json.dumps(note))
def tell(line):  # as errors.tell does
    print("error:", line, file=sys.stderr)
    pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": line}))
if wish == "user error":
    if rank == 0:
        time.sleep(0.5)
        tell("the data is not there")
    sys.exit(2)
if wish == "crash":
    time.sleep(0.3 if rank == 0 else 0)
    sys.exit(0 if rank == 0 else 7)
if wish == "tells":
    if rank == 1:
        tell("no data here - copy it")
        sys.exit(2)
    time.sleep(120)
if wish == "killed once" and rank == 1 and attempt == 0:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
if wish == "wait":
    def stop(number, frame):
        (folder / f"stopped-{rank}").write_text(str(number))
        sys.exit(1)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    time.sleep(120)
if wish == "saves":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    time.sleep(120)
if wish == "killed once" and attempt == 0:
    time.sleep(120)
"""
# A worker whose ranks add numbers up, one round every tenth of a second, and go on where rank 0 has counted to.
ADDING = """
import datetime, os, pathlib, sys, time
import torch, torch.distributed as dist
folder = pathlib.Path(__file__).parent
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
count = torch.tensor(int((folder / "count").read_text()) if (folder / "count").exists() else 0)
dist.broadcast(count, 0)
print("world", os.environ["NODE"], dist.get_rank(), dist.get_world_size(), int(count), flush=True)
for step in range(int(count), int(sys.argv[1])):
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    assert total == 3
    if dist.get_rank() == 0:
        (folder / "count.new").write_text(str(step + 1))
        os.replace(folder / "count.new", folder / "count")
    time.sleep(0.1)
dist.destroy_process_group()
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "the worker.py"
    path.write_text(WORKER)
    return path


@pytest.fixture
def adding(tmp_path):
    path = tmp_path / "adding.py"
    path.write_text(ADDING)
    return path


@pytest.fixture
def agents(tmp_path):
    """agents(*words, before=(), python=the warm one, **environment) starts one in the background; what is left is killed."""
    running = []
    (tmp_path / "tmp").mkdir()  # a killed agent leaves its temporary folder

    def launch(*words, before=(), python=None, **environment):
        command = [*before, python or warm.python(), str(TORCHRUN), *map(str, words)]
        inherited = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "SLURM_JOB_ID")}
        inherited["TMPDIR"] = str(tmp_path / "tmp")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=inherited | environment, **pipes))
        return running[-1]

    yield launch
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        print(*process.communicate())  # which pytest shows where the test has failed


def end_of(process, timeout=120) -> tuple[int, str]:
    """(exit code, standard error)."""
    _, told = process.communicate(timeout=timeout)
    return process.returncode, told


def started(worker: Path) -> list[dict]:
    """What the workers have noted of themselves, by rank and time."""
    notes = [json.loads(path.read_text()) for path in worker.parent.glob("started-*") if path.stat().st_size]
    return sorted(notes, key=lambda note: (int(note["RANK"]), note["pid"]))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def host_address() -> str:
    """An address of this machine that is not 127.0.0.1, as two agents on it use it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return probe.getsockname()[0]


def is_alive(pid: int) -> bool:
    """A process that waits to be reaped is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---- before torch is imported


def test_the_scripts_words_are_its_own():
    job = torchrun.parse(["--nproc_per_node", "2", "--max_restarts", "1", "s.py", "--nnodes", "3", "--", "-x"])
    assert job == network.Job(["s.py", "--nnodes", "3", "--", "-x"], nproc_per_node=2, max_restarts=1)
    with pytest.raises(SystemExit):
        torchrun.parse(["--nproc_per_node", "2"])


def test_a_busy_port(agents):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        line = f"error: port {port} is in use on this machine - set MASTER_PORT to a free one"
        started = time.monotonic()
        assert end_of(agents("--master_port", port, "x.py", python=sys.executable)) == (2, f"{line}, or leave it out\n")
        machine = ("--nnodes", 2, "--master_addr", "10.0.0.1", "--master_port", port)
        assert end_of(agents(*machine, "x.py", python=sys.executable, RANK="3")) == (2, f"{line}, the same on all machines\n")
        assert time.monotonic() < started + 2 * network.LETTING_GO_SECONDS + 3  # torch has not been imported


def test_what_the_workers_inherit(monkeypatch):
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is taken back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    torchrun.set_worker_environment(network.Job([], nproc_per_node=3))
    assert (os.environ["OMP_NUM_THREADS"], "RANK" in os.environ) == ("5", False)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    torchrun.set_worker_environment(network.Job([], nnodes=2, node_rank=1, master_addr="127.0.0.1"))
    assert (os.environ["OMP_NUM_THREADS"], os.environ["GLOO_SOCKET_IFNAME"]) == ("7", "lo")


def test_a_worker_dies_with_its_agent(tmp_path):
    """The parent starts a sleeper through dies_with_parent.py, and is killed."""
    program = str(ROOT / "finetune" / "distributed" / "dies_with_parent.py")
    code = f"""import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-I", "-S", {program!r}, str(os.getpid()), sys.executable, "-c",
    "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"])
time.sleep(60)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    wait_until(lambda: not is_alive(pid), 10)


def test_a_worker_whose_agent_is_gone_does_not_start():
    program = str(ROOT / "finetune" / "distributed" / "dies_with_parent.py")
    done = subprocess.run(
        [sys.executable, program, "1", sys.executable, "-c", "print(1)"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")


# ---- real launches on one machine


def signal_once_started(agent, number: int, worker) -> None:
    """Sends an agent a signal when both workers run, with handlers of their own."""
    wait_until(lambda: len(started(worker)) == 2)
    time.sleep(0.5)
    agent.send_signal(number)


@pytest.mark.slow
def test_two_processes(agents, worker):
    """They get the words as they are, a world, and an equal share of the cores; nothing else is printed."""
    words = ["ok", "a  b", "$local_rank", "$$", "${HOME}", "--", "--nnodes", "ä"]
    assert end_of(agents("--nproc_per_node", 2, worker, *words, python=sys.executable)) == (0, "")
    first, second = started(worker)
    assert first["arguments"] == second["arguments"] == words
    assert [(note["RANK"], note["LOCAL_RANK"], note["WORLD_SIZE"]) for note in (first, second)] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert first["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert first["path"] == str(worker.parent)


@pytest.mark.slow
def test_a_user_error_is_told_once_and_not_tried_again(agents, worker):
    """Rank 1 ends first, yet rank 0 may finish its line."""
    agent = agents("--nproc_per_node", 2, "--max_restarts", 3, worker, "user error")
    assert end_of(agent) == (2, "error: the data is not there\n")
    assert len(started(worker)) == 2


@pytest.mark.slow
def test_an_exit_code_is_passed_on(agents, worker):
    """Rank 1 has stopped without a word that one could see."""
    code, told = end_of(agents("--nproc_per_node", 2, worker, "crash"))
    assert (code, told) == (7, f"error: rank 1 on {socket.gethostname()} stopped with exit code 7\n")


@pytest.mark.slow
def test_what_only_one_rank_has_found(agents, worker):
    """It has told its user, and rank 0, which would wait for ever, is stopped."""
    code, told = end_of(agents("--nproc_per_node", 2, worker, "tells"))
    assert (code, told) == (2, "error: no data here - copy it\n")


@pytest.mark.slow
def test_what_one_machine_has_found_stands_on_the_other_too(agents, worker):
    """Torch's error file carries the line there."""
    first, second = two(agents, free_port(), worker, "tells")
    code, told = end_of(second)
    assert code == 2 and told.splitlines()[-1] == "error: no data here - copy it"
    code, told = end_of(first)
    line = f"the run was ended on another machine: rank 1 on {socket.gethostname()}: no data here - copy it"
    assert (code, told.splitlines()[-1]) == (2, f"note: {line}")


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_killed_worker(agents, worker, restarts):
    """The others are stopped; all start again, if they may."""
    code, told = end_of(agents("--nproc_per_node", 2, "--max_restarts", restarts, worker, "killed once"))
    line = f"rank 1 on {socket.gethostname()} was killed by signal 9 (SIGKILL) - the machine may be out of memory (see dmesg)"
    if restarts:
        assert (code, told) == (0, f"warning: {line}; starting again, restarts left: 1\n")
        assert len(started(worker)) == 4
    else:
        assert (code, told) == (137, f"error: {line}\n")
        assert len(started(worker)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_goes_to_the_workers(agents, worker, number, code):
    agent = agents("--nproc_per_node", 2, "--max_restarts", 1, worker, "wait")
    signal_once_started(agent, number, worker)
    assert end_of(agent, 20) == (code, "")
    assert [(worker.parent / f"stopped-{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2
    assert not any(is_alive(note["pid"]) for note in started(worker))


@pytest.mark.slow
def test_who_was_asked_to_stop_and_saved_is_not_started_again(agents, worker):
    agent = agents("--nproc_per_node", 2, "--max_restarts", 3, worker, "saves")
    signal_once_started(agent, signal.SIGUSR1, worker)
    assert end_of(agent, 20) == (75, "") and len(started(worker)) == 2


@pytest.mark.slow
def test_two_machines_end_alike_when_one_was_asked_to_stop(agents, worker):
    first, second = two(agents, free_port(), worker, "saves", max_restarts=3)
    signal_once_started(second, signal.SIGUSR1, worker)
    codes = [end_of(agent, 30)[0] for agent in (first, second)]
    assert codes == [75, 75] and len(started(worker)) == 2


@pytest.mark.slow
def test_a_killed_agent_leaves_no_worker(agents, worker):
    agent = agents("--nproc_per_node", 2, worker, "wait")
    wait_until(lambda: len(started(worker)) == 2)
    agent.kill()
    wait_until(lambda: not any(is_alive(note["pid"]) for note in started(worker)), 10)


# ---- two machines, which are one


def two(agents, port, script, *words, ranks=(0, 1), **flags) -> list[subprocess.Popen]:
    """An agent for each of `ranks`, of one process."""
    common = ["--nnodes", len(ranks), "--master_addr", host_address(), "--master_port", port]
    common += [word for name, value in flags.items() for word in (f"--{name}", value)]
    return [agents("--node_rank", rank, *common, script, *words, NODE=str(rank)) for rank in ranks]


@pytest.mark.slow
def test_two_machines(agents, adding):
    first, second = two(agents, free_port(), adding, 3)
    assert first.communicate(timeout=120)[0] == "world 0 0 2 0\n"
    assert second.communicate(timeout=120)[0] == "world 1 1 2 0\n"
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.slow
def test_one_machines_error_ends_both(agents, worker):
    """Rank 1 on machine 1 is killed, while rank 0 waits on machine 0: both say why."""
    first, second = two(agents, free_port(), worker, "killed once")
    line = f"rank 1 on {socket.gethostname()} was killed by signal 9 (SIGKILL) - the machine may be out of memory (see dmesg)"
    code, told = end_of(second)
    assert (code, told.splitlines()[-1]) == (137, f"error: {line}")
    code, told = end_of(first)
    assert (code, told.splitlines()[-1]) == (137, f"note: the run was ended on another machine: {line}")


@pytest.mark.slow
def test_a_user_error_on_two_machines(agents, worker):
    """Neither tries again; the error stands on machine 0 alone."""
    first, second = two(agents, free_port(), worker, "user error", max_restarts=3)
    (code_0, told_0), (code_1, told_1) = end_of(first), end_of(second)
    assert (code_0, code_1) == (2, 2)
    assert [line for line in told_0.splitlines() if "note: " not in line] == ["error: the data is not there"]
    assert "error: " not in told_1
    assert len(started(worker)) == 2


@pytest.mark.slow
def test_ctrl_c_on_one_machine_ends_both(agents, worker):
    first, second = two(agents, free_port(), worker, "wait", max_restarts=3)
    signal_once_started(second, signal.SIGINT, worker)
    code, told = end_of(second)
    assert code == 130 and told.splitlines()[-1].startswith("note: machine 1 of 2: waiting")
    code, told = end_of(first)
    line = f"the run was ended on another machine: machine 1 ({socket.gethostname()}) was stopped by a signal"
    assert (code, told.splitlines()[-1]) == (130, f"note: {line}")


@pytest.mark.slow
def test_a_machine_that_never_joins(agents, worker):
    common = ["--nnodes", 3, "--master_addr", host_address(), "--master_port", free_port(), "--master_timeout", 15]
    first, second = (agents("--node_rank", rank, *common, worker, "ok") for rank in (0, 1))
    line = "2 of 3 machines joined within 15 s, missing NODE_RANK 2 - start the same command there, or see why it ended"
    code, told = end_of(first)
    assert (code, told.splitlines()[-1]) == (2, f"error: {line}")
    code, told = end_of(second)
    assert (code, told.splitlines()[-1]) == (2, f"note: the run was ended on another machine: {line}")


@pytest.mark.slow
def test_a_number_given_twice(agents, worker):
    common = ["--nnodes", 3, "--master_addr", host_address(), "--master_port", free_port()]
    processes = [agents("--node_rank", rank, *common, worker, "ok") for rank in (0, 1, 1)]
    line = "NODE_RANK=1 on more than one machine - give each its own, 0 to 2"
    for process in processes:
        code, told = end_of(process)
        assert code == 2
        assert told.splitlines()[-1] in (f"error: {line}", f"note: the run was ended on another machine: {line}")
    assert started(worker) == []


# ---- two machines with their own addresses


@pytest.fixture
def machines():
    with two_machines() as found:
        if not found[0].prefix:
            pytest.skip("network namespaces cannot be made here")
        yield found


def machine(agents, machines, rank, *words):
    flags = ["--nnodes", 2, "--node_rank", rank, "--master_addr", machines[0].address, "--master_port", 6001]
    return agents(*flags, "--max_restarts", 3, *words, before=machines[rank].prefix, NODE=str(rank))


@pytest.mark.slow
def test_an_address_on_the_cable_where_nobody_is(agents, machines):
    begin = time.monotonic()
    flags = ["--nnodes", 2, "--node_rank", 1, "--master_addr", "10.77.0.9", "--master_port", 6001]
    code, told = end_of(agents(*flags, "x.py", before=machines[1].prefix))
    assert code == 2 and told.startswith("error: machine 0 cannot be reached at 10.77.0.9:6001 (")
    assert time.monotonic() < begin + 15


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_comes_back(agents, machines, adding, killed):
    """One agent is killed in mid-run, with its worker, and started again: both go on from where rank 0 has counted to."""
    count = adding.parent / "count"
    processes = [machine(agents, machines, rank, adding, 150) for rank in (0, 1)]
    wait_until(lambda: count.exists() and int(count.read_text()) > 5, 90)
    processes[killed].kill()
    at_least = int(count.read_text())
    back = machine(agents, machines, killed, adding, 150)
    wait_until(lambda: back.poll() is not None or processes[1 - killed].poll() is not None, 180)
    assert back.poll() in (None, 0), back.communicate()
    printed, told = processes[1 - killed].communicate(timeout=60)
    assert processes[1 - killed].returncode == 0, told
    assert "starting again" in told
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["world", str(1 - killed), str(1 - killed), "2", "0"]
    assert lines[-1][:4] == ["world", str(1 - killed), str(1 - killed), "2"]
    assert int(lines[-1][4]) >= at_least
    printed, told = back.communicate(timeout=60)
    assert (back.returncode, printed.split()[:4]) == (0, ["world", str(killed), str(killed), "2"]), told
    assert int(count.read_text()) == 150


@pytest.mark.slow
def test_machine_0_is_off_for_a_while(agents, machines, adding):
    """Its agent is killed and the cable taken out: the other machine gets no answer at all, and waits for it."""

    def cable(state):
        [name] = (word for word in machines[0].prefix if word.startswith("finetune"))
        listed = subprocess.run(["ip", "-n", name, "-o", "link"], check=True, capture_output=True, text=True).stdout
        [own] = (line.split()[1].partition("@")[0] for line in listed.splitlines() if ": ft" in line)
        subprocess.run(["ip", "-n", name, "link", "set", own, state], check=True)

    count = adding.parent / "count"
    first, second = (machine(agents, machines, rank, adding, 100) for rank in (0, 1))
    wait_until(lambda: count.exists() and int(count.read_text()) > 5, 90)
    first.kill()
    while "is lost; starting again" not in (line := second.stderr.readline()):
        assert line, "it has ended"
    cable("down")
    time.sleep(12)  # longer than a connection is tried for
    assert second.poll() is None, second.communicate()
    cable("up")
    back = machine(agents, machines, 0, adding, 100)
    code, told = end_of(second, 180)
    assert code == 0, told
    assert end_of(back)[0] == 0 and int(count.read_text()) == 100
