"""What a newcomer types first: --help of the scripts, setup_env.sh sourced, programs started with another Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bash(*words: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, words)], capture_output=True, text=True, timeout=60, **settings)


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", ["setup_env.sh", "quickstart.sh", "tests/run.sh"])
def test_help_explains_and_does_nothing_else(tmp_path, name, option):
    copy = tmp_path / name
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / name, copy)
    done = bash(copy, option)
    assert (done.returncode, done.stderr) == (0, "")
    first = (ROOT / name).read_text().splitlines()[1]
    assert done.stdout.startswith(first.removeprefix("# ")) and "BASH_VERSION" not in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [copy]


@pytest.mark.parametrize("name", ["setup_env.sh", "quickstart.sh"])
def test_words_that_are_no_option_are_refused(tmp_path, name):
    shutil.copy(ROOT / name, tmp_path)
    done = bash(tmp_path / name, "all")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {name} takes no arguments: all\n")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh"])
def test_sourced_it_says_so_and_leaves_the_shell_as_it_was(tmp_path, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    shutil.copy(ROOT / "setup_env.sh", tmp_path)
    show = "set | grep -E '^(root|venv|log|without_compiler)='; echo options: $-"
    before = subprocess.run([shell, "-c", show], cwd=tmp_path, capture_output=True, text=True).stdout
    line = f". ./setup_env.sh; code=$?; {show}; exit $code"
    done = subprocess.run([shell, "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, before)
    assert done.stderr.startswith("error: setup_env.sh is to be run, not sourced: bash setup_env.sh")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_to_setup_env_is_run(tmp_path):
    (tmp_path / "setup").symlink_to(ROOT / "setup_env.sh")
    done = bash(tmp_path / "setup", env=os.environ | {"FINETUNE_PYTHON": sys.executable})
    assert (done.returncode, done.stdout) == (0, f"{sys.executable}\n"), done.stderr


@pytest.mark.parametrize("words", [
    "finetune.py --help", "finetune.py -m MODEL -d data/example.json -o OUT", "run_gptq.py -m MODEL -d data/example.json -o OUT",
    "-m finetune.ask MODEL", "-m finetune.merge ADAPTER OUT", "-m finetune.compare MODEL OTHER", "-m finetune.export MODEL OUT --to qwen2",
])  # fmt: skip
def test_a_python_without_torch_is_told_in_one_line(words):
    """-S leaves out site-packages."""
    done = subprocess.run([sys.executable, "-S", *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    beginning = f"error: {sys.executable} has no torch, transformers, accelerate, peft, tiktoken - bash "
    assert done.stderr.startswith(beginning) and done.stderr.count("\n") == 1
    assert f"{ROOT}/setup_env.sh makes an environment with all that is needed" in done.stderr
