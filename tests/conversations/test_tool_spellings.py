"""Any conversation with tools, written in each published spelling, is read to the same inner form."""

import json
import random

import pytest
from talks import write
from tool_talks import BARE, TOOLS, as_text, bare, block, result

from finetune.conversations.messages import call
from finetune.conversations.reading import read

LETTERS = ['"', "\\", "{", "}", "好", "😀", "a", " ", "\n", "<think", "null", "\u2028", "%"]


# ---- what may be said


def anything(draw: random.Random, depth: int = 0) -> object:
    kinds = [lambda: draw.randrange(-9, 10**20), draw.random, lambda: words(draw), lambda: draw.choice([True, None])]
    if depth < 2:
        kinds += [lambda: [anything(draw, depth + 1) for _ in range(draw.randrange(3))]]
        kinds += [lambda: {words(draw): anything(draw, depth + 1) for _ in range(draw.randrange(3))}]
    return draw.choice(kinds)()


def words(draw: random.Random) -> str:
    return "".join(draw.choices(LETTERS, k=draw.randrange(1, 8)))


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
            arguments = [without_null({words(draw): anything(draw)}) for _ in range(draw.randrange(1, most_calls + 1))]
            made = [call(draw.choice(["sky", "sea"]), each) for each in arguments]
            more = draw.choice([{}, {"weight": 0.0}, {"weight": 0.5}])
            more |= draw.choice([{}, {"reasoning_content": "x" + words(draw)}])
            content = draw.choice(["", words(draw) + "."])
            messages.append({"role": "assistant", "content": content} | more | {"tool_calls": made})
            messages += [result(words(draw) + ".", each["function"]["name"]) for each in made]
        messages.append({"role": "assistant", "content": words(draw) + "."})
    return messages


# ---- how it is spelt


def openai(messages: list[dict], draw: random.Random) -> dict:
    """With ids, results in any order, arguments as strings or objects, content null where it is empty."""
    said, ids, waiting, results = [], iter(range(1000)), [], []
    for message in messages:
        if message["role"] == "tool":
            results.append({"role": "tool", "tool_call_id": waiting.pop(0), "content": message["content"]})
            if not waiting:
                said += draw.sample(results, len(results))
                results = []
        elif "tool_calls" in message:
            made = [draw.choice([dict, as_text])(each) | {"id": f"call_{next(ids)}"} for each in message["tool_calls"]]
            waiting = [each["id"] for each in made]
            said.append(message | {"tool_calls": made, "content": message["content"] or draw.choice([None, ""])})
        else:
            said.append(message)
    return {"tools": TOOLS, "messages": said}


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
    said = [{"role": role, "content": text} | more for role, text, more in in_turns(messages, roles, together=False)]
    return {"tools": TOOLS, "messages": said}


def hermes(messages: list[dict], draw: random.Random) -> dict:
    """Results of parallel calls in one turn."""
    said = []
    for message in messages:
        if "tool_calls" in message:
            blocks = [block(each) for each in message["tool_calls"]]
            content = "\n".join([message["content"]] * bool(message["content"]) + blocks)
            said.append({key: message[key] for key in message if key != "tool_calls"} | {"content": content})
        elif message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if said[-1]["role"] == "tool":
                said[-1]["content"] += f"\n{text}"
            else:
                said.append({"role": "tool", "content": text})
        else:
            said.append(message)
    return {"tools": TOOLS, "messages": said}


@pytest.mark.parametrize(("spell", "most_calls"), [(openai, 3), (older, 1), (sharegpt, 3), (swift, 3), (hermes, 3)])
def test_any_conversation_reads_to_the_same_inner_form(tmp_path, spell, most_calls):
    draw = random.Random(spell.__name__)
    talks = [talk_with_tools(draw, most_calls) for _ in range(400)]
    found = read(write(tmp_path, json.dumps([spell(messages, draw) for messages in talks])))
    for conversation, messages in zip(found, talks, strict=True):
        sides = ([sorted(message.items()) for message in side] for side in (conversation.messages, messages))
        assert len({json.dumps(side) for side in sides}) == 1  # 5 is not 5.0, and arguments keep their order
        assert conversation.tools == TOOLS
