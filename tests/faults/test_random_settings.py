"""Settings files of a model or an adapter with anything in the place of a value: what comes before weights ends in lines, or in a good folder.

FAULTS=all draws 4,000 a kind of folder; 150 under `slow`, 30 otherwise.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from command_lines import write_adapter
from tiny import small_checkpoint, tiny_later_qwen

from finetune.errors import UserError
from finetune.folders import adapter_files, adapter_folder, model_folder
from finetune.model import loading, whole_base

MANY = 4000 if os.environ.get("FAULTS") == "all" else 150
ANYTHING = (
    None, True, False, -1, 0, 1, 2, 10**30, 0.5, -1e308, float("nan"), float("inf"), "", "x", "x" * 5000, "\x1b[2J", "../x", "\ud800", [], [0],
    ["x"], [[[]]], {}, {"x": 1}, {"0": {"content": 3}}, "qwen", "qwen2", "float16", [1, 2, 3], 151643, "{% for i in x %}",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: a whole folder}"""
    place = tmp_path_factory.mktemp("settings")
    return {
        "qwen": small_checkpoint(place / "qwen"),
        "qwen2": tiny_later_qwen(place / "qwen2"),
        "adapter": write_adapter(place / "adapter"),
    }


def places(value, found=()):
    """Every place in a JSON value: where it stands, from the top."""
    yield found
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(entries)[:40]:
        yield from places(part, (*found, key))


def changed(content, draw: random.Random):
    """A copy with something else, something more or something less at one place."""
    content = json.loads(json.dumps(content))
    *above, last = draw.choice([place for place in places(content) if place])
    part = content
    for key in above:
        part = part[key]
    if draw.random() < 0.15:
        del part[last]
    else:
        part[last] = draw.choice(ANYTHING)
    return content


def look(folder: Path, kind: str) -> None:
    """All that is looked at before weights are loaded."""
    if kind == "adapter":
        adapter_files.check(folder)
        return adapter_folder.check_adapter(folder)
    findings = model_folder.problems(folder, may_be_quantized=True) or whole_base.problems(folder)
    if findings:
        raise UserError(*findings)
    loading.load_tokenizer(folder)


def check_many(folders, tmp_path, kind: str, count: int, seed: int) -> None:
    files = [path for path in sorted(folders[kind].glob("*.json")) if path.stat().st_size < 100_000]
    refused = 0
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        file = draw.choice(files)
        content = changed(json.loads(file.read_text()), draw)
        folder = shutil.copytree(folders[kind], tmp_path / f"{kind} {number}")
        (folder / file.name).write_text(json.dumps(content))
        try:
            look(folder, kind)
        except UserError as error:
            refused += 1
            assert error.findings and all(len(line) < 1500 and "\n" not in line for line in error.findings), (number, error.findings)
        except Exception as error:
            raise AssertionError(f"{kind}, draw {number}, {file.name}: {json.dumps(content)[:2000]}") from error
        shutil.rmtree(folder)
    assert refused > count // 20


@pytest.mark.parametrize("kind", ["qwen", "qwen2", "adapter"])
def test_a_few(folders, tmp_path, kind):
    check_many(folders, tmp_path, kind, 30, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen", "qwen2", "adapter"])
def test_many(folders, tmp_path, kind):
    check_many(folders, tmp_path, kind, MANY, seed=1)
