"""The agent: starts this machine's workers, watches them, and starts them again together with the other machines'.

It is torch's elastic agent with its c10d rendezvous, and differs from torchrun in this:

- Ranks follow NODE_RANK, so that rank 0 is on machine 0; two machines with one NODE_RANK are told.
- What ends one machine's run for good ends all of them, with one line that says what it was, and no traceback of the agent.
- A user error (exit code 2) is not tried again, nor what was asked to stop (75: it has saved, and can go on).
- A signal is handed on to the workers, which stop behind a step, with a checkpoint; by a second Ctrl-C or SIGTERM they are ended.
- A machine that comes back finds the others, also machine 0, which keeps the store that all of them meet in.
- Workers cannot outlive their agent (dies_with_parent.py).

Keys in the store: "ended" (JSON: code, line), "left" (how many have read it), "arrived/N" (machine N waits for the others);
and for each round of the rendezvous: "machines/N", "machines", "workers" (a port), "finished".
"""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, TCPStore

from ..compat import on_torch
from ..errors import SAME_SECONDS, STOP_SIGNALS, STOPPED, UserError, note, tell, warn
from .network import Job, own_address, wait_for_master

elastic = on_torch.elastic()
USER_ERROR = 2  # the exit code of a worker whose user has to change something
STORE_SECONDS = 60  # for an answer of the store
GRACE_SECONDS = 3  # in which what several processes find wrong at the same time is told by rank 0
LEAVING_SECONDS = 10  # in which machine 0 lets the others read why the run has ended
FINISHING_SECONDS = 300  # for which machine 0 waits for the others' workers to end after its own
LOST = (elastic.RendezvousConnectionError, DistError, ConnectionError, TimeoutError)  # what a vanished store raises


class Ended(Exception):
    """Another machine has ended the run, and has told why."""

    def __init__(self, code: int, line: str = ""):
        super().__init__(line)
        self.code, self.line = code, line


class Lost(Exception):
    """The store no longer answers, since machine 0 is gone. restarts: how many are left."""

    def __init__(self, restarts: int):
        super().__init__()
        self.restarts = restarts


# ---- the machines meet


class Rendezvous(elastic.DynamicRendezvousHandler):
    """torch's c10d rendezvous of a fixed number of machines, with ranks by NODE_RANK.

    Each round has a new store for its workers, on machine 0: what an earlier round has left in one would confuse them.
    """

    use_agent_store = True

    @classmethod
    def of(cls, job: Job) -> "Rendezvous":
        """Machine 0 opens the store, the others connect to it."""
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch's own store for the workers outlives its round
        wait, address = timedelta(seconds=STORE_SECONDS), own_address(job)
        host = "localhost" if job.nnodes == 1 else job.master_addr
        store = TCPStore(host, job.master_port, is_master=job.node_rank == 0, multi_tenant=True, timeout=wait)
        name = os.environ.get("SLURM_JOB_ID", "finetune")  # the same whenever a machine of this job comes back
        # machine 0 is the first to lose patience, so that it can tell the others
        limits = elastic.RendezvousTimeout(join=timedelta(seconds=job.master_timeout + 10 * (job.node_rank > 0)))
        count, backend = job.nnodes, elastic.C10dRendezvousBackend(store, name)
        self = cls.from_backend(name, store, backend, count, count, address, limits)
        self.job, self.root, self.host = job, store, host
        return self

    def next_rendezvous(self) -> elastic.RendezvousInfo:
        arrived, name = f"arrived/{self.job.node_rank}", socket.gethostname()
        self.root.set(arrived, name)
        try:
            info = super().next_rendezvous()
        except elastic.RendezvousTimeoutError:
            raise UserError(self.who_is_missing()) from None
        self.root.delete_key(arrived)
        self.check_ranks(info.store)
        place = elastic.RendezvousStoreInfo(self.host, self.workers_port(info.store))
        return elastic.RendezvousInfo(info.store, self.job.node_rank, info.world_size, place)

    def who_is_missing(self) -> str:
        count = self.job.nnodes
        missing = [str(rank) for rank in range(count) if not self.root.check([f"arrived/{rank}"])]
        what = f"{count - len(missing)} of {count} machines joined within {self.job.master_timeout} s"
        return f"{what}, missing NODE_RANK {', '.join(missing)} - start the same command there, or see why it ended"

    def check_ranks(self, store) -> None:
        """Every machine comes to the same conclusion, once all of this round have given their NODE_RANK."""
        count = self.job.nnodes
        store.add(f"machines/{self.job.node_rank}", 1)
        if store.add("machines", 1) == count:
            store.set("all", "")
        store.wait(["all"])
        for rank in range(count):
            if store.add(f"machines/{rank}", 0) > 1:
                raise UserError(f"NODE_RANK={rank} on more than one machine - give each its own, 0 to {count - 1}")

    def workers_port(self, store) -> int:
        """Of the store in which this round's workers find each other; machine 0 opens it."""
        if self.job.node_rank == 0:
            self.workers = TCPStore(self.host, 0, is_master=True, wait_for_workers=False)
            store.set("workers", str(self.workers.port))
        return int(store.get("workers"))

    # ---- the end of the run, on all machines

    def end(self, code: int, line: str = "") -> None:
        """Tells the other machines that the run is over, unless one of them was quicker: then raises Ended."""
        mine = json.dumps({"code": code, "line": line})
        if self.root.compare_set("ended", "", mine) != mine.encode():
            raise self.ended()
        self.shutdown()

    def ended(self) -> Ended | None:
        return Ended(**json.loads(self.root.get("ended"))) if self.root.check(["ended"]) else None

    def leave(self) -> None:
        """Machine 0 keeps the store, so it waits here until the others have left."""
        try:
            if self.job.node_rank > 0:
                self.root.add("left", 1)
                return
            deadline = time.monotonic() + LEAVING_SECONDS
            while self.root.add("left", 0) < self.job.nnodes - 1 and time.monotonic() < deadline:
                time.sleep(0.1)
        except LOST:
            pass  # machine 0 has gone already


# ---- the workers of one machine


class Agent(elastic.LocalElasticAgent):
    """Watches this machine's workers and looks after the other machines while it does."""

    def __init__(self, job: Job, rendezvous: Rendezvous, restarts: int, folder: str):
        program = Path(__file__).with_name("dies_with_parent.py")
        starter = ["-I", "-S", str(program), str(os.getpid()), sys.executable, "-u"]
        words = [word.replace("$", "$$") for word in [*starter, *job.command]]  # torch replaces $local_rank in them
        spec = elastic.WorkerSpec(
            role="worker", local_world_size=job.nproc_per_node, rdzv_handler=rendezvous, entrypoint=sys.executable,
            args=tuple(words), max_restarts=restarts,
        )  # fmt: skip
        super().__init__(spec, logs_specs=elastic.DefaultLogsSpecs(log_dir=folder))
        self.job, self.rendezvous = job, rendezvous
        self.finished_at = None  # time.monotonic() of the end of this round's workers
        self.died: list[int] = []  # local ranks that had failed before torch stopped the others
        self.looked_at = 0.0
        self.asked: signal.Signals | None = None  # to stop, by this signal
        self.asked_at = 0.0
        self.hears = False  # there are workers, which can be told of a signal

    @property
    def restarts(self) -> int:
        return self._remaining_restarts

    def _initialize_workers(self, group) -> None:
        self.finished_at = None
        self.hears = False
        super()._initialize_workers(group)
        for number in STOP_SIGNALS:  # torch's own handlers, set as the workers start, end the workers within 30 s
            signal.signal(number, self.hand_on)
        self.hears = True

    def hand_on(self, number: int, frame) -> None:
        """To the workers, which stop behind a step. Where there are none, or by a second Ctrl-C or SIGTERM, ends as torch does."""
        again = number in (signal.SIGINT, signal.SIGTERM) and time.monotonic() > self.asked_at + SAME_SECONDS
        if not self.hears or self.asked and again:
            raise elastic.SignalException(f"signal {number}", sigval=signal.Signals(number))
        if self.asked is None:
            self.asked, self.asked_at = signal.Signals(number), time.monotonic()
            for handler in self._pcontext.subprocess_handlers.values():
                handler.proc.send_signal(number)

    def _monitor_workers(self, group) -> elastic.RunResult:
        """As torch's, but for what the other machines are doing."""
        self.look_at_workers()
        result = super()._monitor_workers(group)
        code = self.to_blame(result)[1].exitcode if result.is_failed() else 0
        if code in (USER_ERROR, STOPPED):
            self._remaining_restarts = 0
        elif code and self.asked:  # not in training, so the workers had nothing to save
            raise elastic.SignalException("asked to stop", sigval=self.asked)
        if result.is_failed() and self.restarts:
            warn(f"{describe_failure(*self.to_blame(result))}; starting again, restarts left: {self.restarts - 1}")
        elif not result.is_failed() and self.others_ended():
            raise self.rendezvous.ended()
        if result.state == elastic.WorkerState.SUCCEEDED and not self.all_finished(group):
            # so that torch goes on to look for machines that come back
            return elastic.RunResult(state=elastic.WorkerState.HEALTHY)
        return result

    def look_at_workers(self) -> None:
        """Notes which workers failed, before torch stops the rest. Gives rank 0 time to print an error that all have."""
        processes = [handler.proc for handler in self._pcontext.subprocess_handlers.values()]
        codes = [process.poll() for process in processes]
        deadline = time.monotonic() + GRACE_SECONDS
        while USER_ERROR in codes and None in codes and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
        self.died = [rank for rank, code in enumerate(codes) if code]

    def to_blame(self, result: elastic.RunResult):
        """(rank, torch's ProcessFailure) of the cause: a user error or a stop that was asked for, else a signal, else the first failure.

        When one worker is killed, the others fail as well, since they lose their peer.
        """
        ranks = [self._worker_group.workers[local].global_rank for local in self.died]
        failures = [pair for pair in result.failures.items() if not ranks or pair[0] in ranks]
        return min(failures, key=lambda pair: (pair[1].exitcode not in (USER_ERROR, STOPPED), pair[1].exitcode > 0))

    def others_ended(self) -> bool:
        """Asked for once a second."""
        if self.job.nnodes == 1 or time.monotonic() < self.looked_at + 1:
            return False
        self.looked_at = time.monotonic()
        return self.rendezvous.root.check(["ended"])

    def hear_others_out(self) -> None:
        """Waits GRACE_SECONDS for another machine to report the cause: a failure there makes workers here fail, too."""
        deadline = time.monotonic() + GRACE_SECONDS
        while self.job.nnodes > 1 and time.monotonic() < deadline and not self.rendezvous.ended():
            time.sleep(0.1)

    def all_finished(self, group) -> bool:
        """Whether the workers of all machines have ended well; machine 0 waits for the others, but not for ever."""
        if self.finished_at is None:
            self.finished_at = time.monotonic()
            group.store.add("finished", 1)
        if self.job.node_rank == 0 and time.monotonic() > self.finished_at + FINISHING_SECONDS:
            return True
        return group.store.add("finished", 0) == group.group_world_size

    def _exit_barrier(self) -> None:
        """Does nothing: all_finished() has waited for the others."""


# ---- what has happened, in a line


def exit_code(failure) -> int:
    """The worker's exit code as a shell reports it: 128 + N after signal N."""
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def describe_failure(rank: int, failure) -> str:
    """One line on how a worker failed, with the message of torch's error file if there is one."""
    who = f"rank {rank} on {socket.gethostname()}"
    message = failure.error_file_data.get("message")
    if os.path.isfile(failure.error_file) and isinstance(message, str):
        return f"{who}: {' '.join(message.split())}"
    if failure.exitcode > 0:
        return f"{who} stopped with exit code {failure.exitcode}"
    number = -failure.exitcode
    memory = " - the machine may be out of memory (see dmesg)" if number == signal.SIGKILL else ""
    return f"{who} was killed by signal {number} ({failure.signal_name()}){memory}"


def tell_failure(agent: Agent, result: elastic.RunResult) -> int:
    """Ends the run on all machines and returns the exit code. Prints a line unless a worker has printed its error."""
    rank, failure = agent.to_blame(result)
    code, line = exit_code(failure), describe_failure(rank, failure)
    # a worker that wrote its error file has told its user, too
    told = any(os.path.isfile(failed.error_file) for failed in result.failures.values())
    if failure.exitcode > 0 and not (told and code == USER_ERROR):  # else it is certain that the cause is here
        agent.hear_others_out()
    agent.rendezvous.end(code, line)
    if not told and code != STOPPED:  # which rank 0 has said
        tell(line)
    return code


# ---- the run


def run(job: Job) -> int:
    """Runs the job and returns its exit code. Raises UserError where the machines do not meet in time."""
    if "LOGLEVEL" not in os.environ:  # torch's own switch for the agent's log
        logging.disable(logging.CRITICAL)
    restarts = job.max_restarts
    while True:
        try:
            with tempfile.TemporaryDirectory(prefix="finetune_") as folder:
                return attempt(job, restarts, folder)
        except Lost as lost:
            if job.node_rank > 0:
                what = f"the connection to machine 0 ({job.place}) is lost"
            else:
                what = "a machine has vanished while all were about to start"
            if not lost.restarts:
                tell(f"{what} - see there why it stopped; with --max_restarts N a run goes on when the machine is back")
                return 1
            restarts = lost.restarts - 1
            warn(f"{what}; starting again, restarts left: {restarts}")
            if job.node_rank > 0:
                wait_for_master(job, patient=True)


def attempt(job: Job, restarts: int, folder: str) -> int:
    """One rendezvous with its store: returns the exit code, or raises Lost, after which the machines may meet again."""
    try:
        rendezvous = Rendezvous.of(job)
    except LOST as error:
        why = " ".join(str(error).split())[:200]
        if "EADDRINUSE" in why:
            why = "another run here uses the port, or NODE_RANK=0 was started twice"
        raise UserError(f"{job.place}: {why} - give another MASTER_PORT, and each machine its own NODE_RANK") from None
    agent = Agent(job, rendezvous, restarts, folder)
    if job.nnodes > 1:
        note(f"machine {job.node_rank} of {job.nnodes}: waiting up to {job.master_timeout} s for the others")
    try:
        code = watch(agent)
    except Ended as ended:
        code = ended.code
        note(f"the run was ended on another machine: {ended.line}")
    except UserError:
        rendezvous.leave()
        raise
    except LOST:
        if agent.finished_at is None:
            raise Lost(agent.restarts) from None
        return 0  # machine 0 had no reason to wait any longer
    rendezvous.leave()
    return code


def watch(agent: Agent) -> int:
    """Runs the agent to its end, tells the other machines, and returns the exit code."""
    rendezvous = agent.rendezvous
    try:
        result = agent.run()
    except elastic.RendezvousClosedError:
        result = None
    except UserError as error:
        rendezvous.end(USER_ERROR, " ".join(error.findings))
        raise
    except (elastic.SignalException, SystemExit) as stopped:
        code = stopped.code if isinstance(stopped, SystemExit) else 128 + stopped.sigval
        if code == 128 + signal.SIGTERM and agent.restarts:
            sys.exit(code)  # this machine is wanted elsewhere for a while; the others wait for it
        rendezvous.end(code, f"machine {agent.job.node_rank} ({socket.gethostname()}) was stopped by a signal")
        return code
    if result is None:
        raise rendezvous.ended() or Ended(1, "it has left no reason")
    return tell_failure(agent, result) if result.is_failed() else 0
