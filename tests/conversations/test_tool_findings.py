"""Tools, calls and results that do not fit together, or cannot be read: each finding is provoked and its message read."""

import json

import pytest
from talks import findings, write
from tool_talks import BARE, HERMES, IDS, PARIS, ROME, TOOLS, A, Q, bare, block, calls, chat, result, shared

from finetune.conversations.messages import call
from finetune.conversations.reading import read

NO_RESULT = 'calls "sky", and no result of it follows; add it or remove the call'
FINITE = "holds a number that is not finite; JSON has no such number"
DEEP = json.loads("[" * 150 + "]" * 150)
FINDINGS = [  # a sample, and what is said of it
    (chat(Q, calls(PARIS), A), f" turn 2: {NO_RESULT}"),
    (chat(Q, calls(PARIS), Q, A), f" turn 2: {NO_RESULT}"),
    (chat(Q, calls(ROME, PARIS), result("blue", "sea"), A), f" turn 2: {NO_RESULT}"),
    (
        chat(Q, A, result("sun"), A),
        " turn 3: a result without a call: the turn before it calls no tool in a spelling that is read (data/README.md)",
    ),
    (
        chat(result("sun"), A),
        " turn 1: a result without a call: the turn before it calls no tool in a spelling that is read (data/README.md)",
    ),
    (chat(Q, calls(PARIS), result("x"), result("y"), A), " turn 4: a result without a call: the answer before it makes 1"),
    (
        chat(Q, calls(*IDS), {"role": "tool", "tool_call_id": "3", "content": "x"}, A),
        ' turn 3: a result without a call: the answer before it makes no call "3"',
        ' turn 2: calls "sky", "sea", and no result of it follows; add it or remove the call',
    ),
    (
        chat(Q, calls(*IDS[:1]), *[{"role": "tool", "tool_call_id": "1", "content": "x"}] * 2, A),
        ' turn 4: a second result of the call "1"; keep one of them',
    ),
    (chat(Q, calls(IDS[0], IDS[1] | {"id": "1"}), result("x"), result("y", "sea"), A), ' turn 2: two calls have the id "1"; give each its own'),
    (
        chat(Q, calls(PARIS, ROME), result("x", "sea"), result("y"), A),
        ' turn 3: a result of "sea", but the call that it answers is of "sky"; put results into the order of the calls, or give both ids',
        ' turn 4: a result of "sky", but the call that it answers is of "sea"; put results into the order of the calls, or give both ids',
    ),
    (
        chat(Q, calls(PARIS), result("x")),
        " turn 3: nothing follows this result; add the answer, or remove the turns behind the last answer",
    ),
    (chat(Q, calls(PARIS), result("x"), Q, A), " turn 4: the result before it has no answer; add the turn between them"),
    (chat(Q | {"tool_calls": [PARIS]}, A), ' turn 1: "tool_calls" on role user; only an answer can have it'),
    (chat(Q, A, Q | {"tools": TOOLS}, A), ' turn 3: "tools" must stand beside the turns, not on role user'),
    (chat(Q, A | {"tools": TOOLS}), ' turn 2: "tools" must stand beside the turns, not on an answer'),
    # calls
    (chat(Q, calls(call("sky", [1]))), ' turn 2: "arguments" of "sky" must be a JSON object, found a list'),
    (
        chat(Q, calls({"function": {"name": "sky", "arguments": "{a: 1}"}})),
        ' turn 2: "arguments" of "sky" is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))',
    ),
    (
        chat(Q, calls({"function": {"name": "sky", "arguments": '{"a": 1, "a": 2}'}})),
        ' turn 2: "arguments" of "sky" has "a" twice; one of them would be lost',
    ),
    (chat(Q, calls({"function": {"name": "sky", "arguments": '{"a": NaN}'}})), f' turn 2: "arguments" of "sky" {FINITE}'),
    (chat(Q, calls(call("sky", {"a": float("inf")}))), f' turn 2: "arguments" of "sky" {FINITE}'),
    (
        chat(Q, calls(call("sky", {"a": {"b": "\ude00"}}))),
        ' turn 2: "arguments" of "sky" holds half of a character (\\ude00 alone); write it whole or remove it',
    ),
    (chat(Q, calls(call("sky", {"a": DEEP}))), ' turn 2: "arguments" of "sky" is nested too deeply'),
    (
        chat(Q, calls({"function": {"name": "sky", "arguments": "[" * 100_000}})),
        ' turn 2: "arguments" of "sky" is nested too deeply',
    ),
    (
        chat(Q, calls({"function": {"name": "sky", "argument": {}}})),
        ' turn 2: "tool_calls" of "sky" has no "arguments" (keys: "name", "argument")',
    ),
    (chat(Q, calls({"function": {"arguments": {}}})), ' turn 2: "tool_calls" has no "name" of a tool (keys: "function")'),
    (chat(Q, calls(3)), ' turn 2: "tool_calls" must be an object with a name and arguments, found a number'),
    (
        chat(Q, calls(PARIS | {"type": "retrieval"})),
        ' turn 2: "tool_calls" is of type "retrieval"; only functions can be called',
    ),
    (chat(Q, calls(PARIS | {"id": 3})), ' turn 2: "id" of "tool_calls" must be a string, found a number'),
    (chat(Q, A | {"tool_calls": {"name": "sky"}}), ' turn 2: "tool_calls" must be a list of calls, found an object'),
    (chat(Q, calls(PARIS, function_call=PARIS["function"])), ' turn 2: has "function_call", "tool_calls"; keep one of them'),
    (chat(Q, calls(call("wind", {}))), ' turn 2: calls "wind", which is not among its tools ("sea", "sky")'),
    (
        chat(Q, calls(PARIS, ROME), tools=None),
        ' turn 2: calls "sky", but the sample has no "tools"; list them beside the turns',
    ),
    (
        {"messages": [HERMES, Q, {"role": "assistant", "content": block(call("wind", {}))}]},
        ' turn 3: calls "wind", which is not among its tools ("sea", "sky")',
    ),
    (
        shared(("human", "q"), ("function_call", "sky(Paris)")),
        " turn 2: the call is no JSON (Expecting value: line 1 column 1 (char 0))",
    ),
    (shared(("human", "q"), ("function_call", "[]")), " turn 2: has no call; write one or remove the turn"),
    (
        shared(("human", "q"), ("function_call", f"<think>x{bare(PARIS)}")),
        " turn 2: has <think> but no </think>: the thoughts are cut off; write the whole turn or remove it",
    ),
    (
        shared(("human", "q"), ("function_call", '{"name": "sky", "arguments": {"a": 1, "a": 2}}')),
        ' turn 2: "arguments" of "sky" has "a" twice; one of them would be lost',
    ),
    (
        chat(Q, {"role": "tool_call", "content": bare(PARIS), "loss": False}, {"role": "tool_call", "content": bare(ROME)}),
        " turn 3: is one message with turn 2, but they are to be learned differently; say the same on both",
    ),
    (
        chat(Q, A | {"thought": "x"}, {"role": "tool_call", "content": bare(ROME), "thought": "y"}),
        " turn 3: is one message with turn 2, but both have thoughts; put them together",
    ),
    (
        chat(Q, {"role": "assistant", "content": "<tool_call>\nsky\n</tool_call>"}),
        " turn 2: holds <tool_call>, but not calls that can be read; they must be JSON and end the answer",
    ),
    (
        chat(Q, {"role": "assistant", "content": '<tool_call>{"name": "sky", "arguments": {"a": 1, "a": 2}}</tool_call>'}),
        ' turn 2: the call has "a" twice; one of them would be lost',
    ),
    (
        chat(Q, {"role": "tool_call", "content": bare(PARIS), "refusal": "no"}),
        ' turn 2: "refusal" on a turn of calls; only an answer can have it',
    ),
    # tools
    (chat(Q, A, tools="sky"), ': "tools" is no JSON (Expecting value: line 1 column 1 (char 0))'),
    (chat(Q, A, tools={"sky": {}}), ': "tools" must be a list of tools, found an object'),
    (chat(Q, A, tools=[3]), ': "tools" entry 1 must be an object with a name, found a number'),
    (
        chat(Q, A, tools=[TOOLS[0], {"type": "function", "function": {"description": "d"}}]),
        ': "tools" entry 2 has no "name" (keys: "description")',
    ),
    (chat(Q, A, tools=[{"description": "d"}]), ': "tools" entry 1 has no "name" (keys: "description")'),
    (chat(Q, A, tools=[{"type": "web_search"}]), ': "tools" entry 1 is of type "web_search"; only functions can be called'),
    (chat(Q, A, tools=[*TOOLS, BARE[0]]), ': "tools" has the tool "sky" twice; one name must mean one tool'),
    (chat(Q, A, tools=[BARE[0] | {"x": float("nan")}]), f': "tools" entry 1 {FINITE}'),
    (
        chat({"role": "system", "content": "s", "tools": BARE}, Q, A),
        ": has tools beside the turns and on the system turn; keep one of them",
    ),
    (chat(Q, A, functions=BARE), ': has "tools", "functions"; keep one of them'),
    (chat(Q, A, tools='[{"name": "sky", "name": "sea"}]'), ': "tools" entry 1 has "name" twice; one of them would be lost'),
    # results
    (chat(Q, calls(PARIS), {"role": "tool", "out": "x"}, A), ' turn 3: no "content" (keys: "role", "out")'),
    (chat(Q, calls(PARIS), result({"a": float("nan")}), A), f" turn 3: the result {FINITE}"),
    (
        chat(Q, calls(PARIS), {"role": "tool", "content": "x", "tool_call_id": 3}, A),
        ' turn 3: "tool_call_id" must be a string, found a number',
    ),
    (
        chat(Q, calls(PARIS), result("x") | {"weight": 1}, A),
        ' turn 3: "weight" on role tool: only answers are learned; remove it there',
    ),
]


@pytest.mark.parametrize("case", FINDINGS)
def test_findings(tmp_path, case):
    sample, *messages = case
    assert findings(write(tmp_path, json.dumps([sample]))) == [f"sample 1{message}" for message in messages]


def test_a_key_twice_in_a_call_that_is_an_object(tmp_path):
    """json.dumps cannot write it."""
    for value, what in (('{"a": 1, "a": 2}', '"arguments" of "sky"'), ('{}, "arguments": {}', '"tool_calls"')):
        text = json.dumps([chat(Q, calls(call("sky", {"X": 0})))]).replace('{"X": 0}', value)
        twice = "a" if "a" in value[:4] else "arguments"
        assert findings(write(tmp_path, text)) == [f'sample 1 turn 2: {what} has "{twice}" twice; one of them would be lost']


def test_a_number_of_too_many_digits_is_found_where_it_would_be_learned(tmp_path):
    text = json.dumps([chat(Q, calls(call("sky", {"X": 0})))]).replace('{"X": 0}', f'{{"X": {"9" * 601}}}')
    assert findings(write(tmp_path, text)) == [f'sample 1 turn 2: "arguments" of "sky" {FINITE}']


def test_keys_of_a_call_that_nothing_reads_are_noted(tmp_path):
    function = PARIS["function"] | {"strict": True, "nothing": None}
    notes = read(write(tmp_path, [chat(Q, calls(PARIS | {"arguments": {}, "index": 0, "function": function}))])).notes
    assert notes == ['keys that are not read: "arguments" (1 sample, first: 1), "strict" (1 sample, first: 1)']


def test_media_in_a_result_refuses_the_file(tmp_path):
    [found] = findings(write(tmp_path, [chat(Q, calls(PARIS), result([{"type": "image_url", "image_url": "x"}]), A)]))
    assert found.startswith('1 sample with a part of type "image_url" (first: 1): images, sound or video: ')
