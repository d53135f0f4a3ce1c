"""The page of what goes wrong says what the program says: its lines, its exit codes, its flags."""

import re
from pathlib import Path

import pytest

from finetune import errors
from finetune.distributed import agent
from finetune.steps import self_tests

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "when_something_goes_wrong.md").read_text(encoding="utf-8")
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "finetune").rglob("*.py")))
OF_OTHERS = {"--base"}  # flags of the programs beside finetune.py
NAMES = ("checkpoint-", "packing", "adapter")  # that stand in a line for a name of any kind


def rows(title: str) -> list[list[str]]:
    """The cells of the table in a section, without its head."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_every_flag_is_one():
    """Fields of the dataclasses of flags, by their sources."""
    for word in sorted(set(re.findall(r"--[a-z0-9_]+", PAGE)) - OF_OTHERS):
        assert f"    {word[2:]}: " in SOURCES, word


@pytest.mark.parametrize("line", [row[0] for row in rows("Lines, and what to do")])
def test_every_line_is_said_somewhere(line):
    """What stands between numbers, names and dots is found in the sources, which break long texts into several."""
    sources = re.sub(r'"\s*\n\s*f?"', "", SOURCES)
    sources = re.sub(r"\{[^{}]*\}", "#", sources)
    for part in re.split("|".join(map(re.escape, ("...", "`", "nan", *NAMES))) + r"|\d+", line):
        assert (part := part.strip(" ():-")) in sources, part


def test_the_exit_codes():
    told = {int(code): row[1] for row in rows("Exit codes") for code in row[0].split(", ")}
    assert errors.STOPPED in told and agent.USER_ERROR in told
    signals = {128 + number for number in errors.STOP_SIGNALS}
    assert signals <= set(told) and {0, 1, 137} <= set(told)


def test_the_self_tests_are_named():
    for name in [self_tests.KERNELS, *self_tests.TESTS]:
        assert f"`{name}`" in PAGE
