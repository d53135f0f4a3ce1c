"""Every published spelling of tools, calls and results is read into the one inner form."""

import json

import pytest
from talks import write
from tool_talks import (
    BARE,
    HERMES,
    IDS,
    ONE,
    PARIS,
    QWEN,
    ROME,
    SAID,
    TOOLS,
    TWO,
    UNREADABLE,
    A,
    Q,
    as_text,
    bare,
    block,
    calls,
    chat,
    result,
    shared,
)

from finetune.conversations.messages import Conversation, call
from finetune.conversations.reading import read

TYPED = {"name": "zip", "parameters": {"type": "object", "properties": {name: {"type": "string"} for name in "abc"}}}
XML = "<tool_call>\n<function=zip>\n<parameter=a>\n12345\n</parameter>\n<parameter=b>\ntrue\n</parameter>\n</function>\n</tool_call>"
QWENS_OWN = {"name_for_model": "sky", "name_for_human": "Himmel", "description_for_model": "d", "parameters": [{"name": "x"}]}


@pytest.mark.parametrize("where", ["beside", "text"])
def test_values_of_calls_in_text_have_the_types_of_the_tool(tmp_path, where):
    system = {"role": "system", "content": f"<tools>\n{json.dumps(TYPED)}\n</tools>"}
    sample = {"messages": [*([system] if where == "text" else []), Q, {"role": "assistant", "content": XML}]}
    sample |= {"tools": [TYPED]} if where == "beside" else {}
    (conversation,) = read(write(tmp_path, [sample]))
    assert conversation.messages[-1]["tool_calls"] == [call("zip", {"a": "12345", "b": "true"})]


def test_qwens_own_form_of_tools(tmp_path):
    """As first-generation Qwen's example has them: what the model is told stands in name_for_model."""
    sample = {"tools": [QWENS_OWN], "messages": [Q, calls(call("sky", {"x": 1}))]}
    (conversation,) = read(write(tmp_path, [sample]))
    (tool,) = conversation.tools
    assert tool["function"] == QWENS_OWN | {"name": "sky", "description": "d"}
    from qwen_model.react import render

    asked = render(conversation.messages, conversation.tools)[0]["content"]
    assert "sky: Call this tool to interact with the Himmel API. What is the Himmel API useful for? d Parameters: [" in asked


SPELLINGS = [  # a sample, and its messages in the inner form, with TOOLS
    (chat({"role": "system", "content": None}, Q, A), [Q, A]),  # null counts as absent
    # OpenAI
    (chat(Q, calls(PARIS), {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, calls(as_text(PARIS)), {"role": "tool", "content": "sun", "name": "sky"}, A), ONE),
    (chat(Q, calls(as_text(PARIS), content=None), {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, {"role": "assistant", "tool_calls": [PARIS]}, {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, {"role": "assistant", "tool_calls": json.dumps([PARIS])}, {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, calls(PARIS["function"]), {"role": "tool", "content": "sun"}, A), ONE),
    (
        chat(
            Q,
            calls(*IDS),
            {"role": "tool", "tool_call_id": "2", "content": "blue"},
            {"role": "tool", "tool_call_id": "1", "content": "sun"},
            A,
        ),
        TWO,
    ),
    (
        chat(
            Q, calls(*IDS), {"role": "tool", "tool_call_id": "2", "content": "blue"}, {"role": "tool", "content": "sun"}, A
        ),
        TWO,
    ),
    (chat(Q, calls(PARIS, ROME), {"role": "tool", "content": "sun"}, {"role": "tool", "content": "blue"}, A), TWO),
    (chat(Q, calls(*IDS)), [Q, calls(PARIS, ROME)]),  # the call is the answer to learn
    (
        chat(Q, calls(PARIS), result("sun"), calls(ROME), result("blue", "sea"), A),
        [*ONE[:3], calls(ROME), result("blue", "sea"), A],
    ),
    (chat(Q, SAID, result("sun"), A), [Q, SAID, *ONE[2:]]),
    (
        chat(Q, calls(PARIS, weight=0, reasoning_content="x"), result("sun"), A),
        [Q, calls(PARIS, weight=0.0, reasoning_content="x"), *ONE[2:]],
    ),
    (chat(Q, A), [Q, A]),  # when not to call
    (chat(Q, calls(PARIS), result("sun"), A, tools=BARE), ONE),
    (chat(Q, calls(PARIS), result("sun"), A, tools=json.dumps(TOOLS)), ONE),
    (chat(Q, calls(PARIS), result("sun"), A, tools=[json.dumps(tool) for tool in BARE]), ONE),
    (chat(Q, calls(PARIS), result("sun"), A, tools=[{"type": "function"} | tool for tool in BARE]), ONE),
    (chat({"role": "system", "content": "s", "tools": TOOLS}, *ONE, tools=None), [{"role": "system", "content": "s"}, *ONE]),
    # arguments and results
    (
        chat(Q, calls({"function": {"name": "sky", "arguments": ""}}), result("sun"), A),
        [Q, calls(call("sky", {})), *ONE[2:]],
    ),
    (chat(Q, calls({"function": {"name": "sky"}}), result("sun"), A), [Q, calls(call("sky", {})), *ONE[2:]]),
    (
        chat(Q, calls(call("sky", {"a": None, "b": {"c": None}})), result(""), A),
        [Q, calls(call("sky", {"b": {}})), result(""), A],
    ),
    (chat(Q, calls(as_text(call("sky", {"a": None}))), result(""), A), [Q, calls(call("sky", {"a": None})), result(""), A]),
    (chat(Q, calls(PARIS), result({"t": 5, "城": None}), A), [Q, calls(PARIS), result('{"t": 5, "城": null}'), A]),
    (chat(Q, calls(PARIS), result([1, "x"]), A), [Q, calls(PARIS), result('[1, "x"]'), A]),
    (chat(Q, calls(PARIS), result([{"type": "text", "text": "s"}, {"type": "text", "text": "un"}]), A), ONE),
    (
        chat(Q, calls(PARIS), result([{"type": "file", "name": "a"}, {"type": "text", "name": "b"}]), A),
        [Q, calls(PARIS), result('[{"type": "file", "name": "a"}, {"type": "text", "name": "b"}]'), A],
    ),
    (chat(Q, calls(PARIS), result([{"file": "a"}]), A), [Q, calls(PARIS), result('[{"file": "a"}]'), A]),
    (chat(Q, calls(PARIS), result(None), A), [Q, calls(PARIS), result(""), A]),
    # OpenAI's older form
    (
        {
            "functions": BARE,
            "messages": [
                Q,
                {"role": "assistant", "content": None, "function_call": as_text(PARIS)["function"]},
                {"role": "function", "name": "sky", "content": "sun"},
                A,
            ],
        },
        ONE,
    ),
    # ShareGPT, LLaMA-Factory, glaive
    (shared(("human", "q"), ("function_call", bare(PARIS)), ("observation", "sun"), ("gpt", "a")), ONE),
    (
        shared(
            ("human", "q"),
            ("function_call", f"[{bare(PARIS)}, {bare(ROME)}]"),
            ("observation", "sun"),
            ("observation", "blue"),
            ("gpt", "a"),
        ),
        TWO,
    ),
    (
        shared(("human", "q"), ("function_call", f"[{bare(PARIS)}, {bare(ROME)}]"), ("observation", "both"), ("gpt", "a")),
        [Q, calls(PARIS, ROME), {"role": "tool", "content": "both"}, A],
    ),
    (
        shared(
            ("human", "q"), ("function_call", f"<think>\nx\n</think>\n\n{bare(PARIS)}"), ("observation", "sun"), ("gpt", "a")
        ),
        [Q, calls(PARIS, reasoning_content="x"), *ONE[2:]],
    ),
    (shared(("human", "q"), ("function_call", block(PARIS)), ("observation", "sun"), ("gpt", "a")), ONE),
    (
        shared(("human", "q"), ("function_call", PARIS["function"]), ("observation", {"t": 5}), ("gpt", "a")),
        [Q, calls(PARIS), result('{"t": 5}'), A],
    ),
    (
        shared(("human", "q"), ("gpt", "Let me see."), ("function_call", bare(PARIS)), ("observation", "sun"), ("gpt", "a")),
        [Q, SAID, *ONE[2:]],
    ),
    (shared(("human", "q"), ("function-call", bare(PARIS)), ("function-response", "sun"), ("gpt", "a")), ONE),
    (shared(("human", "q"), ("function_call", bare(PARIS)), ("ipython", "sun"), ("gpt", "a")), ONE),
    # ms-swift
    (
        chat(
            Q,
            {"role": "tool_call", "content": bare(PARIS)},
            {"role": "tool_call", "content": bare(ROME)},
            {"role": "tool_response", "content": "sun"},
            {"role": "tool_response", "content": "blue"},
            A,
        ),
        TWO,
    ),
    (
        chat(Q, {"role": "tool_call", "content": bare(PARIS), "loss": False}, {"role": "tool", "content": "sun"}, A),
        [Q, calls(PARIS, weight=0.0), *ONE[2:]],
    ),
    # in text: Hermes and later Qwens
    (
        chat(
            Q,
            {"role": "assistant", "content": block(PARIS)},
            {"role": "tool", "content": "<tool_response>\nsun\n</tool_response>"},
            A,
        ),
        ONE,
    ),
    (
        chat(Q, {"role": "assistant", "content": f"Let me see.\n{block(PARIS)}"}, {"role": "tool", "content": "sun"}, A),
        [Q, SAID, *ONE[2:]],
    ),
    (
        chat(
            Q,
            {"role": "assistant", "content": f"{block(PARIS)}\n{block(ROME)}"},
            {"role": "tool", "content": "<tool_response>\nsun\n</tool_response>\n<tool_response>\nblue\n</tool_response>"},
            A,
        ),
        TWO,
    ),
    (
        chat(
            Q,
            {"role": "assistant", "content": block(PARIS)},
            {"role": "user", "content": "<tool_response>\nsun\n</tool_response>"},
            A,
        ),
        ONE,
    ),
    (chat(Q, {"role": "assistant", "content": block(PARIS)}), [Q, calls(PARIS)]),
]


@pytest.mark.parametrize(("sample", "messages"), SPELLINGS)
def test_spellings(tmp_path, sample, messages):
    conversations = read(write(tmp_path, [sample]))
    assert list(conversations) == [Conversation(messages, TOOLS)] and conversations.notes == []


@pytest.mark.parametrize("system", [HERMES, QWEN, UNREADABLE])
def test_tools_that_the_system_turn_lists_are_not_laid_out_again(tmp_path, system):
    talk = [system, Q, {"role": "assistant", "content": block(PARIS)}, {"role": "tool", "content": "sun"}, A]
    conversations = read(write(tmp_path, [{"messages": talk}]))
    assert list(conversations) == [Conversation([system, *ONE], [])] and conversations.notes == []
    conversations = read(write(tmp_path, [{"messages": talk, "tools": TOOLS}]))
    assert list(conversations) == [Conversation([system, *ONE], [])]
    where = '1 sample with "tools" and <tools> in the system turn (first: 1)'
    assert conversations.notes == [f"{where}; the system turn is kept, the tools are not laid out again"]


def test_calls_in_text_without_any_tools_are_text(tmp_path):
    talk = [
        Q,
        {"role": "assistant", "content": f"Write {block(PARIS)} for a call"},
        Q,
        {"role": "assistant", "content": block(PARIS)},
    ]
    assert list(read(write(tmp_path, [{"messages": talk}]))) == [Conversation(talk, [])]


def test_integers_and_floats_of_arguments_stay_what_they_are(tmp_path):
    big = int("9" * 600)
    text = json.dumps([chat(Q, calls(call("sky", {"a": 5, "b": 5.0, "c": big})), result({"n": 5, "m": -0, "x": 2.50}), A)])
    [(messages, _)] = read(write(tmp_path, text))
    assert json.dumps(messages[1]["tool_calls"][0]["function"]["arguments"]) == f'{{"a": 5, "b": 5.0, "c": {big}}}'
    assert messages[2]["content"] == '{"n": 5, "m": 0, "x": 2.5}'


def test_equal_prompts_with_other_tools_or_calls_are_not_duplicates(tmp_path):
    samples = [chat(Q, A), chat(Q, A, tools=TOOLS[:1]), chat(Q, calls(PARIS)), chat(Q, calls(PARIS)), chat(Q, calls(ROME))]
    assert read(write(tmp_path, samples)).notes == [
        "duplicates: 1 sample equal to an earlier one (first: 3 and 4)",
        "conflicting: 4 samples with the same prompt but different answers (first: 1 and 3)",
    ]
