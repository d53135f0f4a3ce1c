"""Every import goes down, as .importlinter has it: the contract holds, and breaks for an import that goes up."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
FLOORS = "Imports between the wings go down"
CIRCLES = "No circle of imports, between files or between wings"
MODEL = "The bundled model knows nothing of the toolkit, of peft or of DeepSpeed"


def lint(folder: Path) -> tuple[int, str]:
    """(exit code, what is printed) of lint-imports over the packages in a folder."""
    command = [sys.executable, "-c", LINT, "--no-cache"]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path) -> Path:
    for name in ("finetune", "qwen_model"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


def test_every_import_goes_down():
    code, said = lint(ROOT)
    assert code == 0 and "3 kept, 0 broken" in said, said


def test_imports_that_go_up_are_found_inside_functions_too(copied):
    planted = {
        "finetune/conversations/reading.py": "from ..steps import plan",
        "finetune/folders/config_files.py": "from . import model_folder",
        "qwen_model/chatml.py": "from peft import LoraConfig",
    }
    for name, line in planted.items():
        with (copied / name).open("a", encoding="utf-8") as file:
            file.write(f"\n\ndef late():\n    {line}\n")
    code, said = lint(copied)
    assert code == 1, said
    for contract in (FLOORS, CIRCLES, MODEL):
        assert f"{contract} BROKEN" in said, said
    assert "finetune.conversations.reading -> finetune.steps.plan" in said, said


def test_a_wing_without_a_floor_is_found(copied):
    (copied / "finetune" / "annex.py").write_text('"""Belongs nowhere."""\n')
    code, said = lint(copied)
    assert code == 1 and f"{FLOORS} BROKEN" in said and "annex" in said, said


def test_wings_say_what_they_are_for_and_forward_nothing():
    wings = sorted(path for path in (ROOT / "finetune").glob("*/__init__.py"))
    assert len(wings) == 20
    for path in [ROOT / "finetune" / "__init__.py", *wings]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == 1 and lines[0].startswith('"""') and lines[0].endswith('."""'), path


def test_files_lie_in_wings_and_stay_short():
    loose = {path.name for path in (ROOT / "finetune").glob("*.py")}
    assert loose == {"__init__.py", "errors.py", "hashing.py", "json_text.py", "quiet.py", "refresh.py"}
    files = [*(ROOT / "finetune").rglob("*.py"), *(ROOT / "qwen_model").glob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {path.name: length for path, length in lengths.items() if length > 400}
    assert len((ROOT / "finetune.py").read_text(encoding="utf-8").splitlines()) <= 120


def layers() -> list[str]:
    """The floors of .importlinter, from the top."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / ".importlinter")
    return settings["importlinter:contract:floors"]["layers"].split()


def test_the_maps_show_every_floor():
    contributing, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "README.md"))
    assert " > ".join([*layers(), "qwen_model"]) in contributing
    places = readme.split("## Where is what")[1].split("\n## ")[0]
    assert not [name for name in layers() if f"`finetune/{name}/`" not in places and f"{name}/`" not in places and f"{name}.py`" not in places]


def test_the_map_names_files_that_are_there():
    """Paths in CONTRIBUTING.md's map are from the top, or from finetune/."""
    places = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things go")[1].split("\n## ")[0]
    paths = re.findall(r"`([\w/.]+/[\w.]+\.\w+)`", places)
    assert len(paths) > 40 and not [path for path in paths if not (ROOT / path).exists() and not (ROOT / "finetune" / path).exists()]
