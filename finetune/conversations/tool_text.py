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

The second form writes values without quotes, so that a string "5" looks like a number: the tool's parameters tell which.
"""

import json
import re

from .messages import call

OPEN, CLOSE = re.compile(r"<tool_call>\s*"), re.compile(r"\s*</tool_call>\s*")
FUNCTION, FUNCTION_END = re.compile(r"<function=([^>\n]+)>\s*"), re.compile(r"</function>")
# What a value holds may look like the end of it: it ends where another parameter follows, or the function ends.
BEHIND = r"(?=<parameter=|</function>\s*</tool_call>)"
PARAMETER = re.compile(rf"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*{BEHIND}", re.DOTALL)
CONSTANTS = {"true": True, "false": False, "none": None, "null": None}  # the template writes Python's True, False and None


def split_calls(text: str, tools: list[dict] = ()) -> tuple[str, list[dict]]:
    """(what stands before the calls, the calls). (text, []) where there is none, or where what stands there is no call.

    tools: in OpenAI's form, for the types of the second form's values; without them, what can be JSON is.
    """
    for first in OPEN.finditer(text):  # the text before the calls may talk about the tag
        calls, at = [], first.start()
        while at < len(text):
            read = read_call(text, at, tools)
            if read is None:
                break
            found, at = read
            calls.append(found)
        else:
            return text[: first.start()].rstrip(), calls
    return text, []


def read_call(text: str, at: int, tools: list[dict] = ()) -> tuple[dict, int] | None:
    """(the call whose <tool_call> is at `at`, where it and what is blank behind it ends); None if there is none."""
    opened = OPEN.match(text, at)
    read = opened and (read_function(text, opened.end(), tools) or read_json(text, opened.end()))
    closed = read and CLOSE.match(text, read[1])
    return (read[0], closed.end()) if closed else None


def read_json(text: str, at: int) -> tuple[dict, int] | None:
    """What stands between the tags in the first form, and where it ends. Arguments: an object, or a string that is one."""
    try:
        found, end = json.JSONDecoder().raw_decode(text, at)
        name, arguments = found["name"], found.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (call(name, arguments), end) if isinstance(name, str) and isinstance(arguments, dict) else None


def read_function(text: str, at: int, tools: list[dict]) -> tuple[dict, int] | None:
    """The same for the second form."""
    head = FUNCTION.match(text, at)
    if head is None:
        return None
    name, arguments, at = head[1], {}, head.end()
    types = types_of(name, tools)
    while parameter := PARAMETER.match(text, at):
        arguments[parameter[1]] = value_of(parameter[2], types.get(parameter[1]))
        at = parameter.end()
    end = FUNCTION_END.match(text, at)
    return (call(name, arguments), end.end()) if end else None


def types_of(name: str, tools: list[dict]) -> dict[str, list[str]]:
    """The types that the parameters of a tool may have, where it says so in JSON schema."""
    functions = [tool.get("function", tool) for tool in tools]
    schema = next((function.get("parameters") for function in functions if function.get("name") == name), None)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    found = {}
    for key, value in properties.items() if isinstance(properties, dict) else ():
        types = value.get("type") if isinstance(value, dict) else None
        found[key] = [types] if isinstance(types, str) else types if isinstance(types, list) else None
    return {key: types for key, types in found.items() if types}


def value_of(text: str, types: list[str] | None = None) -> object:
    """A parameter's value. types: of JSON schema; None: what can be JSON of something else than a string is that."""
    if types == ["string"]:
        return text
    if text.lower() in CONSTANTS:
        value = CONSTANTS[text.lower()]
    else:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
    kind = "null" if value is None else "boolean" if isinstance(value, bool) else "string" if isinstance(value, str) else ""
    if kind == "string" or (types and "string" in types and kind not in types):
        return text  # a string in quotes is a string with quotes
    return value
