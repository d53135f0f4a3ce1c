"""--dry_run: what it says is what the run then does, and it leaves nothing behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from tiny import small_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def start(base, tmp_path):
    """start(*flags, words=...) -> a finished process, in a folder of the test."""
    talks = [
        {"conversations": [{"from": "user", "value": f"What is {i}?"}, {"from": "assistant", "value": f"It is {i}. " * (i % 7 + 1)}]}
        for i in range(30)
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(talks), encoding="utf-8")

    def run(*flags, words=(ROOT / "finetune.py",), **environment):
        command = [warm.python(), *words, "-m", base, "-d", data, "-o", tmp_path / "out", *flags]
        environment = os.environ | {"FINETUNE_CACHE": str(tmp_path / "cache"), "COLUMNS": "80"} | environment
        return subprocess.run([str(word) for word in command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def rows(text: str) -> dict[str, str]:
    """{name: text} of the rows, unwrapped."""
    unwrapped = re.sub(r"\n {13}", " ", text)
    return dict(re.findall(r"^  (\w[\w ]*?) {2,}(\S.*)$", unwrapped, re.MULTILINE))


STEP = ("--per_device_train_batch_size", "8", "--max_tokens_per_pass", "150", "--num_train_epochs", "2", "--save_strategy", "no")


def test_steps_passes_and_cuts_are_those_of_the_run(start, tmp_path):
    flags = (*STEP, "--model_max_length", "60", "--use_lora")
    looked = start(*flags, "--dry_run")
    assert looked.returncode == 0, looked.stderr
    assert not (tmp_path / "out").exists() and all(len(line) <= 80 or "/" in line for line in looked.stdout.splitlines())  # paths are not broken
    said = rows(looked.stdout)
    done = start(*flags)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    passes = [line["passes"] for line in log if "loss" in line]
    assert said["steps"] == f"{len(passes)} (4 an epoch, 8 samples each)"
    assert said["passes"].startswith(f"{sum(passes[:4])} an epoch, {sum(passes[:4]) / 4:.1f} a step; ")
    assert max(passes) > 1 and " at most (limit 150)" in said["passes"]
    cut = re.search(r"(\d+ samples cut to 60 tokens [^\n]*)", done.stderr)[1]
    assert cut in " ".join(looked.stdout.split()) and "samples cut" not in looked.stderr
    shown = re.search(r"^  data .*: (30 samples, .* tokens), ", done.stderr, re.MULTILINE)[1]
    assert said["samples"] == "30" and shown == f"30 samples, {said['tokens'].split(', ')[0]} tokens"
    trained = sum(int(part.replace(",", "")) for part in re.findall(r"Sample [\d,]+.*: .*, ([\d,]+) of them learned", looked.stdout))
    assert trained > 0 and looked.stdout.count("┃") >= 3


@pytest.mark.parametrize("flags", [["--use_lora"], []])
def test_for_a_gpu_that_is_not_here(start, flags):
    said = rows(start(*STEP, *flags, "--bf16", "--dry_run", "--gpu_memory", "24").stdout)
    assert "bfloat16 on a GPU that is not here" in said["method"] and "24.0 GB given: fits" in said["memory"]
    assert "main memory about 3.0 GB" in said["memory"] and "TFLOP/s" in said["time"] and "to fit" not in said
    said = rows(start(*STEP, *flags, "--bf16", "--dry_run", "--gpu_memory", "0.5").stdout)
    assert "does not fit" in said["memory"] and said["to fit"].startswith("no flag brings it down")


def test_the_page_is_written_where_asked(start, tmp_path):
    done = start(*STEP, "--dry_run", "--html", "look.html")
    assert done.returncode == 0 and done.stderr.endswith("note: the same as a page: look.html\n")
    page = (tmp_path / "look.html").read_text(encoding="utf-8")
    inside = json.loads(page.split('id="look">', 1)[1].split("</script>", 1)[0])
    assert dict(inside["rows"])["samples"] == "30" and len(inside["shown"]) == 30
    done = start(*STEP, "--dry_run", "--html", "nowhere/look.html")
    assert done.returncode == 2 and "--html nowhere/look.html: cannot be written" in done.stderr


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--html", "a.html"], "--html a.html: belongs to a look before the run - add --dry_run, or leave it out"),
        (["--gpu_memory", "24"], "--gpu_memory 24.0: belongs to a look before the run - add --dry_run, or leave it out"),
        (["--dry_run", "--gpu_memory", "-1"], "--gpu_memory -1.0: out of range - give the GB of a GPU, as 24"),
        (["--dry_run", "--gpu_memory", "nan"], "--gpu_memory nan: out of range - give the GB of a GPU, as 24"),
    ],
)
def test_what_belongs_together(start, flags, expected):
    done = start("--model_max_length", "64", *flags)
    assert (done.returncode, done.stderr) == (2, f"error: {expected}\n")


def test_what_is_wrong_ends_it_as_it_ends_a_run(start, tmp_path):
    (tmp_path / "bad.json").write_text('[{"conversations": []}]')
    looked = start("-d", "bad.json", "--dry_run")
    assert looked.returncode == 2 and "sample 1: empty conversation" in looked.stderr and looked.stdout == ""


def test_through_a_script(start, tmp_path):
    script = ROOT / "finetune" / "finetune_full_single_gpu.sh"
    done = subprocess.run(
        ["bash", str(script), "-m", str(tmp_path / "none"), "-d", "none.json", "--dry_run", "--gpu_memory", "24"],
        cwd=tmp_path, env=os.environ | {"DRY_RUN": "1", "FINETUNE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "planning for the GPU of --gpu_memory" in done.stderr
    assert "--bf16 False" not in done.stdout and "--bf16 True" in done.stdout
