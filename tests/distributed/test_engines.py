"""Every method on every engine, through the scripts: the same losses, the same weights, and the same again after a stop.

Real launches on the CPU: one process, DDP, ZeRO-2, ZeRO-3 and FSDP2 with two, and two agents of one process each (two
machines). In float32 without dropout, so that what differs is a fault. A run saves checkpoint-3 on its way through six
steps; a second one goes on from there.
"""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm
from networks import free_port, two_machines
from safetensors.torch import load_file
from tiny import small_checkpoint, tiny_gptq, wide_checkpoint

from finetune.errors import STOPPED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
SAMPLES, STEPS = 12, 6  # of a step; of a run

METHODS = {
    "full": ["--use_lora", "False"],
    "LoRA": ["--lora_dropout", "0", "--train_embeddings", "none"],
    "LoRA + chat rows": ["--lora_dropout", "0", "--train_embeddings", "chat_rows", "--train_tokens", "<|extra_0|>"],
    "LoRA + embeddings": ["--lora_dropout", "0", "--train_embeddings", "all"],
    "LoRA+, rsLoRA": ["--lora_dropout", "0", "--train_embeddings", "none", "--loraplus_lr_ratio", "4", "--use_rslora"],
    "Q-LoRA GPTQ Int4": ["--lora_dropout", "0", "--train_embeddings", "none", "--q_lora"],
    "Q-LoRA NF4": ["--lora_dropout", "0", "--train_embeddings", "none", "--q_lora", "--quant", "nf4"],
}
BASES = {"Q-LoRA GPTQ Int4": "Int4", "Q-LoRA NF4": "wide"}  # the other methods' is called base
ENGINES = {
    "one process": ["--deepspeed", "none"],
    "DDP": ["--deepspeed", "none"],
    "ZeRO-2": ["--deepspeed", "ds_config_zero2.json"],
    "ZeRO-3": ["--deepspeed", "ds_config_zero3.json"],
    "FSDP2": ["--deepspeed", "none", "--fsdp", "True"],
    "two machines": ["--deepspeed", "none"],
}


FEWER = {  # where the other cells say as much, a launch each is spared
    "LoRA+, rsLoRA": ("one process", "ZeRO-3", "FSDP2"),
    "Q-LoRA GPTQ Int4": ("one process", "DDP", "ZeRO-2"),
    "Q-LoRA NF4": ("one process", "DDP", "ZeRO-2"),
}
CELLS = [(method, engine) for method in METHODS for engine in FEWER.get(method, ENGINES)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with base models, conversations, and the cache of all runs."""
    folder = tmp_path_factory.mktemp("engines")
    small_checkpoint(folder / "base")
    tiny_gptq(folder / "Int4", 4)
    wide_checkpoint(folder / "wide")
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
        "--max_tokens_per_pass", "150", "--save_steps", "3", "--gradient_checkpointing", "False",
    ]  # fmt: skip


class Launches:
    """Starts scripts as a user does, and waits for them."""

    def __init__(self, place: Path, machines):
        self.place, self.machines = place, machines

    def environment(self, **more) -> dict:
        own = {"FINETUNE_PYTHON": warm.python(), "FINETUNE_CACHE": str(self.place / "cache"), "OMP_NUM_THREADS": "1"}
        return os.environ | own | {key: str(value) for key, value in more.items()}

    def start(self, out: Path, *more: str, model: str = "base", machine: int | None = None, **environment):
        """A process of the script, on one of the two machines or simply here."""
        prefix = [] if machine is None else self.machines[machine].prefix
        command = [*prefix, "bash", str(ROOT / "finetune" / "finetune_lora_ds.sh"), "-m", str(self.place / model)]
        command += ["-d", str(self.place / "talks.json"), "-o", str(out), *more]
        if machine is not None:
            environment |= {
                "NNODES": 2,
                "NODE_RANK": machine,
                "GPUS_PER_NODE": 1,
                "MASTER_ADDR": self.machines[0].address,
            }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(command, env=self.environment(**environment), cwd=self.place, **pipes)

    def run(self, method: str, engine: str, out: Path, *more: str) -> str:
        """One run, to its end; what it printed."""
        ranks = 1 if engine == "one process" else 2
        words, model = [*flags(ranks), *ENGINES[engine], *METHODS[method], *more], BASES.get(method, "base")
        if engine != "two machines":
            return ended_well(self.start(out, *words, model=model, GPUS_PER_NODE=ranks))
        port = free_port()
        return ended_well(*(self.start(out, *words, model=model, machine=i, MASTER_PORT=port) for i in (0, 1)))


def ended_well(*processes) -> str:
    """What they printed, once all have ended."""
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(printed)
    return "\n".join(printed)


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
def launches(place):
    with two_machines() as machines:
        yield Launches(place, machines)


@pytest.fixture(scope="module")
def cell(place, launches):
    """cell(method, engine) -> the output folder of its run; each is run once."""

    @functools.cache
    def run(method: str, engine: str) -> Path:
        out = place / f"{method} on {engine}"
        printed = launches.run(method, engine, out)
        shown = {"two machines": "DDP, 2 ranks on 2 machines", "one process": "one process"}.get(engine, engine)
        assert f"engine     {shown}" in printed, printed
        return out

    return run


@pytest.mark.parametrize("method,engine", [pair for pair in CELLS if pair[1] != "one process"])
def test_same_losses_and_same_weights(cell, method, engine):
    expected, found = cell(method, "one process"), cell(method, engine)
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 1e-9), ("token_accuracy", 1e-9)):
        straight, here = ([line[name] for line in log(folder).values()] for folder in (expected, found))
        assert len(straight) == STEPS and here == pytest.approx(straight, rel=tolerance), name
    assert furthest(weights(expected), weights(found)) < 1e-5


OFFLOADED = {
    "ZeRO-2": ["--deepspeed", "ds_config_zero2_offload.json"],
    "ZeRO-3": ["--deepspeed", "ds_config_zero3_offload.json"],
}


@pytest.mark.parametrize("engine", OFFLOADED)
def test_offloading_changes_nothing(cell, launches, place, engine):
    """What lies in main memory is the same; here all of it does, but the engines' code for it runs (FSDP2's pins memory, which takes CUDA)."""
    expected, found = cell("LoRA", "one process"), place / f"{engine}, offloaded"
    launches.run("LoRA", engine, found, *OFFLOADED[engine], "--save_strategy", "no")
    losses = [[line["loss"] for line in log(folder).values()] for folder in (expected, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert furthest(weights(expected), weights(found)) < 1e-5


def test_the_learning_rate_is_the_asked_curve(cell):
    """Warm-up over ceil(0.2 * 6) = 2 steps, then a cosine over the other 4."""
    from math import cos, pi

    curve = [0, 0.5, *(0.5 * (1 + cos(pi * k / 4)) for k in range(4))]
    for engine in ENGINES:
        rates = [line["learning_rate"] for line in log(cell("LoRA", engine)).values()]
        assert rates == pytest.approx([1e-2 * factor for factor in curve], abs=1e-9), engine


@pytest.mark.parametrize("method,engine", [pair for pair in CELLS if pair[1] != "two machines"])  # of that, see below
def test_stopped_and_gone_on_is_the_same(cell, launches, place, method, engine):
    whole = cell(method, engine)
    out = place / f"{method} on {engine}, resumed"
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    printed = launches.run(method, engine, out, "--resume_from_checkpoint", "auto")
    assert "continuing from" in printed and sorted(log(out)) == [4, 5, 6]
    difference = furthest(weights(whole), weights(out))
    assert difference == 0 if engine == "one process" else difference < 1e-6


@pytest.fixture(scope="module")
def changed(place, cell, launches):
    """changed(engine) -> (folder, words, what was printed) of a run that goes on from step 3 with other flags; each is run once."""

    @functools.cache
    def run(engine: str):
        out, change = place / f"changed on {engine}", ["--learning_rate", "5e-3", "--weight_decay", "0.3", "--max_steps", "5"]
        words = ["LoRA", engine, out, "--resume_from_checkpoint", "auto", *change]
        shutil.copytree(cell("LoRA", engine) / "checkpoint-3", out / "checkpoint-3")
        return out, words, launches.run(*words)

    return run


@pytest.mark.parametrize("engine", ["one process", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2"])
def test_changed_flags_hold_on_every_engine(changed, launches, engine):
    """Another rate, decay and number of steps, in the midst of an epoch; then started again, with half a result: no step more."""
    out, words, printed = changed(engine)
    assert "changed from here on: " in printed
    rates = {step: line["learning_rate"] for step, line in log(out).items()}
    assert rates == pytest.approx({k + 1: 5e-3 * 0.5 * (1 + math.cos(math.pi * (k - 1) / 4)) for k in (3, 4)}, rel=1e-9)
    result = weights(out)
    assert furthest(weights(changed("one process")[0]), result) < 1e-5
    (out / "adapter_config.json").unlink()
    assert "nothing left to train" in launches.run(*words)
    assert furthest(result, weights(out)) == 0 and not (out / "checkpoint-6").exists()
    assert "nothing to do" in launches.run(*words)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_that_dies_and_comes_back(cell, launches, place, killed):
    """Its agent and worker are killed in mid-run and started again: the run goes on, to the same weights.

    Nobody has asked for that, nor does --overwrite_output_dir stand against it: these are the run's own checkpoints.
    """
    out, port = place / f"killed {killed}", free_port()
    words = [*flags(2), *ENGINES["two machines"], *METHODS["LoRA"], "--save_steps", "1", "--max_restarts", "3"]
    words += ["--overwrite_output_dir"]

    def start(i):
        return launches.start(out, *words, machine=i, MASTER_PORT=port)

    processes = [start(0), start(1)]
    stays, dies = processes[1 - killed], processes[killed]
    wait_for(out / "checkpoint-2")
    os.killpg(dies.pid, signal.SIGKILL)
    dies.wait()
    printed = ended_well(stays, start(killed))
    assert "continuing from" in printed and "checkpoint-" in printed
    assert furthest(weights(cell("LoRA", "two machines")), weights(out)) < 1e-6
    assert sorted(log(out)) == list(range(1, STEPS + 1))  # each step once, in the log too


@pytest.mark.parametrize("engine", ["one process", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "two machines"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same(cell, launches, place, engine):
    """One launcher gets the signal, of two machines the second; all ranks end behind the same step, with 75."""
    out, port, two = place / f"asked {engine}", free_port(), engine == "two machines"
    ranks = 1 if engine == "one process" else 2
    words = [*flags(ranks), *ENGINES[engine], *METHODS["LoRA"], "--save_strategy", "no", "--max_restarts", "2"]
    where = [{"machine": i, "MASTER_PORT": port} for i in (0, 1)] if two else [{"GPUS_PER_NODE": ranks}]
    processes = [launches.start(out, *words, **one) for one in where]
    wait_for(out / "training_log.jsonl")
    processes[-1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [STOPPED] * len(processes), "\n".join(printed)
    [checkpoint] = out.glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert step < STEPS and f"SIGTERM: stopped behind step {step}, with {checkpoint}" in printed[0], "\n".join(printed)
    assert "error" not in "".join(printed) and "Traceback" not in "".join(printed), "\n".join(printed)
    ended_well(*[launches.start(out, *words, "--resume_from_checkpoint", "auto", **one) for one in where])
    assert furthest(weights(cell("LoRA", engine)), weights(out)) < (1e-6 if ranks > 1 else 1e-12)


def wait_for(path: Path, seconds: float = 120) -> None:
    begin = time.monotonic()
    while not path.exists():
        assert time.monotonic() < begin + seconds, path
        time.sleep(0.02)


def test_tensorboard_shows_what_all_ranks_do(launches, place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = place / "with tensorboard"
    launches.run("LoRA", "DDP", out, "--report_to", "tensorboard", "--save_strategy", "no")
    [folder] = (out / "runs").iterdir()  # one for each start
    events = EventAccumulator(str(folder))
    events.Reload()

    def shown(name):
        return [event.value for event in events.Scalars(f"train/{name}")]

    lines = log(out).values()
    for name in ("loss", "learning_rate", "tokens_per_second", "supervised_tokens_per_second"):
        assert shown(name) == pytest.approx([line[name] for line in lines], rel=1e-6), name


def test_one_ranks_error_ends_all(launches, place):
    """The data is missing on one of two machines: one line says where, and both end with exit code 2."""
    port, out = free_port(), place / "not there"
    here = launches.start(out, *flags(2), *ENGINES["DDP"], machine=0, MASTER_PORT=port)
    there = launches.start(out, *flags(2), *ENGINES["DDP"], "--data_path", "nowhere.json", machine=1, MASTER_PORT=port)
    printed = [process.communicate(timeout=120)[0] for process in (here, there)]
    assert [here.returncode, there.returncode] == [2, 2], printed
    assert sum(text.count("no such file") for text in printed) <= 2 and "Traceback" not in "".join(printed)
    assert "rank 1 on " in printed[0] and "--data_path nowhere.json: no such file" in printed[0]
    assert not out.exists()
