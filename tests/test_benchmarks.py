"""The programs behind the README's figures run, and the figures hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_cpu_step_is_six_times_as_fast_in_a_fifth_of_the_memory(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "cpu_step.py"),
        "--steps",
        "3",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "times as fast, in" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["plain"]["loss"] == pytest.approx(figures["ours"]["loss"], rel=1e-5)  # the same work was done
    assert figures["speed_ratio"] >= 6
    assert figures["memory_ratio"] <= 0.2
