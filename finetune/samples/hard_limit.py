"""An end that one long operation in C cannot put off: the kernel's timers, which start a thread without asking Python.

Python looks at signals, and at other threads, between its own steps. 10 ** (10 ** 9), or a regular expression that tries everything,
is one step. So two timers are set in the C library, whose threads run no Python: one says the line, the other ends the process.
"""

import contextlib
import ctypes
import json
import os
import shlex
import sys

SIGEV_THREAD, CLOCK_MONOTONIC = 2, 1
EXIT_CODE = 2  # as for every file of a user's that has to change
GRACE = 1.0  # seconds in which the line is said


class Event(ctypes.Structure):
    """struct sigevent of a 64-bit Linux: function(value) is called in a thread of its own."""

    _fields_ = [
        ("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("rest", ctypes.c_char * 32),
    ]  # fmt: skip


class Times(ctypes.Structure):
    """struct itimerspec: the interval, which stays 0, and the time until the timer goes off."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "seconds", "nanoseconds")]


def is_known() -> bool:
    """Whether the structures above are this machine's."""
    return sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8 and hasattr(ctypes.CDLL(None), "timer_create")


@contextlib.contextmanager
def hard_limit(seconds: float, line: str):
    """A context in which the process ends with exit code 2, behind "error: LINE", should it take longer than `seconds`.

    In any thread, and whatever runs: nothing is cleaned up. Elsewhere than on a 64-bit Linux, or where no timer is left, there is no limit.
    """
    if not is_known():
        yield
        return
    library = ctypes.CDLL(None)
    said = ctypes.create_string_buffer(command(line))  # kept alive until the timers are gone
    timers = []
    try:
        with contextlib.suppress(OSError):
            timers.append(start(library, library.system, ctypes.addressof(said), seconds))
            timers.append(start(library, library._exit, EXIT_CODE, seconds + GRACE))
        yield
    finally:
        for timer in timers:
            library.timer_delete(timer)


def start(library, function, value: int, seconds: float) -> ctypes.c_void_p:
    """A timer that calls a function of the C library with a value, once. OSError where there can be none."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    event, timer = Event(value=value, notify=SIGEV_THREAD, function=address), ctypes.c_void_p()
    times = Times(seconds=int(seconds), nanoseconds=int(seconds % 1 * 1e9))
    if library.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError("timer_create() failed")
    library.timer_settime(timer, 0, ctypes.byref(times), None)
    return timer


def command(line: str) -> bytes:
    """What a shell is told, to say the line as errors.tell() does: to people, and to torchrun's agent."""
    text = " ".join(line.replace("\0", " ").split())
    words = f"printf '%s\\n' {shlex.quote(f'error: {text}')} >&2"
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        words += f"; printf '%s' {shlex.quote(json.dumps({'message': text}))} >{shlex.quote(path)}"
    return os.fsencode(words)
