"""What a person waits for: --help, an error that needs no weights, packages that are not used. In CPU seconds of cold launches.

On two cores of 2026 they take a tenth to a third of a second. torch alone takes two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import small_checkpoint

ROOT = Path(__file__).parent.parent
HELP_SECONDS, ERROR_SECONDS = 0.5, 1.5
PROGRAMS = ["finetune.py", "run_gptq.py", *(f"-m finetune.{name}" for name in ("merge", "ask", "compare", "export", "refresh"))]
PROGRAMS += ["-m qwen_model.new_checkpoint"]


def cold(*words, **environment) -> tuple[subprocess.CompletedProcess, float]:
    """Runs a program to its end; the second is what it took of the CPU."""
    before = os.times()
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=settings, capture_output=True, text=True)
    after = os.times()
    return done, after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_there_at_once(program):
    done, seconds = cold(*program.split(), "--help")
    assert done.returncode == 0 and "usage: " in done.stdout and done.stderr == ""
    assert seconds < HELP_SECONDS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, conversations, good and bad, and a folder that is taken."""
    folder = tmp_path_factory.mktemp("place")
    small_checkpoint(folder / "model")
    for name, role in (("good", "assistant"), ("bad", "narrator")):
        turns = [{"from": "user", "value": "Who are you?"}, {"from": role, "value": "I am a small model."}]
        (folder / f"{name}.json").write_text(json.dumps([{"conversations": turns}] * 8))
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").write_text("{}")
    return folder


TRAIN, GPTQ = "finetune.py --use_lora -m model -d good.json -o out", "run_gptq.py -m model -d good.json -o out"
COMPARE = "-m finetune.compare model model"
ERRORS = {
    f"{TRAIN} -m nowhere": "--model_name_or_path nowhere: no such folder",
    f"{TRAIN} -d nowhere.json": "--data_path nowhere.json: no such file",
    f"{TRAIN} -d bad.json": 'bad.json: sample 1 turn 2, sample 2 turn 2, sample 3 turn 2 and 5 more: role "narrator" unknown',
    f"{TRAIN} --eval_strategy epoch --eval_data_path nowhere.json": "--eval_data_path nowhere.json: no such file",
    f"{TRAIN} --deepspeed nowhere.json": "--deepspeed nowhere.json: no such file",
    f"{TRAIN} -o taken": "--output_dir taken: holds a finished model",
    f"{TRAIN} --use_lorra": "--use_lorra: unknown flag - did you mean --use_lora?",
    f"{TRAIN} --lora_r x": "--lora_r: invalid int value: 'x'",
    f"{TRAIN} --lora_r 0": "--lora_r 0: out of range",
    "finetune.py -d good.json": "--model_name_or_path: missing",
    "-m finetune.merge model out": "model: no adapter_config.json there",
    "-m finetune.merge nowhere out": "nowhere: no adapter_config.json there",
    "-m finetune.ask nowhere hello": "nowhere: no such folder",
    "-m finetune.ask taken hello": "taken: no weights",
    "-m finetune.ask model --questions_file good.json": "--questions_file good.json: not a list of strings",
    "-m finetune.compare model nowhere": "nowhere: no such folder",
    f"{COMPARE} --data_path bad.json": 'bad.json: sample 1 turn 2, sample 2 turn 2, sample 3 turn 2 and 5 more: role "narrator" unknown',
    "-m finetune.export nowhere out --to qwen2": "nowhere: no such folder",
    "-m finetune.export model taken --to qwen2": "taken: exists and is not empty",
    "-m finetune.export model out --to qwen": "model: is in that layout already",
    "-m finetune.refresh nowhere": "nowhere: no such folder",
    f"{GPTQ} -m nowhere": "nowhere: no such folder",
    f"{GPTQ} --bits 5": "--bits 5: the format holds 2, 3, 4 or 8 bits",
    f"{GPTQ} -d bad.json": 'bad.json: sample 1 turn 2, sample 2 turn 2, sample 3 turn 2 and 5 more: role "narrator" unknown',
}


@pytest.mark.parametrize("command", ERRORS)
def test_an_error_that_needs_no_weights_is_there_at_once(place, command):
    paths = {name: str(place / name) for name in ("model", "good.json", "bad.json", "taken", "out")}
    words = [paths.get(word, word) for word in command.split()]
    done, seconds = cold(*words)
    told = done.stderr.replace(f"{place}/", "")
    assert done.returncode == 2 and f"error: {ERRORS[command]}" in told and "Traceback" not in told, told
    assert seconds < ERROR_SECONDS


# ---- packages

WATCHED = ("peft", "bitsandbytes", "gptqmodel", "deepspeed", "matplotlib", "tensorboard", "datasets", "optimum", "torchao")
# Runs a program as __main__, and tells in a file which packages it has imported, and whether loss.png's came before the end.
WATCH = f"""
import atexit, json, pathlib, runpy, sys
sys.path.insert(0, "")
told, result, program, *words = sys.argv[1:]
early = []
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "matplotlib" and not any(pathlib.Path(result).glob("*.safetensors")):
            early.append(name + ", before training has ended")
sys.meta_path.insert(0, Finder)
def tell():
    pathlib.Path(told).write_text(json.dumps([name for name in {WATCHED} if sys.modules.get(name)] + early))
atexit.register(tell)
sys.argv = [program, *words]
runpy.run_path(program, run_name="__main__") if program.endswith(".py") else runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def imported(place: Path, result: str, *words) -> tuple[set[str], str]:
    """(the watched packages that a program imported, what it wrote to stderr)."""
    done, _ = cold("-c", WATCH, place / "told.json", place / result, *words, FINETUNE_CACHE=str(place / "cache"))
    assert done.returncode == 0, done.stderr
    return set(json.loads((place / "told.json").read_text())), done.stderr


@pytest.mark.slow
def test_a_program_imports_what_it_uses(place):
    """And what other packages would say when they are imported is not heard: notes are ours, and so are the lines of steps."""
    train = ["-m", place / "model", "-d", place / "good.json", "--max_steps", "1", "--model_max_length", "512", "--save_strategy", "no"]
    runs = [
        ("full", {"matplotlib"}, ["finetune.py", *train, "-o", place / "full"]),
        ("lora", {"matplotlib", "peft"}, ["finetune.py", *train, "-o", place / "lora", "--use_lora"]),
        ("full", set(), ["finetune.ask", place / "full", "hello", "--max_new_tokens", "2"]),
        ("merged", {"peft"}, ["finetune.merge", place / "lora", place / "merged"]),
    ]
    for result, wanted, words in runs:
        found, told = imported(place, result, *words)
        assert found == wanted, words
        lines = [line for line in told.replace("\r", "\n").splitlines() if line.strip()]
        assert [line for line in lines if not line.startswith(("note: ", "warning: ", "step 1 of ", "Sample 1, ", "  "))] == [], told
