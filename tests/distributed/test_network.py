"""finetune/distributed/network.py: what is checked of addresses and ports before torch is imported."""

import errno
import socket
import threading
import time

import pytest
from networks import free_port

from finetune.distributed import network
from finetune.errors import UserError


def on_machine_1(address: str, port=6001, **settings) -> network.Job:
    return network.Job(["x.py"], nnodes=2, node_rank=1, master_addr=address, master_port=port, **settings)


@pytest.mark.parametrize("address, line", [
    ("no-such-host.invalid", r"MASTER_ADDR=no-such-host.invalid: no such machine \(.*\) - give the name or address"),
    ("255.255.255.255", r"machine 0 cannot be reached at 255.255.255.255:6001 \(.*\) - check MASTER_ADDR, and that"),
])  # fmt: skip
def test_an_address_that_cannot_be(address, line):
    with pytest.raises(UserError, match=line):
        network.check_network(on_machine_1(address))


def test_an_address_that_does_not_answer(monkeypatch):
    """As behind a firewall that drops what it does not let in."""

    def silent(place, timeout):
        assert timeout <= 10
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(UserError, match=r"cannot be reached at 127.0.0.1:6001 \(no answer\)"):
        network.check_network(on_machine_1("127.0.0.1"))


def test_a_machine_0_that_was_there_is_waited_for(monkeypatch, capsys):
    """While it starts up again its name may be unknown, no route lead there, or nobody answer."""
    refusals = [
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        TimeoutError("timed out"),
        ConnectionRefusedError(),
    ]
    left = list(refusals)

    def starting_up(place, timeout):
        if left:
            raise left.pop(0)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", starting_up)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    job = on_machine_1("no-such-host.invalid", master_timeout=60)
    network.wait_for_master(job, patient=True)
    assert left == [] and capsys.readouterr().err.count("waiting up to 60 s") == 1
    for error, why in zip(refusals[1:], (" (No route to host)", " (no answer)", "")):
        left[:] = [error] * 2
        with pytest.raises(UserError) as raised:
            network.wait_for_master(on_machine_1("a", master_timeout=-1), patient=True)
        assert f"nothing listens at a:6001 after -1 s{why} - start the run" in str(raised.value)


def test_machine_0_has_not_started(capsys):
    port = free_port()
    with pytest.raises(
        UserError, match=f"nothing listens at 127.0.0.1:{port} after 0 s - start the run with NODE_RANK=0"
    ):
        network.check_network(on_machine_1("127.0.0.1", port, master_timeout=0))
    with pytest.raises(UserError, match="after 1 s"):
        network.check_network(on_machine_1("127.0.0.1", port, master_timeout=1))
    told = capsys.readouterr().err
    assert told == (
        f"note: waiting up to 1 s for machine 0 to listen at 127.0.0.1:{port}: "
        "start the same command there, with NODE_RANK=0\n"
    )


def test_machine_0_starts_later():
    port = free_port()
    def start():
        time.sleep(0.5)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()

    thread = threading.Thread(target=start)
    thread.start()
    network.check_network(on_machine_1("127.0.0.1", port, master_timeout=30))
    thread.join()


def test_an_address_of_another_machine_is_warned_of(capsys):
    job = network.Job(["x.py"], nnodes=2, master_addr="198.51.100.7", master_port=free_port())
    network.check_network(job)
    assert capsys.readouterr().err.startswith("warning: MASTER_ADDR=198.51.100.7 is no address of this machine")


def test_a_port_that_a_killed_run_still_holds():
    """It is free again within half a second or so; a machine that comes back at once must not be refused."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        job = network.Job(["x.py"], master_port=listener.getsockname()[1])
        threading.Timer(0.3, listener.close).start()
        begin = time.monotonic()
        network.check_network(job)
    assert 0.25 < time.monotonic() - begin < 2
