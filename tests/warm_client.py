"""The program in front of a warm Python (warm.py), started with the words of a Python command line.

It lies in the server's folder. It asks the server for a fork that runs the command, passes signals on to it, and ends as it ends. Where the server is gone
or refuses, it becomes the real Python with the same words.
"""

import array
import json
import os
import signal
import socket
import sys

PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGALRM")
STANDARD = (0, 1, 2)


def main() -> None:
    folder, words = os.path.dirname(os.path.abspath(__file__)), sys.argv[1:]
    link = ask(folder, words) if can_be_warm(words) else None
    if link is None:
        os.execv(sys.executable, [sys.executable, *words])
    follow(link)


def can_be_warm(words: list[str]) -> bool:
    """A script, a module or a piece of code, with no flag but -u, and no open file but the standard ones."""
    if words[:1] == ["-u"]:
        words = words[1:]
    if not words or words[0] in ("-m", "-c") and len(words) < 2:
        return False
    if words[0] not in ("-m", "-c") and (words[0].startswith("-") or not os.path.isfile(words[0])):
        return False
    listing = os.open("/proc/self/fd", os.O_RDONLY)
    files = {int(name) for name in os.listdir(listing)} - {listing}
    os.close(listing)
    return {number for number in files if is_open(number)} - {*STANDARD} == set()


def is_open(number: int) -> bool:
    """Whether a program started from here has it."""
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


def ask(folder: str, words: list[str]):
    """The link to the server once the fork runs; None where there will be none."""
    request = {
        "words": words,
        "environment": dict(os.environ),
        "executable": os.path.join(folder, "python"),
        "ignored": [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN],
        "blocked": list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
        "cores": list(os.sched_getaffinity(0)),
        "umask": os.umask(0o22),
    }
    os.umask(request["umask"])
    message = json.dumps(request).encode()
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(os.path.join(folder, "socket"))
        place, network = os.open(".", os.O_RDONLY), os.open("/proc/self/ns/net", os.O_RDONLY)
        files = array.array("i", [*STANDARD, place, network])
        link.sendmsg([len(message).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        link.sendall(message)
        os.close(place)
        os.close(network)
        answer = link.recv(1)
    except OSError:
        answer = b""
    if answer == b"+":
        return link
    link.close()
    return None


def hand_on(link, number: int) -> None:
    """To a fork that has just ended there is nothing to hand on."""
    try:
        link.send(bytes([number]))
    except OSError:
        pass


def follow(link) -> None:
    """Hands signals on by the link, which the server reads; ends as the fork does."""
    for name in PASSED_ON:
        # one that is ignored here is handed on too: the program may listen to it all the same
        signal.signal(getattr(signal, name), lambda number, frame: hand_on(link, number))
    status = b""
    while len(status) < 4 and (more := link.recv(4 - len(status))):
        status += more
    if len(status) < 4:  # the server was killed, and with it all its forks
        status = int(signal.SIGKILL).to_bytes(4, "big")
    status = int.from_bytes(status, "big")
    if not os.WIFSIGNALED(status):
        os._exit(os.waitstatus_to_exitcode(status))
    import resource

    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


main()
