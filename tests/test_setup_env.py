"""setup_env.sh in a folder of its own, without a network: what it makes, keeps, resumes and refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import PYTHON, program

ROOT = Path(__file__).parent.parent


class Kit:
    """A folder with setup_env.sh and a requirements.txt."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.venv_python = folder / ".venv" / "bin" / "python"

    def require(self, *lines: str) -> None:
        (self.folder / "requirements.txt").write_text("".join(f"{line}\n" for line in lines))

    def run(self, **environment) -> subprocess.CompletedProcess:
        """setup_env.sh, started from the folder above."""
        inherited = {key: value for key, value in os.environ.items() if key != "FINETUNE_PYTHON"}
        environment = inherited | {"PIP_NO_INDEX": "1"} | environment
        command = ["bash", str(self.folder / "setup_env.sh")]
        folder = self.folder.parent
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def kit(tmp_path):
    """One without .venv."""
    kit = Kit(tmp_path / "my kit")
    kit.folder.mkdir()
    shutil.copy(ROOT / "setup_env.sh", kit.folder)
    kit.require("# nothing yet")
    return kit


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """(kit, what the first run printed). A kill in the middle of `python -m venv` had left one without pip."""
    kit = Kit(tmp_path_factory.mktemp("setup") / "my kit")
    kit.folder.mkdir()
    shutil.copy(ROOT / "setup_env.sh", kit.folder)
    kit.require("# nothing yet")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", kit.folder / ".venv"], check=True)
    return kit, kit.run()


@pytest.fixture
def made(first_run, kit):
    """One with a .venv, copied from the first run."""
    shutil.copytree(first_run[0].folder / ".venv", kit.folder / ".venv", symlinks=True)
    return kit


def test_the_first_run(first_run):
    kit, done = first_run
    assert (done.returncode, done.stdout) == (0, f"{kit.venv_python}\n"), done.stderr
    assert "setup: making .venv with Python 3" in done.stderr and "setup: done" in done.stderr
    show = "import sys, pip; print(sys.prefix)"
    prefix = subprocess.run([kit.venv_python, "-c", show], capture_output=True, text=True).stdout
    assert prefix == f"{kit.folder / '.venv'}\n"


def test_the_second_run_does_nothing(made):
    done = made.run()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{made.venv_python}\n", "")


def test_changed_requirements_are_installed_and_a_failure_does_not_count_as_done(made):
    made.require("# nothing yet", "./no such folder")
    for _ in range(2):
        broken = made.run()
        assert (broken.returncode, broken.stdout) == (2, "")
        assert "no such folder" in broken.stderr and "error: the installation stopped" in broken.stderr
        assert "making .venv" not in broken.stderr
    made.require("pip")
    mended = made.run()
    assert mended.returncode == 0 and "setup: installing" in mended.stderr
    assert "already satisfied: pip" in (made.folder / ".venv" / "install.log").read_text()


def test_without_a_compiler_the_compiled_package_is_left_out_until_there_is_one(made):
    """gptqmodel in a version that does not exist: asking pip for it fails, so leaving it out shows."""
    made.require("pip", "gptqmodel==0.0.0")
    without = made.run(CC="/no/such/compiler")
    assert without.returncode == 0, without.stderr
    assert "no C compiler" in without.stderr and "gptqmodel is left out" in without.stderr
    assert made.run(CC="/no/such/compiler").stderr == ""
    if subprocess.run([made.venv_python, "-c", HAS_HEADERS]).returncode == 0:
        with_one = made.run(CC="sh")  # any program that exists: it is only looked for
        assert with_one.returncode == 2 and "gptqmodel==0.0.0" in with_one.stderr


HAS_HEADERS = "import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()['include'] + '/Python.h'))"


def old_machine(tmp_path, python3: str) -> str:
    """A PATH on which python3 is the given shell program, and there is no other Python."""
    folder = tmp_path / "bin"
    program(folder / "python3", f"#!/bin/sh\n{python3}\n")
    for name in ("bash", "dirname", "readlink", "cat", "grep", "tail", "mv"):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def test_an_old_python_is_named(kit, tmp_path):
    done = kit.run(PATH=old_machine(tmp_path, '[ "$1" = --version ] && echo Python 3.9.2; exit 1'))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no Python 3.11, 3.12 or 3.13 here (python3 is: Python 3.9.2) - ")
    assert not (kit.folder / ".venv").exists()


def test_debians_python_without_its_venv_package(kit, tmp_path):
    """There ensurepip is missing, and `python3 -m venv` fails half-way."""
    done = kit.run(PATH=old_machine(tmp_path, f'case "$2" in *ensurepip*) exit 1;; esac; exec {PYTHON} "$@"'))
    assert done.returncode == 2
    assert "apt-get install python3-venv" in done.stderr
    assert not (kit.folder / ".venv").exists()


def test_a_python_of_the_users_own_is_used_as_it_is(kit):
    done = kit.run(FINETUNE_PYTHON=sys.executable)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{sys.executable}\n", "")
    assert not (kit.folder / ".venv").exists()
    missing = kit.run(FINETUNE_PYTHON="/no/such/python")
    assert (missing.returncode, missing.stderr) == (2, "error: FINETUNE_PYTHON=/no/such/python is not a program\n")
