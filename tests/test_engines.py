"""Every method on every engine, through the scripts: the same losses, the same weights, and the same again after a stop.

Real launches on the CPU: one process, DDP, ZeRO-2, ZeRO-3 and FSDP2 with two, and two agents of one process each (two
machines). In float32 without dropout, so that what differs is a fault. A run saves checkpoint-3 on its way through six
steps; a second one goes on from there.
"""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import small_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SAMPLES, STEPS = 12, 6  # of a step; of a run

METHODS = {
    "full": ["--use_lora", "False"],
    "LoRA": ["--train_embeddings", "none"],
    "LoRA + chat rows": ["--train_embeddings", "chat_rows", "--train_tokens", "<|extra_0|>"],
    "LoRA + embeddings": ["--train_embeddings", "all"],
}
ENGINES = {
    "one process": ["--deepspeed", "none"],
    "DDP": ["--deepspeed", "none"],
    "ZeRO-2": ["--deepspeed", "ds_config_zero2.json"],
    "ZeRO-3": ["--deepspeed", "ds_config_zero3.json"],
    "FSDP2": ["--deepspeed", "none", "--fsdp", "True"],
    "two machines": ["--deepspeed", "none"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, conversations, and the cache of all runs."""
    folder = tmp_path_factory.mktemp("engines")
    small_checkpoint(folder / "base")
    talks = [
        [
            {"from": "user", "value": f"What is {i} plus {i}?"},
            {"from": "assistant", "value": f"It is {2 * i}. " * (i % 4 + 1)},
        ]
        for i in range(2 * SAMPLES)
    ]
    (folder / "talks.json").write_text(json.dumps([{"conversations": turns} for turns in talks]))
    return folder


def flags(ranks: int) -> list[str]:
    """Six steps of the same twelve samples, in several passes, whatever the number of ranks."""
    return [
        "--bf16", "False", "--per_device_train_batch_size", str(SAMPLES // 2 // ranks), "--gradient_accumulation_steps", "2",
        "--num_train_epochs", "3", "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine", "--warmup_ratio", "0.2",
        "--max_tokens_per_pass", "150", "--lora_dropout", "0", "--save_steps", "3", "--gradient_checkpointing", "False",
    ]  # fmt: skip


class Launches:
    """Starts scripts as a user does, and waits for them."""

    def __init__(self, place: Path):
        self.place = place

    def environment(self, **more) -> dict:
        own = {"FINETUNE_PYTHON": sys.executable, "FINETUNE_CACHE": str(self.place / "cache"), "OMP_NUM_THREADS": "1"}
        return os.environ | own | {key: str(value) for key, value in more.items()}

    def start(self, script: str, out: Path, *more: str, model: Path | None = None, prefix=(), **environment):
        command = [*prefix, "bash", str(ROOT / "finetune" / script), "-m", str(model or self.place / "base")]
        command += ["-d", str(self.place / "talks.json"), "-o", str(out), *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(command, env=self.environment(**environment), cwd=self.place, **pipes)

    def finish(self, *processes) -> str:
        """What they printed, once all have ended well."""
        printed = [process.communicate(timeout=300)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes), "\n".join(printed)
        return "\n".join(printed)

    def run(self, engine: str, out: Path, *more: str, scripts=("finetune_lora_ds.sh",), **settings) -> str:
        """One run on an engine; more: flags of the method."""
        ranks = 1 if engine == "one process" else 2
        arguments = [*flags(ranks), *ENGINES[engine], *more]
        if engine != "two machines":
            return self.finish(self.start(scripts[0], out, *arguments, GPUS_PER_NODE=ranks, **settings))
        here = {"NNODES": 2, "GPUS_PER_NODE": 1, "MASTER_ADDR": own_address(), "MASTER_PORT": free_port()}
        agents = [self.start(scripts[0], out, *arguments, NODE_RANK=node, **here, **settings) for node in (0, 1)]
        return self.finish(*agents)


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


def log(folder: Path) -> dict[int, dict]:
    """The logged line of each step."""
    lines = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def weights(folder: Path) -> dict:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    return load_file(folder / name)


def furthest(one: dict, other: dict) -> float:
    """The largest difference of a weight."""
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def cell(place):
    """cell(method, engine) -> the output folder of its run; each is run once."""
    launches = Launches(place)

    @functools.cache
    def run(method: str, engine: str) -> Path:
        out = place / f"{method} on {engine}"
        printed = launches.run(engine, out, *METHODS[method])
        shown = {"two machines": "DDP, 2 ranks on 2 machines", "one process": "one process"}.get(engine, engine)
        assert f"engine     {shown}" in printed, printed
        return out

    return run


@pytest.mark.parametrize("engine", list(ENGINES)[1:])
@pytest.mark.parametrize("method", METHODS)
def test_same_losses_and_same_weights(cell, method, engine):
    expected, found = cell(method, "one process"), cell(method, engine)
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 1e-9)):
        straight, here = ([line[name] for line in log(folder).values()] for folder in (expected, found))
        assert len(straight) == STEPS and here == pytest.approx(straight, rel=tolerance), name
    assert furthest(weights(expected), weights(found)) < 1e-5


def test_the_learning_rate_is_the_asked_curve(cell):
    """Warm-up over ceil(0.2 * 6) = 2 steps, then a cosine over the other 4."""
    from math import cos, pi

    curve = [0, 0.5, *(0.5 * (1 + cos(pi * k / 4)) for k in range(4))]
    for engine in ENGINES:
        rates = [line["learning_rate"] for line in log(cell("LoRA", engine)).values()]
        assert rates == pytest.approx([1e-2 * factor for factor in curve], abs=1e-9), engine


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_gone_on_is_the_same(cell, place, method, engine):
    whole = cell(method, engine)
    out = place / f"{method} on {engine}, resumed"
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    printed = Launches(place).run(engine, out, *METHODS[method], "--resume_from_checkpoint", "auto")
    assert "continuing from" in printed and sorted(log(out)) == [4, 5, 6]
    difference = furthest(weights(whole), weights(out))
    assert difference == 0 if engine == "one process" else difference < 1e-6
