"""Calls that stand in an answer as text: a table of forms, and the real templates of later Qwens, written and read again."""

import random
from pathlib import Path

import pytest

from finetune.conversations.messages import call
from finetune.conversations.tool_text import split_calls

TEMPLATES = Path(__file__).parent.parent.parent.parent / "shared" / "templates"
NAMES = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink")


def hermes(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


def function(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


PARIS = hermes('{"name": "f", "arguments": {"city": "Paris"}}')
CALL = call("f", {"city": "Paris"})
READ = {
    "one": (PARIS, ("", [CALL])),
    "a thought before": (f"Let me look.\n\n{PARIS}", ("Let me look.", [CALL])),
    "two": (f"{PARIS}\n{PARIS}\n", ("", [CALL, CALL])),
    "two, side by side": (PARIS + PARIS, ("", [CALL, CALL])),
    "on one line": (PARIS.replace("\n", ""), ("", [CALL])),
    "over several lines": (PARIS.replace(", ", ",\n "), ("", [CALL])),
    "no arguments": (hermes('{"name": "f"}'), ("", [call("f", {})])),
    "arguments as a string": (hermes('{"name": "f", "arguments": "{\\"x\\": 1}"}'), ("", [call("f", {"x": 1})])),
    "tags in an argument": (
        hermes('{"name": "f", "arguments": {"x": "</tool_call>\\n<tool_call>"}}'), ("", [call("f", {"x": "</tool_call>\n<tool_call>"})])
    ),
    "the tag in the text": (f"I write <tool_call> now.\n{PARIS}", ("I write <tool_call> now.", [CALL])),
    "function": (function("f", city="Paris"), ("", [CALL])),
    "function without parameters": (function("f"), ("", [call("f", {})])),
    "function on one line": ("<tool_call><function=f><parameter=x>1</parameter></function></tool_call>", ("", [call("f", {"x": 1})])),
    "several lines in a value": (function("f", x="a\n\nb\n"), ("", [call("f", {"x": "a\n\nb\n"})])),
    "tags in a value": (function("f", x="</parameter> </function> </parameter>\n</tool_call>", y="1"), (
        "", [call("f", {"x": "</parameter> </function> </parameter>\n</tool_call>", "y": 1})]
    )),
    "values": (
        function("f", a="1", b="2.5", c="True", d="null", e='["x"]', f='{"y": 1}', g='"q"', h="", i="x y"),
        ("", [call("f", {"a": 1, "b": 2.5, "c": True, "d": None, "e": ["x"], "f": {"y": 1}, "g": '"q"', "h": "", "i": "x y"})]),
    ),
}  # fmt: skip
NO_CALLS = {
    "no call": "It is warm.",
    "text behind": f"{PARIS}\nThere.",
    "not closed": PARIS.removesuffix("</tool_call>"),
    "not JSON": hermes("{'name': 'f'}"),
    "no name": hermes('{"arguments": {}}'),
    "a list": hermes('["f"]'),
    "a name that is none": hermes('{"name": 5, "arguments": {}}'),
    "arguments that are none": hermes('{"name": "f", "arguments": [1]}'),
    "text inside": hermes('{"name": "f"} and more'),
    "one of two": f"{PARIS}\n{hermes('{')}",
    "a function that does not end": function("f", x="1").replace("</function>", ""),
    "text between parameters": function("f", x="1").replace("</function>", "and</function>"),
    "nested": hermes("[" * 100_000),
}


@pytest.mark.parametrize("name", READ)
def test_calls(name):
    text, expected = READ[name]
    assert split_calls(text) == expected


@pytest.mark.parametrize("name", NO_CALLS)
def test_what_is_no_call_stays_text(name):
    assert split_calls(NO_CALLS[name]) == (NO_CALLS[name], [])


def tool(**types) -> dict:
    properties = {key: {"type": kind} for key, kind in types.items()}
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}


@pytest.mark.parametrize(
    "text, types, value",
    [
        ("5", "string", "5"), ("null", "string", "null"), ("[1]", "string", "[1]"), ("5", "integer", 5), ("5", "number", 5),
        ("True", "boolean", True), ("false", "boolean", False), ("None", ["string", "null"], None), ("5", ["string", "null"], "5"),
        ("True", ["string", "boolean"], True), ("five", "integer", "five"), ("[1]", "array", [1]), ("5", None, 5), ("5", 7, 5),
    ],
)  # fmt: skip
def test_the_types_of_a_tool_count(text, types, value):
    assert split_calls(function("f", x=text), [tool(x=types)]) == ("", [call("f", {"x": value})])
    assert split_calls(function("f", x=text), [tool(x=types)["function"]])[1] == [call("f", {"x": value})]


@pytest.mark.parametrize("broken", [{}, {"function": {}}, {"name": "f", "parameters": []}, {"name": "f", "parameters": {"properties": 5}}])
def test_tools_without_types(broken):
    assert split_calls(function("f", x="5"), [broken]) == ("", [call("f", {"x": 5})])


# ---- the real templates


TEXTS = ["Paris", "5", "True", "null", "", " a ", "a\nb", '"q"', "{}", "<tool_call>", "</parameter>", "</tool_call>\n", "天气 👩‍👩‍👧", "\\n", "'"]
TOOL = tool(text="string", number="number", flag="boolean", items="array", more="object", some=["string", "null"])


def made_calls(draw: random.Random) -> list[dict]:
    values = {
        "text": draw.choice(TEXTS), "number": draw.choice([0, -5, 2.5, 1e30, 10**20]), "flag": draw.choice([True, False]),
        "items": draw.choices(TEXTS, k=2), "more": {"x": draw.choice(TEXTS), "y": None}, "some": draw.choice([None, "Paris"]),
    }  # fmt: skip
    return [call("f", {key: values[key] for key in draw.sample(list(values), draw.randrange(5))}) for _ in range(draw.randrange(1, 4))]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_writes_is_read(name):
    if not (TEMPLATES / f"{name}.jinja").exists():
        pytest.skip("the templates are not here")
    from transformers.utils.chat_template_utils import render_jinja_template

    template, draw = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), random.Random(0)
    for _ in range(300):
        content, calls = draw.choice(["", "Let me look.", "I write <tool_call>."]), made_calls(draw)
        asked = [{"role": "user", "content": "?"}]
        answer = {"role": "assistant", "content": content, "tool_calls": calls}
        (text,), _ = render_jinja_template([[*asked, answer]], tools=[TOOL], chat_template=template)
        written = text.rsplit("<|im_start|>assistant\n", 1)[1].removesuffix("<|im_end|>\n").split("</think>\n\n")[-1]
        assert split_calls(written, [TOOL]) == (content, calls)
