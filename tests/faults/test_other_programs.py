"""What makes a folder of a folder, beside training and merging: exporting, quantizing, comparing. Over what is damaged, on a full disk, killed.

By default a part: what is read first, and a point in the middle of writing. The rest is slow; FAULTS=all takes every file operation.
Quantizing itself takes half a minute: over damaged folders it goes up to where it would begin.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import warm
from quantizing import DATA, arguments
from quantizing import model_to_quantize as quantizable
from test_damaged_folders import go_over, later, make, outcome, quick_damages  # noqa: F401 (fixture)
from tiny import small_checkpoint

import run_gptq
from finetune.compare import __main__ as compare
from finetune.errors import UserError
from finetune.export import __main__ as export
from finetune.gptq import pipeline

ROOT, ALL = Path(__file__).parents[2], os.environ.get("FAULTS") == "all"
FAULTY = Path(__file__).with_name("faulty.py")
READ_FIRST = ("config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors", "training.json", "tokenizer.json")


def early(content: bytes) -> dict:
    """The ways that end before weights are loaded."""
    return {what: now for what, now in quick_damages(content).items() if what not in ("missing", "flipped")}


class Program:
    """A program whose result of the last time goes first."""

    def __init__(self, program, out: Path):
        self.program, self.out = program, out

    def main(self, words: list[str]) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.program.main(words)
        assert not self.out.with_name(f"{self.out.name}.unfinished").exists()


# ---- damaged folders


@pytest.mark.parametrize("damages,only", [(early, READ_FIRST), pytest.param(quick_damages, None, marks=pytest.mark.slow)])
def test_comparing_what_is_damaged(later, damages, only):  # noqa: F811
    base, adapter = later
    words = [adapter, base, "--base", base, "--answers", 1, "--max_new_tokens", 1]
    assert outcome(compare, words)[0] == 0
    for folder in (base, adapter):
        assert go_over(folder, damages, compare, words, lambda path: only is None or path.name in only) == []


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["adapter", "exported"])
def test_exporting_an_adapter_of_or_for_what_is_damaged(tmp_path, damaged):
    base, adapter = make(tmp_path, "qwen")
    export.main([str(base), str(tmp_path / "exported"), "--to", "qwen2"])
    program, words = Program(export, tmp_path / "out"), [adapter, tmp_path / "out", "--to", "qwen2", "--base", tmp_path / "exported"]
    assert outcome(program, words)[0] == 0
    damages = quick_damages if ALL or damaged == "adapter" else early
    assert go_over(tmp_path / damaged, damages, program, words) == []


@pytest.fixture(scope="module")
def to_quantize(tmp_path_factory):
    return quantizable(tmp_path_factory.mktemp("to quantize") / "base")


@pytest.mark.parametrize("damages,only", [(early, READ_FIRST[:4]), pytest.param(quick_damages, None, marks=pytest.mark.slow)])
def test_quantizing_what_is_damaged(to_quantize, tmp_path, monkeypatch, damages, only):
    def begins(*_, **__):
        raise UserError("it would begin now")

    monkeypatch.setattr(pipeline, "run", begins)
    words = arguments(to_quantize, tmp_path / "out", samples=4)
    assert outcome(run_gptq, words)[1].count("error: it would begin now") == 1
    said = go_over(to_quantize, damages, Program(run_gptq, tmp_path / "out"), words, lambda path: only is None or path.name in only)
    assert said == [] and not (tmp_path / "out").exists()


# ---- a full disk, and a kill


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of everything; the words of each program, without its output."""
    place = tmp_path_factory.mktemp("programs")
    base = small_checkpoint(place / "base")
    other = quantizable(place / "plain")
    (place / "few.json").write_text(json.dumps(json.loads(DATA.read_text(encoding="utf-8"))[:4]))
    return place, {
        "export": lambda out: ["-m", "finetune.export", base, out / "result", "--to", "qwen2", "--max_shard_size", "1MB"],
        "compare": lambda out: ["-m", "finetune.compare", base, base, "--answers", 1, "--max_new_tokens", 1, "--json", out / "figures.json"],
        "quantize": lambda out: [ROOT / "run_gptq.py", *arguments(other, out / "result", samples=4)],
    }


def start(world, program: str, out: Path, kind: str = "SIGKILL", number: int = 0) -> tuple[int, str]:
    """(exit code, what was printed) of a program to which something happens at an operation in its output's folder."""
    out.mkdir(exist_ok=True)
    words = world[1][program](out)
    if words[0] == "-m":  # faulty.py runs files
        script = world[0] / f"{program}.py"
        script.write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nrunpy.run_module({words[1]!r}, run_name='__main__', alter_sys=True)\n")
        words = [script, *words[2:]]
    own = {"OMP_NUM_THREADS": "1", "FINETUNE_CACHE": str(world[0] / "cache"), "FAULT_COUNT": f"{out}.count", "GPTQMODEL_CPU_WORKERS": "2"}
    command = [warm.python(), FAULTY, kind, number, out, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 300}
    done = subprocess.run([str(word) for word in command], env=os.environ | own, **pipes)
    return done.returncode, done.stdout


def contents(out: Path) -> dict[str, bytes]:
    """What a program made: every file but what it says of times and places."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name not in ("training.json", "README.md")}


wholes: dict = {}


def whole(world, program: str) -> tuple[dict, int]:
    """(contents, number of operations) of a program that nothing happened to."""
    if program not in wholes:
        out = world[0] / f"whole {program}"
        code, printed = start(world, program, out)
        assert code == 0, printed
        wholes[program] = contents(out), int(Path(f"{out}.count").read_text())
    return wholes[program]


def check(world, program: str, kind: str, number: int) -> None:
    """Something happens at an operation: no half result under the result's name, and the same command again makes what it would have made."""
    expected, operations = whole(world, program)
    out = world[0] / f"{program} {kind} {number}"
    code, printed = start(world, program, out, kind, number)
    what = f"{program}, {kind} at operation {number} of {operations}: exit code {code}\n{printed}"
    assert "Traceback" not in printed, what
    if kind == "ENOSPC" and code:
        assert code == 1 and printed.count("error: ") == 1 and "the disk or its quota is full" in printed and contents(out) == {}, what
    result = out / ("figures.json" if program == "compare" else "result")
    if not result.exists() or program == "compare":
        code, printed = start(world, program, out)
        assert code == 0, f"{what}\nagain:\n{printed}"
    found = {name: content for name, content in contents(out).items() if not name.endswith(".being-written")}
    assert found == expected, what


@pytest.mark.parametrize("kind", ["SIGKILL", "ENOSPC"])
def test_in_the_middle_of_writing(world, kind):
    """One launch each: that nothing half is left under the result's name."""
    out = world[0] / f"middle {kind}"
    code, printed = start(world, "export", out, kind, 16)
    assert not (out / "result").exists() and "Traceback" not in printed
    if kind == "ENOSPC":
        line = f"error: {out}/result: could not be written, the disk or its quota is full; what was half written is removed - make room"
        assert code == 1 and line in printed and list(out.iterdir()) == [], printed


@pytest.mark.slow
@pytest.mark.parametrize("program,few", [("export", 3), ("compare", 2), ("quantize", 2)])
@pytest.mark.parametrize("kind", ["SIGKILL", "ENOSPC"])
def test_at_any_operation(world, program, kind, few):
    _, operations = whole(world, program)
    for number in range(1, operations + 1, 1 if ALL and program != "quantize" else max(1, operations // few)):
        check(world, program, kind, number)
