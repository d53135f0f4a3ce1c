"""benchmarks/train.py to its end at toy size, what it counts, and the README's tables made of its files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cells  # noqa: E402
import table  # noqa: E402
from cells import OK, OOM, Cell  # noqa: E402


def run(*words, timeout=600):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_a_run_at_toy_size(tmp_path):
    """Each kind of weights once, a yardstick, and one that is not there: nothing is skipped in silence."""
    file, program = tmp_path / "figures.json", ROOT / "benchmarks" / "train.py"
    weights = tmp_path / "weights"
    small = f"--checkpoints {weights} --save {tmp_path / 'saved'} --lengths 48 --steps 2 --samples 4 --methods lora qlora_gptq full_bf16 --ways ours transformers trl"
    done = run(program, *small.split(), "--json", file)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    assert {path.name for path in weights.iterdir()} == {"tiny_plain", "tiny_gptq"}
    (saved,) = (tmp_path / "saved").glob("train_CPU_*_1.json")
    assert json.loads(saved.read_text(encoding="utf-8")) == report
    assert report["ceiling_tflops"] > 0 and report["about"]["versions"]["torch"] and report["about"]["machine"]
    found = {(cell["way"], cell["method"]): cell for cell in report["cells"]}
    assert len(found) == 9
    for method in ("lora", "qlora_gptq", "full_bf16"):
        cell = found["ours", method]
        assert cell["status"] == OK, cell
        assert (cell["tokens"], cell["supervised"], cell["tokens_per_pass"]) == (4 * 48, 4 * 47, 4 * 48)
        assert cell["tokens_per_second"] == pytest.approx(4 * 48 / cell["seconds_per_step"])
        assert 0.1 < cell["memory_gb"] < 5 and cell["predicted_gb"] > 0 and cell["recomputed"] == "0/2"
    assert found["transformers", "lora"]["status"] == OK
    assert "quantized checkpoint of its own" in found["transformers", "qlora_gptq"]["status"]
    assert found["trl", "lora"]["status"] in (OK, "not installed")
    assert "ours         lora        tiny" in done.stdout and "matrix product" in done.stdout


@pytest.mark.slow
def test_where_the_time_of_a_step_goes(tmp_path):
    """The parts add up, and each has its share."""
    file, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    program = ROOT / "benchmarks" / "step_profile.py"
    done = run(program, "--length", 64, "--samples", 4, "--recompute", "all", "--json", file, "--trace", trace)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=0.1)
    assert found["recomputed"] == "2/2" and json.loads(trace.read_text())["traceEvents"]
    parts = found["parts"]
    assert parts["head and loss"] > 0.1 * found["seconds"]  # 152 thousand tokens over a hidden size of 64
    assert min(parts[name] for name in ("LoRA", "norms, rotary, gate", "attention", "linear layers", "optimizer")) > 0
    assert parts["other"] < 0.3 * found["seconds"]
    assert 0.07 < found["memory_gb"]["weights"] < 0.09  # 19.5 million numbers in float32
    assert "head and loss" in done.stdout and "aten::mm" in done.stdout


def test_what_counts_as_work():
    """Qwen-7B has 7,720,665,088 parameters in matrices: 32 x (4 x 4096^2 + 3 x 4096 x 11008) + 2 x 151936 x 4096."""
    assert cells.parameters("7B") == 6_476_005_376 + 1_244_659_712
    assert cells.model_flop("lora", "7B", 1000) == 4 * 7_720_665_088 * 1000
    assert cells.model_flop("full_bf16", "7B", 1000) == 6 * 7_720_665_088 * 1000
    found = cells.figures(Cell("ours", "lora", "7B", 2048), tokens=16384, supervised=16000, seconds=2.0, ceiling_tflops=790)
    assert found["tokens_per_second"] == 8192 and found["supervised_tokens_per_second"] == 8000
    assert found["utilization"] == pytest.approx(8192 * 4 * 7.720665088e9 / 790e12)


def test_a_process_that_dies_is_a_result(monkeypatch, tmp_path):
    import train

    words = {"samples": 2, "steps": 1, "flags": "--no_such_flag", "timeout": 300, "checkpoints": tmp_path}
    options = train.argparse.Namespace(**words)
    cell = train.measure(Cell("ours", "lora", "tiny", 32), 1.0, options)
    assert cell["status"].startswith("failed: ") and "no_such_flag" in cell["status"]
    options.timeout = 0.01
    assert "took more than" in train.measure(Cell("ours", "lora", "tiny", 32), 1.0, options)["status"]


def test_what_stands_first_is_measured_first():
    """All lists count the same, and a yardstick does not wait until all of ours are measured."""
    import train

    lists = {"sizes": ["7B", "1.8B"], "methods": ["lora", "full"], "lengths": [2048, 256], "recompute": ["auto"]}
    options = train.argparse.Namespace(**lists, ways=["ours", "transformers"], missing=False)
    found = train.chosen(options, "a GPU")
    assert len(found) == len(set(found)) == 16
    assert found[0] == Cell("ours", "lora", "7B", 2048) and found[-1] == Cell("transformers", "full", "1.8B", 256)
    assert Cell("transformers", "lora", "7B", 2048) in found[:5] and Cell("ours", "lora", "7B", 256) in found[:5]


def test_what_cannot_be_measured_is_known_without_a_start(monkeypatch):
    assert cells.obstacle(Cell("ours", "qlora_gptq", "7B", 512)) is None
    assert "quantized checkpoint" in cells.obstacle(Cell("transformers", "qlora_gptq", "7B", 512))
    assert "rounds" in cells.obstacle(Cell("transformers", "full_bf16", "7B", 512))
    monkeypatch.setitem(cells.WAYS, "liger", "no_such_package")
    assert cells.obstacle(Cell("liger", "lora", "7B", 512)) == "not installed"


def report(machine, date, *found):
    return {"about": {"machine": machine, "date": date}, "ceiling_tflops": 790.4, "cells": list(found)}


def cell(way="ours", method="lora", length=512, status=OK, recompute="auto", seconds=0.5):
    figures = {"seconds_per_step": seconds, "memory_gb": 21.34, "utilization": 0.61}
    return vars(Cell(way, method, "7B", length, recompute)) | {"status": status} | (figures if status == OK else {})


def test_tables_say_what_the_files_say(tmp_path):
    files = {
        "train_H200_2.json": report("NVIDIA H200", "2030-02-02", cell(seconds=0.4), cell(length=1024, status=OOM)),
        "train_H200_1.json": report("NVIDIA H200", "2030-01-01", cell(), cell(length=256)),
        "train_CPU.json": report("CPU (x86_64, 2 threads)", "2031-01-01", cell(seconds=99.0)),
        "train_H200_9.json": report("NVIDIA H200", "2030-03-03", cell("trl", seconds=0.6)),
        "train_H200_10.json": report("NVIDIA H200", "2030-03-03", cell("trl"), cell(recompute="all", seconds=77.0)),
        "train_H200_11.json": report("NVIDIA H200", "2030-03-03", cell(status="failed: something")),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    text = table.tables(table.newest(cells.stored(tmp_path)))
    of_7b = text.partition("1.8B, s/step")[0]
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in of_7b.splitlines() if line.startswith("| ")}
    assert rows["| **LoRA**"][:4] == ["0.50 s, 21.3 (61%)", "0.40 s, 21.3 (61%)", OOM, "not measured"]
    assert rows["| LoRA, TRL"][1] == "0.50 s, 21.3 (61%)"
    assert rows["| LoRA, published (A100)"][0] == "1.2 s, 20.1"
    assert rows["| **full-parameter**"][0] == "not measured"
    assert "NVIDIA H200, 2030-02-02, 790 TFLOP/s" in text and "99.0" not in text and "77.0" not in text


def test_what_has_to_be_measured_again(tmp_path, monkeypatch):
    """Not what has a figure or ran out of memory; but what failed, took too long, or was not installed."""
    import train

    statuses = {256: OK, 512: OOM, 1024: "failed: something", 2048: "took more than 500 s", 4096: "not installed"}
    content = report("NVIDIA H200", "2030-01-01", *(cell(length=at, status=is_) for at, is_ in statuses.items()))
    (tmp_path / "train_1.json").write_text(json.dumps(content), encoding="utf-8")
    stored = cells.stored
    monkeypatch.setattr(cells, "stored", lambda folder: stored(tmp_path))
    asked = {"sizes": ["7B"], "methods": ["lora"], "lengths": [*statuses, 8192], "ways": ["ours"], "recompute": ["auto"]}
    options = train.argparse.Namespace(**asked, missing=True, save=None)
    assert [left.length for left in train.chosen(options, "NVIDIA H200")] == [1024, 2048, 4096, 8192]
    assert len(train.chosen(options, "another")) == 6


def test_the_readme_is_what_the_files_say():
    done = run(ROOT / "benchmarks" / "table.py", "--check", timeout=60)
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = readme.replace(table.BEGIN + "\n", table.BEGIN + "\nnot so\n")
    assert table.put(changed, table.tables(table.newest(cells.stored()))) == readme
