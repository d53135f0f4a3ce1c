"""What is written as JSON is JSON: one writer, and every other json.dumps of the sources is no file, or has only texts in it."""

import ast
import json
import math
from pathlib import Path

import pytest

from finetune import json_text

FINETUNE = Path(__file__).parent.parent / "finetune"
MESSAGE, HASH, LEARNED = "a line that is printed, or a message between processes", "what a hash is taken of", "text that a model learns"
# every json.dump and json.dumps beside json_text.py, by file and function, and what it is for
OTHERS = {
    place: what
    for what, places in {
        MESSAGE: """
            errors.py:tell samples/hard_limit.py:command data_files/sample_files.py:_layout folders/quant_settings.py:of_folder
            distributed/agent.py:end distributed/ranks.py:exchange distributed/ranks.py:first_wish
            distributed/deepspeed_file.py:deepspeed_config conversations/tool_spellings.py:_tool conversations/tool_spellings.py:_call
        """,
        HASH: """
            folders/fingerprints.py:of_adapter writing/durable.py:as_bytes samples/rendering.py:identity_of
            samples/sample_store.py:_tokenizer_hash samples/sample_store.py:hash_of_meta samples/sample_store.py:key_of
        """,
        LEARNED: "ask/tools.py:written conversations/tool_spellings.py:as_json",
    }.items()
    for place in places.split()
}


def found() -> set[str]:
    """FILE:FUNCTION of each."""
    calls = set()
    for path in sorted(FINETUNE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and getattr(node.value, "id", "") in ("json", "orjson", "ujson"):
                around = [each for each in functions if each.lineno <= node.lineno <= each.end_lineno]
                function = max(around, key=lambda each: each.lineno).name if around else ""
                calls.add(f"{path.relative_to(FINETUNE)}:{function}")
            if isinstance(node, ast.ImportFrom) and node.module == "json":
                assert not {"dump", "dumps"} & {alias.name for alias in node.names}, path
    return calls


def test_there_is_one_writer():
    assert found() - {"json_text.py:dumps"} == set(OTHERS)


def test_what_is_no_number_becomes_text(tmp_path):
    value = {"a": [math.nan, (math.inf, -math.inf, 1.5)], "b": {"c": None, "d": True, "e": 3}, "é": "中"}
    json_text.write(tmp_path / "file", value)
    text = (tmp_path / "file").read_text(encoding="utf-8")
    assert "é" in text and "中" in text and text.endswith("}\n")
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"a": ["nan", ["inf", "-inf", 1.5]], "b": {"c": None, "d": True, "e": 3}, "é": "中"}


def test_half_a_pair_of_utf_16(tmp_path):
    json_text.write(tmp_path / "file", {"a\ud800": "é\udcff"})
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == {"a\ud800": "é\udcff"}
