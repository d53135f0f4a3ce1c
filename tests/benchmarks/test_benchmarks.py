"""The programs behind the README's figures run, and the figures hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_cpu_step_is_ten_times_as_fast_in_a_fifth_of_the_memory(tmp_path):
    """At half the length of the README's figures, which takes the plain trainer half the time."""
    program, figures = ROOT / "benchmarks" / "cpu_step.py", tmp_path / "figures.json"
    settings = ["--model_max_length", "256", "--steps", "2", "--rounds", "1", "--json", str(figures)]
    command = [sys.executable, str(program), *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "times as fast, in" in done.stdout
    figures = json.loads(figures.read_text())
    assert {"machine", "versions", "commit"} <= figures["about"].keys()
    assert figures["plain"]["loss"] == pytest.approx(figures["ours"]["loss"], rel=1e-5)  # the same work was done
    assert figures["speed_ratio"] >= 10
    assert figures["memory_ratio"] <= 0.2


@pytest.mark.slow
def test_a_dry_run_says_what_the_run_takes(tmp_path):
    """Full and LoRA at three sizes, on the CPU. The README's figures are of larger ones."""
    figures = tmp_path / "figures.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "dry_run.py"), "--json", str(figures)]
    sizes = ["--sizes", "64x2", "128x2", "256x2", "--passes", "4096", "--steps", "2", "--samples", "5"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*program, *sizes], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for case in json.loads(figures.read_text()):
        said, found = case["said"], case["found"]
        assert (said["passes"], said["steps"]) == (found["passes"], found["steps"]), case
        assert said["memory_gb"] == pytest.approx(found["memory_gb"], rel=0.1), case


def test_memory_counts_the_bundled_model():
    """The arithmetic against the model itself, without weights; the README shows the program's own table."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import memory

    from qwen_model import QWenConfig, QWenLMHeadModel

    layers, hidden, intermediate, vocabulary = memory.SIZES["7B"]
    config = QWenConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=hidden // 128, kv_channels=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = QWenLMHeadModel(config)
    sizes = memory.sizes_of("7B")
    blocks, embeddings, adapters = sizes.blocks, sizes.embeddings, sizes.adapters(64)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    assert sum(matrices.values()) == blocks + embeddings
    assert sum(size for name, size in matrices.items() if "wte" in name or "lm_head" in name) == embeddings
    from peft import LoraConfig, get_peft_model

    from finetune.compat.on_peft import unquantized

    with torch.device("meta"), unquantized():
        adapted = get_peft_model(model, LoraConfig(r=64, target_modules=["c_attn", "c_proj", "w1", "w2"]))
    assert adapted.get_nb_trainable_parameters()[0] == adapters
    done = subprocess.run([sys.executable, "benchmarks/memory.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and done.stdout in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_scripts_say_what_the_arithmetic_says():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import memory

    from finetune.flags.definitions import TrainingFlags

    table = memory.table(8)
    rows = {method: {size: f"{needed:.0f} GB" for size, needed in row.items()} for method, row in table.items()}
    several, single = ((ROOT / "finetune" / f"finetune_{name}.sh").read_text() for name in ("ds", "full_single_gpu"))
    whole, shared = rows["full, one process"]["7B"], rows["full, ZeRO-3 on 8 GPUs"]["7B"]
    each = {name: f"{memory.bytes_each(run):.0f}" for name, run in memory.METHODS.items() if not run.rank}
    sharded = memory.bytes_each(memory.Run(0, engine=memory.ZERO3, ranks=8))
    assert f"{sharded:.0f} bytes a parameter" in several and f"about {whole}, so {shared} on each of 8" in several
    half = rows["full, --bf16_weights, 8-bit AdamW"]
    assert f"{half['1.8B']} and" in single and f"7B about {half['7B']}" in single
    few, many = each["full, --bf16_weights, 8-bit AdamW"], each["full, one process"]
    assert f"at {few} bytes" in single
    assert f"memory allows {many}\n# bytes a parameter" in single
    said = TrainingFlags.__dataclass_fields__["bf16_weights"].metadata["help"]
    assert f"{few} bytes a parameter instead of {many}." in said


def test_the_kv_cache_benchmark_runs_on_a_cpu(tmp_path):
    """Toy size: the int8 cache holds less, the kernel's column says why it is empty, the file has machine and versions."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kv_cache.py"), "--size", "toy", "--batches", "2"]
    command += ["--lengths", "30", "--batch_tokens", "200", "--save", str(tmp_path), "--timed", "4"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kernel: not used: the model is on cpu" in done.stdout
    (path,) = tmp_path.glob("kv_cache_toy_*.json")
    report = json.loads(path.read_text())
    assert {"machine", "versions", "commit"} <= report["about"].keys() and report["about"]["versions"]["torch"]
    cells = {(cell["batch"], cell["tokens"], cell["way"]): cell for cell in report["cells"]}
    assert cells.keys() == {(b, t, way) for b, t in ((2, 200), (1, 30)) for way in ("full", "int8", "kernel")}
    full, int8 = cells[2, 200, "full"], cells[2, 200, "int8"]
    # 2 layers, keys and values, 2 rows, 2 heads of 64: float32 against uint8 and 8 bytes, with room for 64 more at most
    assert full["cache_gb"] == pytest.approx(2 * 2 * 2 * 2 * 207 * 64 * 4 / 1e9)
    assert 207 <= int8["cache_gb"] * 1e9 / (2 * 2 * 2 * 2 * (64 + 8)) <= 207 + 64 + 1
    assert full["tokens_per_second"] > 0 and int8["tokens_per_second"] > 0


def test_the_kv_cache_benchmark_says_what_does_not_fit(monkeypatch):
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import kv_cache

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kv_cache, "generate", full)
    model = kv_cache.make_model("toy")
    assert kv_cache.measure(model, 64, 1024, "full", None) == {"problem": "out of memory"}
    assert kv_cache.shown({"problem": "out of memory"}) == "out of memory"


# ---- everything at once


def on_a_gpu(*parts, **environment) -> subprocess.CompletedProcess:
    program = ["bash", str(ROOT / "benchmarks" / "on_a_gpu.sh"), *parts]
    environment = os.environ | {"FINETUNE_PYTHON": sys.executable, "SIZES": "tiny"} | environment
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)


def test_on_a_gpu_gives_every_program_flags_that_it_takes():
    done = on_a_gpu(DRY_RUN="1", SIZES="7B 72B")
    commands = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and list(commands) == ["tests", "cells", "table", "profile", "cache"]
    assert "--sizes 7B 72B --methods lora qlora_gptq" in commands["cells"]
    assert commands["tests"].endswith("-m pytest -q -m gpu tests")
    for name in ("cells", "table", "profile", "cache"):
        shown = subprocess.run([*commands[name].split(), "--help"], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0 and "usage:" in shown.stdout, shown.stderr


def test_on_a_gpu_goes_on_after_a_failure_and_says_so(tmp_path):
    """With an interpreter that runs but what is not called pytest."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *pytest*) exit 3 ;; esac\n')
    stub.chmod(0o755)
    done = on_a_gpu("tests", "cache", FINETUNE_PYTHON=str(stub), LOGS=str(tmp_path / "logs"))
    assert done.returncode == 1 and "== tests: exit code 3" in done.stdout and "== cache: exit code 0" in done.stdout
    assert f"not to the end: tests - see {tmp_path / 'logs'}" in done.stdout
    assert "kv_cache.py --timed 64 --save" in (tmp_path / "logs" / "cache.log").read_text()
    done = on_a_gpu("cache", FINETUNE_PYTHON=str(stub), LOGS=str(tmp_path / "logs"), MINUTES="0")
    assert done.returncode == 1 and "== cache: no time is left" in done.stdout
    done = on_a_gpu("everything", FINETUNE_PYTHON=str(stub))
    assert (done.returncode, done.stderr) == (2, "error: everything: unknown part - give tests, cells, profile or cache\n")


def test_on_a_gpu_checks_its_words_first(tmp_path):
    done = on_a_gpu("cache", MINUTES="soon")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: MINUTES=soon: give a whole number\n")
    if not warm.HAS_GPU:
        done = on_a_gpu("cache", SIZES="7B")
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: no GPU on this machine - SIZES=tiny")
    assert "MINUTES=9 bash" in on_a_gpu("--help").stdout


def test_on_a_gpu_writes_where_it_is_told_to(tmp_path):
    places = {"CHECKPOINTS": str(tmp_path / "weights"), "RESULTS": str(tmp_path / "figures"), "LOGS": str(tmp_path / "logs")}
    done = on_a_gpu(DRY_RUN="1", STEPS="3", WAYS="ours liger", **places)
    commands = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(commands) == ["tests", "cells", "profile", "cache"]  # no table: it reads benchmarks/results
    assert f"--ways ours liger --steps 3 --missing --checkpoints {tmp_path}/weights --save {tmp_path}/figures" in commands["cells"]
    assert f"--checkpoints {tmp_path}/weights" in commands["profile"] and f"--save {tmp_path}/figures" in commands["cache"]
    assert f"--json {tmp_path}/logs/profile.json" in commands["profile"]


def test_on_a_gpu_keeps_no_weights_unasked(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = --checkpoints ] && touch "$2/w" && echo "folder $2"; shift; done\n')
    stub.chmod(0o755)
    done = on_a_gpu("profile", FINETUNE_PYTHON=str(stub), LOGS=str(tmp_path / "logs"))
    (folder,) = (line.split()[1] for line in done.stdout.splitlines() if line.startswith("folder "))
    assert done.returncode == 0 and not Path(folder).exists()
