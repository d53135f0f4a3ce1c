"""The warm process (warm.py): imports what the programs import, and forks for each request. warm_server.py FOLDER

Nothing else is done here: no thread, no CUDA, none of the toolkit's own modules. It ends when its standard input does.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing.spawn  # noqa: F401 (imported early: what starts processes takes it)
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

from warm import READ_AT_IMPORT

IMPORTED = (
    "numpy", "torch", "torch.distributed.elastic.agent.server.local_elastic_agent", "torch.distributed.run",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous", "tiktoken", "safetensors.torch", "transformers", "accelerate",
    "pyarrow.parquet", "peft", "transformers.trainer", "transformers.models.auto", "bitsandbytes", "deepspeed", "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)  # fmt: skip
SET_BY_THE_PROGRAMS = ("TOKENIZERS_PARALLELISM", "TQDM_DELAY", "DS_ACCELERATOR", "OPENBLAS_NUM_THREADS")
HANDLED = ("PYTHONPATH",)
OWN = dict(os.environ)  # the imports add to it
PR_SET_PDEATHSIG = 1
CLONE_NEWNET = 0x40000000


# ---- the server


def prepare() -> None:
    """All imports, and proof that no thread has come of them."""
    sys.path.pop(0)  # the tests' folder
    del sys.modules["warm"]
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    tasks = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    assert len(tasks) == 1, f"threads: {tasks}"
    gc.collect()
    gc.freeze()


def write_program(folder: Path) -> None:
    """FOLDER/python is the client. Where the first line of a script cannot name this Python, sh starts it (and sets PWD)."""
    client, flags = Path(__file__).with_name("warm_client.py").read_text(encoding="utf-8"), "-ISE"
    program, direct = folder / "python", f"#!{sys.executable} {flags}\n"
    if len(direct) > 120 or " " in sys.executable:
        (folder / "client.py").write_text(client, encoding="utf-8")
        client, direct = f'exec {shlex.join([sys.executable, flags, str(folder / "client.py")])} "$@"\n', "#!/bin/sh\n"
    program.write_text(direct + client, encoding="utf-8")
    program.chmod(0o755)


def serve(folder: Path) -> dict:
    """Returns in the forks, each with its request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    links: dict[int, socket.socket] = {}  # of the forks that run, by process
    selector = selectors.DefaultSelector()
    for source in (0, wake, listener):
        selector.register(source, selectors.EVENT_READ)
    os.write(1, b"ready\n")
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                for pid in links:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj == wake:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
            elif key.fileobj is listener:
                link, _ = listener.accept()
                request = receive(link)
                if request is None or (pid := os.fork()):
                    answer(selector, links, link, request, request and pid)
                    continue
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                selector.close()
                for other in (*links.values(), listener, link):
                    other.close()
                os.close(wake)
                os.close(woken)
                return request
            elif key.data in links:
                pass_on(selector, links, key.data)
        reap(selector, links)


def receive(link) -> dict | None:
    """The request, with the files that came along; None if it cannot be granted."""
    link.settimeout(10)
    files: list[int] = []
    try:
        size, files, _, _ = socket.recv_fds(link, 8, 5, socket.MSG_CMSG_CLOEXEC)
        message = bytearray()
        while len(message) < int.from_bytes(size, "big") and (more := link.recv(1 << 16)):
            message += more
        request = json.loads(message) | {"files": files}
        if len(files) == 5 and same_settings(request["environment"]):
            return request
    except (OSError, ValueError):
        pass
    for number in files:
        os.close(number)
    return None


def same_settings(wanted: dict[str, str]) -> bool:
    """Whether the imports have read what the program is to read."""
    names = {name for name in (*wanted, *OWN) if name.startswith(READ_AT_IMPORT) and name not in HANDLED}
    names |= {name for name in SET_BY_THE_PROGRAMS if name in wanted}
    others = [name for name in sorted(names) if wanted.get(name) != OWN.get(name)]
    if others:
        print("refused, for other values of", *others, file=sys.stderr)  # to FOLDER/log
    return not others


def answer(selector, links: dict, link, request: dict | None, pid: int | None) -> None:
    """Tells the client, and goes on listening to it."""
    for number in request["files"] if request else ():
        os.close(number)
    with contextlib.suppress(OSError):
        link.sendall(b"+" if request else b"-")
    if not request:
        link.close()
        return
    links[pid] = link
    selector.register(link, selectors.EVENT_READ, pid)


def pass_on(selector, links: dict, pid: int) -> None:
    """The client's signals to its fork. A client that is gone was killed, and so is its fork."""
    try:
        numbers = links[pid].recv(64)
    except OSError:
        numbers = b""
    for number in numbers or [signal.SIGKILL]:
        os.kill(pid, number)
    if not numbers:
        selector.unregister(links[pid])


def reap(selector, links: dict) -> None:
    """Tells the clients of the forks that have ended how they did."""
    while links:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        link = links.pop(pid)
        with contextlib.suppress(KeyError):
            selector.unregister(link)
        with contextlib.suppress(OSError):
            link.sendall(status.to_bytes(4, "big"))
        link.close()


# ---- a fork


def become(request: dict):
    """Makes this process what the program would find itself in; -> a function that runs it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed server leaves nothing behind
    os.setpgid(0, 0)
    atexit.unregister(shutil.rmtree)  # a temporary folder of the imports' (matplotlib's, without a HOME to write to) is the server's
    *standard, place, network = request["files"]
    for number, file in enumerate(standard):
        os.dup2(file, number)
    os.fchdir(place)
    enter(network)
    for file in request["files"]:
        os.close(file)
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    for number in request["ignored"]:
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    settle(request["environment"])

    words = request["words"]
    unbuffered = words[0] == "-u"
    sys.stdout.reconfigure(line_buffering=unbuffered or os.isatty(1))
    sys.executable, sys.orig_argv = request["executable"], [request["executable"], *words]
    sys.modules["__main__"] = types.ModuleType("__main__")
    return program(words[unbuffered:])


def enter(network: int) -> None:
    """`ip netns exec` starts programs in another network."""
    own = os.stat("/proc/self/ns/net")
    if os.fstat(network).st_ino != own.st_ino and ctypes.CDLL(None, use_errno=True).setns(network, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "the client's network cannot be entered")


def settle(environment: dict[str, str]) -> None:
    """What the imports have done by another value of a variable, or once for all processes."""
    import numpy
    import torch

    count = environment.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(count) if count.isdecimal() else len(os.sched_getaffinity(0)))
    numpy.random.seed()


def program(words: list[str]):
    """As Python's own command line does it."""
    folders = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if words[0] == "-m":
        sys.argv, sys.path[:0] = ["-m", *words[2:]], [os.getcwd(), *folders]
        return lambda: runpy._run_module_as_main(words[1])
    names = sys.modules["__main__"].__dict__
    names["__builtins__"] = __builtins__
    if words[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], ["", *folders]
        return lambda: exec(compile(words[1], "<string>", "exec", dont_inherit=True), names)
    sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.realpath(words[0])), *folders]
    path = os.path.abspath(words[0])
    names |= {"__file__": path, "__cached__": None}
    source = Path(path).read_bytes()
    return lambda: exec(compile(source, path, "exec", dont_inherit=True), names)


def run_to_the_end(run) -> None:
    """As the interpreter ends a program, but for taking all modules apart, which in a fork means copying them first."""
    code, interrupted = 0, False
    try:
        run()
    except SystemExit as stop:
        code = stop.code
        if code is None or isinstance(code, int):
            code = (code or 0) & 0xFF
        else:
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # a traceback begins with the program
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


if __name__ == "__main__":
    prepare()
    write_program(Path(sys.argv[1]))
    run_to_the_end(become(serve(Path(sys.argv[1]))))
