"""Every published spelling of tools, calls and results is read into the one inner form; what does not fit is found."""

import json
import random

import pytest
from talks import findings, write

from finetune.data.conversations import read
from finetune.data.messages import Conversation, call

Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
BARE = [{"name": "sky", "description": "d", "parameters": PARAMETERS}, {"name": "sea"}]
TOOLS = [{"type": "function", "function": tool} for tool in BARE]
PARIS, ROME = call("sky", {"city": "Paris"}), call("sea", {"n": 5, "deep": [1.5, None, True]})


def chat(*messages, **beside) -> dict:
    return {"tools": TOOLS, "messages": list(messages)} | beside


def shared(*pairs, **beside) -> dict:
    """In ShareGPT's form."""
    turns = [{"from": role, "value": value} for role, value in pairs]
    return {"tools": json.dumps(BARE), "conversations": turns} | beside


def calls(*made, content="", **more) -> dict:
    return {"role": "assistant", "content": content} | more | {"tool_calls": list(made)}


def result(content, name="sky") -> dict:
    return {"role": "tool", "content": content, "name": name}


def as_text(made: dict) -> dict:
    """A call with its arguments as JSON in a string, as OpenAI writes it."""
    function = made["function"]
    return {"type": "function", "function": function | {"arguments": json.dumps(function["arguments"])}}


def bare(made: dict) -> str:
    return json.dumps(made["function"])


def block(made: dict) -> str:
    return f"<tool_call>\n{bare(made)}\n</tool_call>"


ONE = [Q, calls(PARIS), result("sun"), A]  # one call and its result
TWO = [Q, calls(PARIS, ROME), result("sun"), result("blue", "sea"), A]  # parallel calls
IDS = [as_text(PARIS) | {"id": "1"}, as_text(ROME) | {"id": "2"}]
SAID = {"role": "assistant", "content": "Let me see.", "tool_calls": [PARIS]}
HERMES = {"role": "system", "content": f"Tools: <tools> {json.dumps(TOOLS)} </tools> Use them."}
QWEN = {"role": "system", "content": "within <tools></tools>:\n<tools>\n" + "\n".join(map(json.dumps, TOOLS)) + "\n</tools>"}
UNREADABLE = {"role": "system", "content": "<tools>sky(city)</tools>"}

SPELLINGS = [  # a sample, and its messages in the inner form, with TOOLS
    # OpenAI
    (chat(Q, calls(PARIS), {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, calls(as_text(PARIS)), {"role": "tool", "content": "sun", "name": "sky"}, A), ONE),
    (chat(Q, calls(as_text(PARIS), content=None), {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, {"role": "assistant", "tool_calls": [PARIS]}, {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, {"role": "assistant", "tool_calls": json.dumps([PARIS])}, {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, calls(PARIS["function"]), {"role": "tool", "content": "sun"}, A), ONE),
    (chat(Q, calls(*IDS), {"role": "tool", "tool_call_id": "2", "content": "blue"},
          {"role": "tool", "tool_call_id": "1", "content": "sun"}, A), TWO),
    (chat(Q, calls(*IDS), {"role": "tool", "tool_call_id": "2", "content": "blue"}, {"role": "tool", "content": "sun"}, A), TWO),
    (chat(Q, calls(PARIS, ROME), {"role": "tool", "content": "sun"}, {"role": "tool", "content": "blue"}, A), TWO),
    (chat(Q, calls(*IDS)), [Q, calls(PARIS, ROME)]),  # the call is the answer to learn
    (chat(Q, calls(PARIS), result("sun"), calls(ROME), result("blue", "sea"), A), [*ONE[:3], calls(ROME), result("blue", "sea"), A]),
    (chat(Q, SAID, result("sun"), A), [Q, SAID, *ONE[2:]]),
    (chat(Q, calls(PARIS, weight=0, reasoning_content="x"), result("sun"), A),
     [Q, calls(PARIS, weight=0.0, reasoning_content="x"), *ONE[2:]]),
    (chat(Q, A), [Q, A]),  # when not to call
    (chat(Q, calls(PARIS), result("sun"), A, tools=BARE), ONE),
    (chat(Q, calls(PARIS), result("sun"), A, tools=json.dumps(TOOLS)), ONE),
    (chat(Q, calls(PARIS), result("sun"), A, tools=[json.dumps(tool) for tool in BARE]), ONE),
    (chat(Q, calls(PARIS), result("sun"), A, tools=[{"type": "function"} | tool for tool in BARE]), ONE),
    (chat({"role": "system", "content": "s", "tools": TOOLS}, *ONE, tools=None), [{"role": "system", "content": "s"}, *ONE]),
    # arguments and results
    (chat(Q, calls({"function": {"name": "sky", "arguments": ""}}), result("sun"), A), [Q, calls(call("sky", {})), *ONE[2:]]),
    (chat(Q, calls({"function": {"name": "sky"}}), result("sun"), A), [Q, calls(call("sky", {})), *ONE[2:]]),
    (chat(Q, calls(call("sky", {"a": None, "b": {"c": None}})), result(""), A), [Q, calls(call("sky", {"b": {}})), result(""), A]),
    (chat(Q, calls(as_text(call("sky", {"a": None}))), result(""), A), [Q, calls(call("sky", {"a": None})), result(""), A]),
    (chat(Q, calls(PARIS), result({"t": 5, "城": None}), A), [Q, calls(PARIS), result('{"t": 5, "城": null}'), A]),
    (chat(Q, calls(PARIS), result([1, "x"]), A), [Q, calls(PARIS), result('[1, "x"]'), A]),
    (chat(Q, calls(PARIS), result([{"type": "text", "text": "s"}, {"type": "text", "text": "un"}]), A), ONE),
    (chat(Q, calls(PARIS), result(None), A), [Q, calls(PARIS), result(""), A]),
    # OpenAI's older form
    (
        {"functions": BARE, "messages": [Q, {"role": "assistant", "content": None, "function_call": as_text(PARIS)["function"]},
                                         {"role": "function", "name": "sky", "content": "sun"}, A]},
        ONE,
    ),
    # ShareGPT, LLaMA-Factory, glaive
    (shared(("human", "q"), ("function_call", bare(PARIS)), ("observation", "sun"), ("gpt", "a")), ONE),
    (shared(("human", "q"), ("function_call", f"[{bare(PARIS)}, {bare(ROME)}]"), ("observation", "sun"), ("observation", "blue"),
            ("gpt", "a")), TWO),
    (shared(("human", "q"), ("function_call", f"[{bare(PARIS)}, {bare(ROME)}]"), ("observation", "both"), ("gpt", "a")),
     [Q, calls(PARIS, ROME), {"role": "tool", "content": "both"}, A]),
    (shared(("human", "q"), ("function_call", f"<think>\nx\n</think>\n\n{bare(PARIS)}"), ("observation", "sun"), ("gpt", "a")),
     [Q, calls(PARIS, reasoning_content="x"), *ONE[2:]]),
    (shared(("human", "q"), ("function_call", block(PARIS)), ("observation", "sun"), ("gpt", "a")), ONE),
    (shared(("human", "q"), ("function_call", PARIS["function"]), ("observation", {"t": 5}), ("gpt", "a")),
     [Q, calls(PARIS), result('{"t": 5}'), A]),
    (shared(("human", "q"), ("gpt", "Let me see."), ("function_call", bare(PARIS)), ("observation", "sun"), ("gpt", "a")),
     [Q, SAID, *ONE[2:]]),
    (shared(("human", "q"), ("function-call", bare(PARIS)), ("function-response", "sun"), ("gpt", "a")), ONE),
    (shared(("human", "q"), ("function_call", bare(PARIS)), ("ipython", "sun"), ("gpt", "a")), ONE),
    # ms-swift
    (chat(Q, {"role": "tool_call", "content": bare(PARIS)}, {"role": "tool_call", "content": bare(ROME)},
          {"role": "tool_response", "content": "sun"}, {"role": "tool_response", "content": "blue"}, A), TWO),
    (chat(Q, {"role": "tool_call", "content": bare(PARIS), "loss": False}, {"role": "tool", "content": "sun"}, A),
     [Q, calls(PARIS, weight=0.0), *ONE[2:]]),
    # in text: Hermes and later Qwens
    (chat(Q, {"role": "assistant", "content": block(PARIS)}, {"role": "tool", "content": "<tool_response>\nsun\n</tool_response>"}, A),
     ONE),
    (chat(Q, {"role": "assistant", "content": f"Let me see.\n{block(PARIS)}"}, {"role": "tool", "content": "sun"}, A),
     [Q, SAID, *ONE[2:]]),
    (chat(Q, {"role": "assistant", "content": f"{block(PARIS)}\n{block(ROME)}"},
          {"role": "tool", "content": "<tool_response>\nsun\n</tool_response>\n<tool_response>\nblue\n</tool_response>"}, A), TWO),
    (chat(Q, {"role": "assistant", "content": block(PARIS)}, {"role": "user", "content": "<tool_response>\nsun\n</tool_response>"}, A),
     ONE),
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
    talk = [Q, {"role": "assistant", "content": f"Write {block(PARIS)} for a call"}, Q, {"role": "assistant", "content": block(PARIS)}]
    assert list(read(write(tmp_path, [{"messages": talk}]))) == [Conversation(talk, [])]


def test_integers_and_floats_of_arguments_stay_what_they_are(tmp_path):
    big = 12345678901234567890123
    text = json.dumps([chat(Q, calls(call("sky", {"a": 5, "b": 5.0, "c": big})), result({"n": 5, "m": -0, "x": 2.50}), A)])
    [(messages, _)] = read(write(tmp_path, text))
    assert json.dumps(messages[1]["tool_calls"][0]["function"]["arguments"]) == f'{{"a": 5, "b": 5.0, "c": {big}}}'
    assert messages[2]["content"] == '{"n": 5, "m": 0, "x": 2.5}'


# ---- findings


def raw(sample: str) -> str:
    return f"[{sample}]"


NO_RESULT = 'calls "sky", and no result of it follows; add it or remove the call'
FINITE = "holds a number that is not finite; JSON has no such number"
DEEP = json.loads("[" * 150 + "]" * 150)
FINDINGS = [  # a sample, and what is said of it
    (chat(Q, calls(PARIS), A), f" turn 2: {NO_RESULT}"),
    (chat(Q, calls(PARIS), Q, A), f" turn 2: {NO_RESULT}"),
    (chat(Q, calls(ROME, PARIS), result("blue", "sea"), A), f" turn 2: {NO_RESULT}"),
    (chat(Q, A, result("sun"), A), " turn 3: a result without a call: the turn before it calls no tool"),
    (chat(result("sun"), A), " turn 1: a result without a call: the turn before it calls no tool"),
    (chat(Q, calls(PARIS), result("x"), result("y"), A), " turn 4: a result without a call: the answer before it makes 1"),
    (chat(Q, calls(*IDS), {"role": "tool", "tool_call_id": "3", "content": "x"}, A),
     ' turn 3: a result without a call: the answer before it makes no call "3"',
     ' turn 2: calls "sky", "sea", and no result of it follows; add it or remove the call'),
    (chat(Q, calls(*IDS[:1]), *[{"role": "tool", "tool_call_id": "1", "content": "x"}] * 2, A),
     ' turn 4: a second result of the call "1"; keep one of them'),
    (chat(Q, calls(IDS[0], IDS[1] | {"id": "1"}), result("x"), result("y", "sea"), A), ' turn 2: two calls have the id "1"'),
    (chat(Q, calls(PARIS, ROME), result("x", "sea"), result("y"), A),
     ' turn 3: a result of "sea", but the call that it answers is of "sky"; put results into the order of the calls, or give both ids',
     ' turn 4: a result of "sky", but the call that it answers is of "sea"; put results into the order of the calls, or give both ids'),
    (chat(Q, calls(PARIS), result("x")), " turn 3: nothing follows this result; add the answer, or remove the turns behind the last answer"),
    (chat(Q, calls(PARIS), result("x"), Q, A), " turn 4: the result before it has no answer; add the turn between them"),
    (chat(Q | {"tool_calls": [PARIS]}, A), ' turn 1: "tool_calls" on role user; only an answer can have it'),
    (chat(Q, A, Q | {"tools": TOOLS}, A), ' turn 3: "tools" must stand beside the turns, not on role user'),
    (chat(Q, A | {"tools": TOOLS}), ' turn 2: "tools" must stand beside the turns, not on an answer'),
    # calls
    (chat(Q, calls(call("sky", [1]))), ' turn 2: "arguments" of "sky" must be a JSON object, found a list'),
    (chat(Q, calls({"function": {"name": "sky", "arguments": "{a: 1}"}})),
     ' turn 2: "arguments" of "sky" is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))'),
    (chat(Q, calls({"function": {"name": "sky", "arguments": '{"a": 1, "a": 2}'}})),
     ' turn 2: "arguments" of "sky" has "a" twice; one of them would be lost'),
    (chat(Q, calls({"function": {"name": "sky", "arguments": '{"a": NaN}'}})), f' turn 2: "arguments" of "sky" {FINITE}'),
    (chat(Q, calls(call("sky", {"a": float("inf")}))), f' turn 2: "arguments" of "sky" {FINITE}'),
    (chat(Q, calls(call("sky", {"a": {"b": "\ude00"}}))),
     ' turn 2: "arguments" of "sky" holds half of a character (\\ude00 alone); write it whole or remove it'),
    (chat(Q, calls(call("sky", {"a": DEEP}))), ' turn 2: "arguments" of "sky" is nested too deeply'),
    (chat(Q, calls({"function": {"name": "sky", "arguments": "[" * 100_000}})), ' turn 2: "arguments" of "sky" is nested too deeply'),
    (chat(Q, calls({"function": {"name": "sky", "argument": {}}})), ' turn 2: "tool_calls" of "sky" has no "arguments" (keys: "name", "argument")'),
    (chat(Q, calls({"function": {"arguments": {}}})), ' turn 2: "tool_calls" has no "name" of a tool (keys: "function")'),
    (chat(Q, calls(3)), ' turn 2: "tool_calls" must be an object with a name and arguments, found a number'),
    (chat(Q, calls(PARIS | {"type": "retrieval"})), ' turn 2: "tool_calls" is of type "retrieval"; only functions can be called'),
    (chat(Q, calls(PARIS | {"id": 3})), ' turn 2: "id" of "tool_calls" must be a string, found a number'),
    (chat(Q, A | {"tool_calls": {"name": "sky"}}), ' turn 2: "tool_calls" must be a list of calls, found an object'),
    (chat(Q, calls(PARIS, function_call=PARIS["function"])), ' turn 2: has "function_call", "tool_calls"; keep one of them'),
    (chat(Q, calls(call("wind", {}))), ' turn 2: calls "wind", which is not among its tools ("sea", "sky")'),
    (chat(Q, calls(PARIS, ROME), tools=None), ' turn 2: calls "sky", but the sample has no "tools"; list them beside the turns'),
    ({"messages": [HERMES, Q, {"role": "assistant", "content": block(call("wind", {}))}]},
     ' turn 3: calls "wind", which is not among its tools ("sea", "sky")'),
    (shared(("human", "q"), ("function_call", "sky(Paris)")), " turn 2: the call is no JSON (Expecting value: line 1 column 1 (char 0))"),
    (shared(("human", "q"), ("function_call", "[]")), " turn 2: has no call; write one or remove the turn"),
    (shared(("human", "q"), ("function_call", f"<think>x{bare(PARIS)}")),
     " turn 2: has <think> but no </think>: the thoughts are cut off; write the whole turn or remove it"),
    (shared(("human", "q"), ("function_call", '{"name": "sky", "arguments": {"a": 1, "a": 2}}')),
     ' turn 2: "arguments" of "sky" has "a" twice; one of them would be lost'),
    (chat(Q, {"role": "tool_call", "content": bare(PARIS), "loss": False}, {"role": "tool_call", "content": bare(ROME)}),
     " turn 3: is one message with turn 2, but they are to be learned differently; say the same on both"),
    (chat(Q, A | {"thought": "x"}, {"role": "tool_call", "content": bare(ROME), "thought": "y"}),
     " turn 3: is one message with turn 2, but both have thoughts; put them together"),
    (chat(Q, {"role": "assistant", "content": "<tool_call>\nsky\n</tool_call>"}),
     " turn 2: holds <tool_call>, but not calls that can be read; they must be JSON and end the answer"),
    (chat(Q, {"role": "assistant", "content": '<tool_call>{"name": "sky", "arguments": {"a": 1, "a": 2}}</tool_call>'}),
     ' turn 2: the call has "a" twice; one of them would be lost'),
    # tools
    (chat(Q, A, tools="sky"), ': "tools" is no JSON (Expecting value: line 1 column 1 (char 0))'),
    (chat(Q, A, tools={"sky": {}}), ': "tools" must be a list of tools, found an object'),
    (chat(Q, A, tools=[3]), ': "tools" entry 1 must be an object with a name, found a number'),
    (chat(Q, A, tools=[TOOLS[0], {"type": "function", "function": {"description": "d"}}]), ': "tools" entry 2 has no "name" (keys: "description")'),
    (chat(Q, A, tools=[{"description": "d"}]), ': "tools" entry 1 has no "name" (keys: "description")'),
    (chat(Q, A, tools=[{"type": "web_search"}]), ': "tools" entry 1 is of type "web_search"; only functions can be called'),
    (chat(Q, A, tools=[*TOOLS, BARE[0]]), ': "tools" has the tool "sky" twice; one name must mean one tool'),
    (chat(Q, A, tools=[BARE[0] | {"x": float("nan")}]), f': "tools" entry 1 {FINITE}'),
    (chat(Q, A, functions=BARE), ': has "tools", "functions"; keep one of them'),
    (chat(Q, A, tools='[{"name": "sky", "name": "sea"}]'), ': "tools" entry 1 has "name" twice; one of them would be lost'),
    # results
    (chat(Q, calls(PARIS), {"role": "tool", "out": "x"}, A), ' turn 3: no "content" (keys: "role", "out")'),
    (chat(Q, calls(PARIS), result({"a": float("nan")}), A), f" turn 3: the result {FINITE}"),
    (chat(Q, calls(PARIS), {"role": "tool", "content": "x", "tool_call_id": 3}, A), ' turn 3: "tool_call_id" must be a string, found a number'),
    (chat(Q, calls(PARIS), result("x") | {"weight": 1}, A), ' turn 3: "weight" on role tool: only answers are learned; remove it there'),
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
    text = json.dumps([chat(Q, calls(call("sky", {"X": 0})))]).replace('{"X": 0}', f'{{"X": {"9" * 5000}}}')
    assert findings(write(tmp_path, text)) == [f'sample 1 turn 2: "arguments" of "sky" {FINITE}']


def test_media_in_a_result_refuses_the_file(tmp_path):
    [found] = findings(write(tmp_path, [chat(Q, calls(PARIS), result([{"type": "image_url"}]), A)]))
    assert found.startswith('1 sample with a part of type "image_url" (first: 1): images, sound or video: ')


def test_equal_prompts_with_other_tools_or_calls_are_not_duplicates(tmp_path):
    samples = [chat(Q, A), chat(Q, A, tools=TOOLS[:1]), chat(Q, calls(PARIS)), chat(Q, calls(PARIS)), chat(Q, calls(ROME))]
    assert read(write(tmp_path, samples)).notes == [
        "duplicates: 1 sample equal to an earlier one (first: 3 and 4)",
        "conflicting: 4 samples with the same prompt but different answers (first: 1 and 3)",
    ]


# ---- any conversation, in any spelling


def anything(draw: random.Random, depth: int = 0) -> object:
    kinds = [lambda: draw.randrange(-9, 10**20), draw.random, lambda: words(draw), lambda: draw.choice([True, None])]
    if depth < 2:
        kinds += [lambda: [anything(draw, depth + 1) for _ in range(draw.randrange(3))]]
        kinds += [lambda: {words(draw): anything(draw, depth + 1) for _ in range(draw.randrange(3))}]
    return draw.choice(kinds)()


def words(draw: random.Random) -> str:
    return "".join(draw.choices(['"', "\\", "{", "}", "好", "😀", "a", " ", "\n", "<think", "null", "\u2028", "%"], k=draw.randrange(1, 8)))


def without_null(value: object) -> object:
    """As arguments given as objects are read."""
    if isinstance(value, list):
        return [without_null(item) for item in value]
    return {key: without_null(item) for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def talk_with_tools(draw: random.Random, most_calls: int) -> list[dict]:
    messages = [{"role": "system", "content": words(draw)}] * draw.randrange(2)
    for _ in range(draw.randrange(1, 4)):
        messages.append({"role": "user", "content": words(draw)})
        for _ in range(draw.randrange(3)):
            made = [call(draw.choice(["sky", "sea"]), without_null({words(draw): anything(draw)})) for _ in range(draw.randrange(1, most_calls + 1))]
            more = draw.choice([{}, {"weight": draw.choice([0.0, 0.5])}]) | draw.choice([{}, {"reasoning_content": "x" + words(draw)}])
            messages.append({"role": "assistant", "content": draw.choice(["", words(draw) + "."])} | more | {"tool_calls": made})
            messages += [result(words(draw) + ".", each["function"]["name"]) for each in made]
        messages.append({"role": "assistant", "content": words(draw) + "."})
    return messages


def openai(messages: list[dict], draw: random.Random) -> dict:
    """With ids, results in any order, arguments as strings or objects, content null where it is empty."""
    said, ids = [], iter(range(1000))
    for message in messages:
        if message["role"] == "tool":
            said.append({"role": "tool", "tool_call_id": waiting.pop(0), "content": message["content"]})
            if not waiting:
                tail = [said.pop() for _ in range(many)]
                said += draw.sample(tail, many)
        elif "tool_calls" in message:
            made = [draw.choice([dict, as_text])(each) | {"id": f"call_{next(ids)}"} for each in message["tool_calls"]]
            waiting, many = [each["id"] for each in made], len(made)
            said.append(message | {"tool_calls": made, "content": message["content"] or draw.choice([None, ""])})
        else:
            said.append(message)
    return chat(*said)


def older(messages: list[dict], draw: random.Random) -> dict:
    said = []
    for message in messages:
        if "tool_calls" in message:
            message = message | {"function_call": as_text(message["tool_calls"][0])["function"]}
            del message["tool_calls"]
        said.append(message | {"role": "function"} if message["role"] == "tool" else message)
    return {"functions": BARE, "messages": said}


def in_turns(messages: list[dict], roles: dict, together: bool) -> list[tuple]:
    """(role, text, more): calls in turns of their own, all in one or each in one."""
    said = []
    for message in messages:
        more = {key: message[key] for key in message.keys() & {"weight"}}
        thoughts = {key: message[key] for key in message.keys() & {"reasoning_content"}}
        if "tool_calls" in message:
            if message["content"]:
                said.append((roles["assistant"], message["content"], more | thoughts))
                thoughts = {}
            texts = [bare(each) for each in message["tool_calls"]]
            texts = [f"[{', '.join(texts)}]"] if together else texts
            said += [(roles["calls"], text, more | (thoughts if not i else {})) for i, text in enumerate(texts)]
        else:
            said.append((roles[message["role"]], message["content"], more | thoughts))
    return said


def sharegpt(messages: list[dict], draw: random.Random) -> dict:
    roles = {"system": "system", "user": "human", "assistant": "gpt", "calls": "function_call", "tool": "observation"}
    said = [{"from": role, "value": text} | more for role, text, more in in_turns(messages, roles, together=True)]
    return {"conversations": said, "tools": json.dumps(BARE)}


def swift(messages: list[dict], draw: random.Random) -> dict:
    roles = {"system": "system", "user": "user", "assistant": "assistant", "calls": "tool_call", "tool": "tool_response"}
    return chat(*({"role": role, "content": text} | more for role, text, more in in_turns(messages, roles, together=False)))


def hermes(messages: list[dict], draw: random.Random) -> dict:
    """Results of parallel calls in one turn."""
    said = []
    for message in messages:
        if "tool_calls" in message:
            content = "\n".join([message["content"]] * bool(message["content"]) + [block(each) for each in message["tool_calls"]])
            said.append({key: message[key] for key in message if key != "tool_calls"} | {"content": content})
        elif message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if said[-1]["role"] == "tool":
                said[-1]["content"] += f"\n{text}"
            else:
                said.append({"role": "tool", "content": text})
        else:
            said.append(message)
    return chat(*said)


@pytest.mark.parametrize(("spell", "most_calls"), [(openai, 3), (older, 1), (sharegpt, 3), (swift, 3), (hermes, 3)])
def test_any_conversation_reads_to_the_same_inner_form(tmp_path, spell, most_calls):
    draw = random.Random(spell.__name__)
    talks = [talk_with_tools(draw, most_calls) for _ in range(400)]
    found = read(write(tmp_path, json.dumps([spell(messages, draw) for messages in talks])))
    for conversation, messages in zip(found, talks, strict=True):
        sides = ([sorted(message.items()) for message in side] for side in (conversation.messages, messages))
        assert len({json.dumps(side) for side in sides}) == 1  # 5 is not 5.0, and arguments keep their order
        assert conversation.tools == TOOLS
