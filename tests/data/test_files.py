"""python -m finetune.data: looks at files good and bad, with and without a model, and writes what can be read."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm
from talks import GOOD, talk, write
from tiny import small_checkpoint

from finetune.conversations.reading import read

ROOT = Path(__file__).parents[2]
BAD = {"question": "q", "answer": ""}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def look(tmp_path):
    def run(*words):
        environment = os.environ | {"FINETUNE_CACHE": str(tmp_path / "cache"), "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
        command = [warm.python(), "-m", "finetune.data", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


MANY = [talk(f"question {i}", f"answer {i}") for i in range(12)]


def test_without_a_model(look, tmp_path):
    done = look(write(tmp_path, MANY), "--model_max_length", "26", "--per_device_train_batch_size", "3", "--num_train_epochs", "2")
    assert done.returncode == 0 and done.stderr == ""
    text = " ".join(done.stdout.split())
    assert "counted with first-generation Qwen's tokenizer (-m MODEL: with the model's)" in text
    assert "samples 12" in text and "steps 8 (4 an epoch, 3 samples each)" in text and "samples cut to 26 tokens" in text
    assert "memory" not in text and "┃ answer 0" in done.stdout


def test_with_a_model(look, tmp_path, base):
    done = look(write(tmp_path, MANY), "-m", base, "--use_lora", "--html", "look.html")
    assert done.returncode == 0, done.stderr
    assert "LoRA r=64" in done.stdout and "memory     about" in done.stdout and (tmp_path / "look.html").is_file()
    missing = look(write(tmp_path, MANY), "-m", "nowhere/model/x")
    assert missing.returncode == 2 and "nowhere/model/x" in missing.stderr and missing.stdout == ""


@pytest.mark.parametrize("with_model", [False, True])
def test_what_is_wrong_and_the_good_rest(look, tmp_path, base, with_model):
    path = write(tmp_path, [*MANY[:5], BAD | {"question": "\x1b[31mred"}, MANY[5]][::-1])
    done = look(path, *(["-m", base] if with_model else []))
    assert done.returncode == 2
    assert "error: talk.json: " not in done.stdout and done.stderr.endswith(
        f"error: {path}: mixes forms: \"messages\" with role/content (first: sample 1), \"question\"/\"answer\" (first: sample 2); keep one form per file\n"
        f'error: {path}: sample 2 "answer": empty answer; write one or remove the sample\n'
    )
    assert "samples    6" in done.stdout and "A run would end here" in done.stdout and "\x1b" not in done.stdout + done.stderr


def test_nothing_good_at_all(look, tmp_path):
    done = look(write(tmp_path, [BAD]))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    done = look(write(tmp_path, b"\x89PNG", "x.png"))
    assert done.returncode == 2 and "is a picture; give the conversations as text" in done.stderr


def test_what_is_mended(look, tmp_path):
    calls = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with_tools = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [calls]},
            {"role": "tool", "tool_call_id": "1", "content": "r"}, {"role": "assistant", "content": "a", "weight": 0.5},
        ],
    }  # fmt: skip
    dangling = talk("a", "b")
    dangling["messages"].append({"role": "user", "content": "and?"})
    data = [GOOD, BAD, with_tools, {"prompt": "p", "completion": "c"}, dangling, talk("hi", "<think>t</think>yo")]
    path, out = write(tmp_path, data), tmp_path / "fixed.jsonl"
    done = look(path, "--write_fixed", out)
    assert done.returncode == 0 and done.stderr.endswith(f"note: wrote {out}: 5 conversations\n")
    assert "1 of 6 samples left out" in done.stderr
    fixed = read(out)
    assert list(fixed) == list(read(path, bad_samples="drop")) and len(fixed) == 5
    assert json.loads(out.read_text().splitlines()[0]) == {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    again = look(out)
    assert again.returncode == 0, again.stderr
    for wrong in (path, out, tmp_path / "nowhere" / "x.jsonl"):
        done = look(path, "--write_fixed", wrong)
        assert done.returncode == 2 and f"--write_fixed {wrong}: " in done.stderr
    assert json.loads(path.read_text()) == data and not list(tmp_path.glob("*.unfinished"))


def test_help(look):
    done = look("--help")
    assert done.returncode == 0 and "--write_fixed OUT.jsonl" in done.stdout and max(map(len, done.stdout.splitlines())) <= 130
    assert look().returncode == 2


def test_a_file_that_is_not_there_is_said_at_once(look, tmp_path):
    """Before transformers is imported, and in the program's own words."""
    done = look("nothing.json:0.3", write(tmp_path, MANY), "neither.json")
    lines = [f"error: {name}: no such file - give the path of one that exists" for name in ("nothing.json", "neither.json")]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", lines)
