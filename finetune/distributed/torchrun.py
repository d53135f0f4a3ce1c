"""Starts the training processes of this machine, and joins them with those of the other machines. launch.sh calls it:

    python finetune/distributed/torchrun.py --nproc_per_node 8 SCRIPT [its arguments]
    ... --nproc_per_node 8 --nnodes 2 --node_rank 0 --master_addr ADDRESS --master_port 6001 SCRIPT [its arguments]

torch's own elastic agent (what torchrun runs) does the work, in agent.py; network.py checks, before torch is imported,
whether the machines can find each other. The exit code is that of the worker that failed.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder: its module names are everyday words
from finetune.distributed import network  # noqa: E402
from finetune.distributed.network import Job  # noqa: E402
from finetune.errors import run  # noqa: E402


def parse(argv: list[str]) -> Job:
    """Flags come in pairs; the first word that is none is the script, and all behind it is the script's."""
    end = next((i for i in range(0, len(argv), 2) if not argv[i].startswith("--")), len(argv))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind in Job.__annotations__.items():
        if name != "command":
            parser.add_argument(f"--{name}", type=kind, default=getattr(Job, name))
    values = vars(parser.parse_args(argv[:end]))
    if not argv[end:]:
        parser.error("no script to run")
    return Job(argv[end:], **values)


def set_worker_environment(job: Job) -> None:
    """What the workers inherit. What the user has set stays."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # some clusters set them, for one process a machine
        os.environ.pop(name, None)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // job.nproc_per_node)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # sockets warn of every name that DNS does not know
    if job.nnodes > 1 and (interface := network.interface_of(network.own_address(job))):
        # gloo would take the address of the host's name, which on many systems is 127.0.1.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def stop(number: int, frame) -> None:
    """Until the workers run; then the agent's own handlers pass the signal on to them."""
    sys.exit(128 + number)


def main() -> None:
    job = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    os.environ.pop("RANK", None)  # this process speaks, whatever rank a cluster has given it
    network.check_network(job)
    set_worker_environment(job)
    from finetune.distributed import agent

    sys.exit(agent.run(job))


if __name__ == "__main__":
    run(main)
