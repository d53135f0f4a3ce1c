"""Whatever JSON a file holds: conversations, or findings in printable lines; never a traceback, and bounded time and memory.

FAULTS=all draws 20,000 files, 4,000 without.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talks import write

from finetune.conversations import forms, keys
from finetune.conversations.messages import Conversation
from finetune.conversations.reading import read
from finetune.conversations.turns import ROLES
from finetune.errors import UserError

MANY = 20_000 if os.environ.get("FAULTS") == "all" else 4_000
TOP = [*forms.TURNS, *forms.SINGLE_KEYS, forms.HISTORY, *keys.BESIDE_TURNS, *forms.NO_FORM, "Question", "x\x1b[31m\u202e"]
ON_TURNS = [*forms.SPEAKERS, *forms.TEXTS, *keys.ON_TURN, *forms.SINGLE_KEYS, "name"]
TEXTS = ["", " ", "a", "<think>t</think>b", "<think>", "<image>", "<tool_call>{}</tool_call>", "\x1b[31m\x07\r\x85", "\ud83d", "[]", '[{"role": "user"}]',
         "{{name}}", "<tools>[]</tools>", "é\u0301", "k" * 500, *ROLES]  # fmt: skip
leaf = st.sampled_from([None, True, False, 0, 1, -1, 0.5, 1e400, 10**400, *TEXTS]) | st.text(max_size=6)
small = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ON_TURNS) | st.text(max_size=3), inner, max_size=4), max_leaves=6)
good_turn = st.sampled_from([{"role": role, "content": text} for role in ("user", "assistant", "system", "tool") for text in ("q", "a")])
turn = st.dictionaries(st.sampled_from(ON_TURNS), small, max_size=4) | good_turn | st.builds(
    lambda role, text, more: {"role": role, "content": text} | more,
    st.sampled_from([*ROLES, "narrator"]), small, st.dictionaries(st.sampled_from(ON_TURNS), small, max_size=2),
)  # fmt: skip
several = st.lists(turn | good_turn, max_size=5)
sample = small | several | st.dictionaries(st.sampled_from(TOP), several | small, max_size=4)
files = sample | st.lists(sample, max_size=4)


def check(folder: Path, data: object) -> None:
    path = write(folder, json.dumps(data).encode())
    for bad_samples in ("error", "drop"):
        try:
            conversations = read(path, bad_samples=bad_samples)
        except UserError as error:
            assert error.findings and len(error.findings) <= 60
            for line in error.findings:
                assert line.startswith(str(path)) or line.startswith("--data_path"), line
                assert len(line) < 3000 and line.isprintable(), line
            continue
        found = list(conversations)
        assert len(found) == len(conversations) > 0 and all(line.isprintable() for line in conversations.notes)
        for messages, tools in found:
            assert isinstance(tools, list) and messages[-1]["role"] in ("assistant",)
            json.dumps(Conversation(messages, tools))
            assert all(isinstance(message["content"], str) for message in messages)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(files)
def test_anything(tmp_path_factory, data):
    check(tmp_path_factory.getbasetemp(), data)


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(files)
def test_many_of_anything(tmp_path_factory, data):
    check(tmp_path_factory.getbasetemp(), data)


# ---- many bad samples

BAD = {
    "all alike": lambda i: {"conversatoins": [{"from": "user", "value": "a question"}], "id": 1, "source": "somewhere else"},
    "each another": lambda i: {f"key {i}": [{"from": f"role {i}", "value": "a question of some length, and more"}], "x": i},
    "preferences": lambda i: {"prompt": f"a question {i}", "chosen": "a good answer to it", "rejected": "no answer at all"},
    "each another role": lambda i: {"messages": [{"role": f"role {i}", "content": "a question of some length and then some more"}]},
}
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from finetune.conversations.reading import read
from finetune.errors import UserError
from finetune.memory.peak_memory import resident_gb
begin = time.process_time()
try:
    read(sys.argv[2])
except UserError as error:
    print(len(error.findings))
print(time.process_time() - begin, resident_gb() * 1e3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["list", "lines"])
@pytest.mark.parametrize("name", BAD)
def test_600_000_bad_samples_are_refused_soon(tmp_path, name, layout):
    """A file of 60 MB, within 300 MB and 10 s."""
    rows = (json.dumps(BAD[name](i)) for i in range(600_000))
    path = tmp_path / "bad.json"
    with path.open("w") as file:
        file.write("[" * (layout == "list") + ("," if layout == "list" else "\n").join(rows) + "]" * (layout == "list"))
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", PROGRAM, root, path], capture_output=True, text=True, check=True)
    findings, figures = done.stdout.splitlines()
    seconds, megabytes = map(float, figures.split())
    assert int(findings) <= 22 and seconds < 10 and megabytes < 300, (findings, seconds, megabytes)
