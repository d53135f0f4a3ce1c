"""Random command lines end well or in lines that say what is wrong, never in a traceback. FAULTS=all draws all of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm
from tiny import small_checkpoint

SCRIPT = Path(__file__).with_name("random_lines.py")
ALL = os.environ.get("FAULTS") == "all"


def talks(count: int, first: int = 0, role: str = "assistant") -> str:
    return json.dumps([
        {"conversations": [{"from": "user", "value": f"What is {i}?"}, {"from": role, "value": f"It is {i}. " * (i % 4 + 1)}]}
        for i in range(first, first + count)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("lines")
    small_checkpoint(made / "base")
    (made / "data.json").write_text(talks(12))
    (made / "eval.json").write_text(talks(4, 50))
    (made / "bad.json").write_text(talks(3, role="narrator"))
    return made


def check(folder: Path, seed: int, count: int) -> list[dict]:
    """Runs the lines; asserts what holds of each; returns them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FINETUNE_CACHE": str(folder / "cache")}
    command = [warm.python(), SCRIPT, folder, str(seed), str(count)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == count
    for line in found:
        told = f"{line['words']}\nexit code {line['code']}\n{line['text']}"
        errors = [text for text in line["text"].splitlines() if text.startswith("error: ")]
        assert line["code"] in (0, 2) and "Traceback" not in line["text"], told
        assert bool(errors) == (line["code"] == 2) and all(len(text) < 3100 and text.isprintable() for text in errors), told
    return found


@pytest.mark.parametrize("seed", [2])
def test_forty_of_them(folder, seed):
    found = check(folder, seed, 40)
    assert 5 < sum(line["code"] == 0 for line in found) < 35  # neither all right nor all wrong


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4, 5] if ALL else [3])
def test_hundreds_of_them(folder, seed):
    """300 together with FAULTS=all, 100 without."""
    check(folder, seed, 100)
