"""Tool calls that stand in an answer as text, as later Qwens write them: read back into calls.

Qwen2.5 and Qwen3 write (the form that Hermes brought up)

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Qwen3-Coder and Qwen3.5 write

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>
"""

import json
import re

from .messages import call

BLOCK = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
FUNCTION = re.compile(r"<function=([^>\n]+)>\s*(.*?)\s*</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def split_calls(text: str) -> tuple[str, list[dict]]:
    """(what stands before the calls, the calls). (text, []) where there is none, or where one of them cannot be read."""
    first = BLOCK.search(text)
    if first is None:
        return text, []
    calls, at = [], first.start()
    while at < len(text):
        block = BLOCK.match(text, at)
        found = read_call(block[1]) if block else None
        if found is None:  # text behind the calls, or a call that is none
            return text, []
        calls.append(found)
        at = block.end()
    return text[: first.start()], calls


def read_call(text: str) -> dict | None:
    """What stands between <tool_call> and </tool_call>; None if it is no call."""
    if function := FUNCTION.fullmatch(text):
        name, body = function.groups()
        if PARAMETER.sub("", body).strip():
            return None
        return call(name, {key: value_of(value) for key, value in PARAMETER.findall(body)})
    try:
        found = json.loads(text)
        name, arguments = found["name"], found.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def value_of(text: str) -> object:
    """A parameter's value: what is JSON for something else than a string is that, everything else is text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value
