"""Small conversations with tools, in several spellings."""

import json

from finetune.conversations.messages import call

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
