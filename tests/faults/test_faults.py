"""A run that is killed, stopped or finds the disk full at any of its file operations, and is started again, ends as one that ran through.

faulty.py counts the operations in the output folder and lets one of them fail. In float32 on the CPU: bit by bit the same weights.
FAULTS=all draws 60 points in one process, 30 over two, and fills the disk at every other operation; without it, a part of them.
"""

import functools
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import warm
from safetensors.torch import load_file
from tiny import tiny_later_qwen

from finetune.errors import STOPPED
from finetune.writing import durable

ROOT = Path(__file__).parent.parent.parent
FAULTY, TORCHRUN = Path(__file__).with_name("faulty.py"), ROOT / "finetune" / "distributed" / "torchrun.py"
METHODS = {"LoRA": ["--use_lora", "--lora_r", "4", "--lora_dropout", "0.1"], "full": []}
ENGINES = {
    "one": [],
    "DDP": [],
    "ZeRO-2": ["--deepspeed", str(ROOT / "finetune" / "ds_config_zero2.json")],
    "FSDP2": ["--fsdp", "True"],
}
TOLERANCES = {"DDP": 0, "ZeRO-2": 1e-6, "FSDP2": 0}  # of a weight, over two processes
ALL = os.environ.get("FAULTS") == "all"
KINDS = ("SIGKILL", "SIGKILL", "SIGTERM", "ENOSPC")  # what it is killed by most


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    tiny_later_qwen(folder / "base")
    talks = [[{"from": "user", "value": f"a {i}"}, {"from": "assistant", "value": f"{2 * i}. " * (i % 4 + 1)}] for i in range(12)]
    (folder / "talks.json").write_text(json.dumps([{"conversations": turns} for turns in talks]))
    return folder


class Runs:
    """Starts runs in a folder of their own, and keeps what one that was never stopped made."""

    def __init__(self, place: Path):
        self.place = place

    def start(self, method: str, engine: str, out: Path, *more: str, kind: str = "SIGKILL", number: int = 0, rank: int = 0):
        """Six steps, a checkpoint after every other, two of them kept; the exit code and what was printed."""
        ranks = 1 if engine == "one" else 2
        words = ["-m", self.place / "base", "-d", self.place / "talks.json", "-o", out, "--num_train_epochs", "3", "--save_steps", "2"]
        words += ["--per_device_train_batch_size", 6 // ranks, "--learning_rate", "1e-2", "--save_total_limit", "2", "--use_cpu", "True"]
        words += ["--model_max_length", "256", "--logging_steps", "1", *METHODS[method], *ENGINES[engine], *more]
        launcher = [] if ranks == 1 else [TORCHRUN, "--nproc_per_node", ranks]
        command = [warm.python(), *launcher, FAULTY, kind, number, out, ROOT / "finetune.py", *words]
        own = {"FINETUNE_CACHE": str(self.place / "cache"), "OMP_NUM_THREADS": "1", "FAULT_RANK": str(rank)}
        own |= {"FAULT_COUNT": str(out) + ".count"} if number == 0 and ranks == 1 else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 300}
        done = subprocess.run([str(word) for word in command], env=os.environ | own, **pipes)
        return done.returncode, done.stdout

    @functools.cache
    def whole(self, method: str, engine: str) -> tuple[dict, int]:
        """(weights, number of operations) of a run that nothing happened to."""
        out = self.place / f"whole {method} {engine}"
        code, printed = self.start(method, engine, out)
        assert code == 0, printed
        count = Path(f"{out}.count")
        return weights(out), int(count.read_text()) if count.exists() else 120

    def check(self, method: str, engine: str, kind: str, number: int, tolerance: float = 0, rank: int = 0) -> None:
        """Something happens at an operation; the same command again, and the end is the same."""
        expected, _ = self.whole(method, engine)
        out = self.place / f"{method} {engine} {kind} {number} {rank}"
        code, printed = self.start(method, engine, out, kind=kind, number=number, rank=rank)
        what = f"{method}, {engine}, {kind} at operation {number} of rank {rank}: exit code {code}\n{printed}"
        assert "Traceback" not in printed or engine != "one", what
        if kind == "ENOSPC" and code:
            assert code == 1 and printed.count("error: ") == 1 and not list(out.glob(".unfinished*")), what
        first = code
        if not finished(out):
            code, printed = self.start(method, engine, out, "--resume_from_checkpoint", "auto")
            assert code == 0, f"{what}\nagain:\n{printed}"
        found = weights(out)
        assert found.keys() == expected.keys()
        assert max((found[name] - expected[name]).abs().max().item() for name in found) <= tolerance, what
        assert not list(out.glob(".unfinished*")) or code != 0, what
        steps = sorted(path.name for path in out.glob("checkpoint-*"))
        # who is asked to stop saves there as well
        assert steps == ["checkpoint-4", "checkpoint-6"] or first == STOPPED and len(steps) == 2 and steps[1] == "checkpoint-6", what


def weights(out: Path) -> dict:
    name = "adapter_model.safetensors" if (out / "adapter_config.json").is_file() else "model.safetensors"
    return load_file(out / name)


def finished(out: Path) -> bool:
    """Stopped behind its last file: then there is nothing left to do."""
    return any((out / name).is_file() for name in ("config.json", "adapter_config.json"))


@pytest.fixture(scope="module")
def runs(place):
    return Runs(place)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind,share", [("SIGKILL", 0.37), ("ENOSPC", 0.71)])
def test_a_handful_of_points(runs, method, kind, share):
    _, operations = runs.whole(method, "one")
    runs.check(method, "one", kind, int(operations * share))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60 if ALL else 6))
def test_anywhere_in_one_process(runs, seed):
    draw = random.Random(seed)
    method = draw.choice(sorted(METHODS))
    _, operations = runs.whole(method, "one")
    runs.check(method, "one", draw.choice(KINDS), draw.randint(1, operations))


@pytest.mark.slow
def test_the_disk_is_full_at_any_operation(runs):
    """One line each time, whoever was writing: Python, safetensors or torch; and no half checkpoint."""
    _, operations = runs.whole("LoRA", "one")
    numbers, in_saves = range(1, operations // 2, 2 if ALL else 12), 0
    for number in numbers:
        out = runs.place / f"full at {number}"
        code, printed = runs.start("LoRA", "one", out, kind="ENOSPC", number=number)
        assert code == 1 and printed.count("error: ") == 1 and "Traceback" not in printed, (number, printed)
        assert not list(out.glob(".unfinished*")), number
        assert all(not durable.verify(path) for path in out.glob("checkpoint-*")), number
        in_saves += "no room for checkpoint-" in printed
    assert in_saves > len(numbers) // 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30 if ALL else 6))
def test_anywhere_in_two_processes(runs, seed):
    """A rank that is killed takes the other with it; where the first rank's number is beyond its operations, nothing happens."""
    draw = random.Random(seed)
    engine, method, rank = list(TOLERANCES)[seed % 3], draw.choice(sorted(METHODS)), int(draw.random() < 0.3)
    number = draw.randint(1, 120) if rank == 0 else draw.randint(1, 8)
    runs.check(method, engine, "SIGKILL", number, TOLERANCES[engine], rank)
