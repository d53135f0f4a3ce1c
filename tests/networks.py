"""Two machines to try things on: network namespaces with a cable between them, or this machine's own address twice."""

import contextlib
import os
import socket
import subprocess
from typing import NamedTuple


class Machine(NamedTuple):
    """prefix: words before a command that runs there. address: as the other machine sees it."""

    prefix: list[str]
    address: str


@contextlib.contextmanager
def two_machines():
    """[machine 0, machine 1]. In namespaces machine 0 has the address that sorts last: ranks must not follow addresses."""
    names = [f"finetune{os.getpid()}{end}" for end in "ab"]
    machines = [Machine(["ip", "netns", "exec", name], f"10.77.0.{i}") for name, i in zip(names, (2, 1))]
    try:
        yield machines if lay_cable(names, machines) else [Machine([], own_address())] * 2
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def lay_cable(names: list[str], machines: list[Machine]) -> bool:
    """Makes the namespaces; False where this user or this system may not."""
    cables = [f"ft{os.getpid()}{end}" for end in "ab"]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add {cables[0]} type veth peer name {cables[1]}"]
    for name, cable, machine in zip(names, cables, machines):
        commands += [f"link set {cable} netns {name}", f"-n {name} addr add {machine.address}/24 dev {cable}"]
        commands += [f"-n {name} link set {cable} up", f"-n {name} link set lo up"]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def own_address() -> str:
    """An address of this machine that is not called localhost."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the system only chooses the interface
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
