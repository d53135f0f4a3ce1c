"""How the machines of a run find each other: its addresses and ports, and what can be wrong with them.

Imports no torch: a wrong address or a busy port is told within seconds.
"""

import errno
import fcntl
import os
import socket
import struct
import time
from dataclasses import dataclass

from ..errors import UserError, note, warn

CONNECT_SECONDS = 5  # an address that is there answers within this, be it by refusing
LETTING_GO_SECONDS = 2  # a run that was killed holds its port until the system has taken its memory back


@dataclass
class Job:
    """What launch.sh has checked: 0 <= node_rank < nnodes; master_addr is not localhost where nnodes > 1.

    master_port: 0 (a free one) only where nnodes is 1. master_timeout: seconds to wait for another machine.
    """

    command: list[str]
    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "localhost"
    master_port: int = 0
    max_restarts: int = 0
    master_timeout: int = 600

    @property
    def place(self) -> str:
        return f"{self.master_addr}:{self.master_port}"


def check_network(job: Job) -> None:
    """Raises UserError where the machines cannot come together; waits for machine 0 where it has not started yet."""
    if job.node_rank == 0:
        if job.master_port:
            check_port(job)
        if job.nnodes > 1:
            check_own_address(job)
    else:
        wait_for_master(job)


def check_port(job: Job) -> None:
    """Machine 0 listens at the port: it must be free, or become so within LETTING_GO_SECONDS."""
    deadline = time.monotonic() + LETTING_GO_SECONDS
    while (error := error_of_listening(job.master_port)) == errno.EADDRINUSE and time.monotonic() < deadline:
        time.sleep(0.1)
    if error == errno.EADDRINUSE:
        same = ", the same on all machines" if job.nnodes > 1 else ", or leave it out"
        raise UserError(f"port {job.master_port} is in use on this machine - set MASTER_PORT to a free one{same}")
    if error:
        what = f"port {job.master_port} cannot be used ({os.strerror(error)})"
        raise UserError(f"{what} - set MASTER_PORT to another one, for example 6001")


def error_of_listening(port: int) -> int:
    """The number of the system's error; 0 where one can listen at the port."""
    with socket.socket() as listener:
        # as torch does: connections of a run that has ended are no hindrance
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            return error.errno
    return 0


def check_own_address(job: Job) -> None:
    """Warns where MASTER_ADDR is no address of this machine. Not an error: a network may translate addresses."""
    family, address = resolve(job)
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            warn(
                f"MASTER_ADDR={job.master_addr} is no address of this machine, though NODE_RANK=0 - give that of this one"
            )


def wait_for_master(job: Job, patient: bool = False) -> None:
    """Waits until machine 0 listens. UserError at once if it cannot be reached, and at the time-out.

    patient: it was there before, and may be starting up again: until the time-out, no answer at all is no reason to end.
    """
    if not patient:
        resolve(job)
    deadline, told = time.monotonic() + job.master_timeout, False
    while True:
        try:
            socket.create_connection((job.master_addr, job.master_port), timeout=CONNECT_SECONDS).close()
            return
        except ConnectionRefusedError:
            why = ""  # the machine is there, the run is not
        except OSError as error:
            why = f" ({'no answer' if isinstance(error, TimeoutError) else error.strerror or error})"
            if not patient:
                what = f"machine 0 cannot be reached at {job.place}{why}"
                remedy = f"check MASTER_ADDR, and that no firewall shuts port {job.master_port} there"
                raise UserError(f"{what} - {remedy}") from None
        if time.monotonic() > deadline:
            what = f"nothing listens at {job.place} after {job.master_timeout} s{why}"
            raise UserError(f"{what} - start the run with NODE_RANK=0 there; MASTER_TIMEOUT gives it more seconds")
        if not told:
            how = "start the same command there, with NODE_RANK=0"
            note(f"waiting up to {job.master_timeout} s for machine 0 to listen at {job.place}: {how}")
            told = True
        time.sleep(1)


def resolve(job: Job) -> tuple[socket.AddressFamily, str]:
    """(family, address) of MASTER_ADDR; UserError where the name is unknown."""
    try:
        family, _, _, _, address = socket.getaddrinfo(job.master_addr, job.master_port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        what = f"MASTER_ADDR={job.master_addr}: no such machine ({error.strerror})"
        raise UserError(f"{what} - give the name or address of the machine with NODE_RANK=0") from None
    return family, address[0]


def own_address(job: Job) -> str:
    """The address by which the other machines reach this one."""
    if job.nnodes == 1:
        return "localhost"
    family, address = resolve(job)
    if job.node_rank == 0:
        return address
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting sends nothing: it asks the routing table
        probe.connect((address, job.master_port))
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None if there is none."""
    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
