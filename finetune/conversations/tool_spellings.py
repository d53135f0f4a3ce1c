"""Tools and calls of tools in every published spelling, read into the inner form (see messages.py)."""

import json
import math
import re
from typing import NamedTuple

from ..data_files.window import DECODER, TWICE
from .data_notes import shown
from .file_findings import half_character, kind, quoted
from .messages import call
from .tool_text import split_calls

MAX_DEPTH = 100  # of objects and lists inside one another
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
TOOLS_IN_TEXT = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
AROUND_CALL = ("id", "type", "index", "function")  # index: of a streamed call


class Unreadable(ValueError):
    """Says what is wrong with a value, for a finding."""


def parsed(text: str, what: str) -> object:
    """The value of a JSON text."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise Unreadable(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise Unreadable(f"{what} is no JSON ({error})") from None


def clean(value: object, what: str, keep_null: bool) -> object:
    """A value that JSON can hold and that says one thing. keep_null: null says something, else the key counts as absent."""
    try:
        text = ENCODER.encode(value)  # in a tenth of the time: most values are good as they are
        text.encode()
    except (ValueError, TypeError, RecursionError):
        return _clean(value, what, keep_null)
    shallow = text.count("{") + text.count("[") <= MAX_DEPTH
    return value if shallow and (keep_null or "null" not in text) else _clean(value, what, keep_null)


def _clean(value: object, what: str, keep_null: bool, depth: int = 0) -> object:
    if isinstance(value, str):
        if half := half_character(value):
            raise Unreadable(f"{what} holds half of a character (\\u{ord(half[0]):x} alone); write it whole or remove it")
        return value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Unreadable(f"{what} holds a number that is not finite; JSON has no such number")
        return value
    if depth == MAX_DEPTH:
        raise Unreadable(f"{what} is nested too deeply")
    if isinstance(value, list):
        return [_clean(item, what, keep_null, depth + 1) for item in value]
    if isinstance(value, dict):
        if TWICE in value:
            raise Unreadable(f'{what} has {quoted([value[TWICE]])} twice; one of them would be lost')
        _clean("".join(value), what, keep_null)
        kept = {key: item for key, item in value.items() if keep_null or item is not None}
        return {key: _clean(item, what, keep_null, depth + 1) for key, item in kept.items()}
    raise Unreadable(f"{what} holds {kind(value)}, which JSON does not have")


def as_json(value: object) -> str:
    """A tool's result that is no text, as the model sees it."""
    return json.dumps(clean(value, "the result", keep_null=True), ensure_ascii=False)


# ---- tools


def tools_in_keys(said: dict[str, object]) -> list[dict]:
    """said: "tools" or OpenAI's older "functions" -> a list of tools, each an object or JSON; the list may be JSON, too."""
    if len(said) > 1:
        raise Unreadable(f"has {quoted(said)}; keep one of them")
    [(key, value)] = said.items()
    in_text = isinstance(value, str)
    value = (parsed(value, f'"{key}"') if value.strip() else []) if in_text else value
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unreadable(f'"{key}" must be a list of tools, found {kind(value)}')
    tools, names = [], set()
    for i, given in enumerate(value, 1):
        tools.append(tool := _tool(given, f'"{key}" entry {i}', in_text))
        name = tool["function"]["name"]
        if name in names:
            raise Unreadable(f'"{key}" has the tool {quoted([name])} twice; one name must mean one tool')
        names.add(name)
    return tools


def _tool(given: object, what: str, in_text: bool) -> dict:
    if isinstance(given, str):
        given, in_text = parsed(given, what), True
    if not isinstance(given, dict):
        raise Unreadable(f"{what} must be an object with a name, found {kind(given)}")
    given = clean(given, what, keep_null=in_text)
    if given.get("function") is not None:
        tool = {"type": "function"} | given
    else:  # bare, or with its type beside its name
        tool = {"type": given.get("type", "function"), "function": {key: given[key] for key in given if key != "type"}}
    if tool["type"] != "function":
        raise Unreadable(f"{what} is of type {shown(json.dumps(tool['type'], default=str))}; only functions can be called")
    function = tool.get("function")
    if isinstance(function, dict) and isinstance(function.get("name_for_model"), str):  # Qwen's own form
        words = {"name": function["name_for_model"], "description": function.get("description_for_model", "")}
        tool["function"] = function = {**function, **words}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise Unreadable(f'{what} has no "name" (keys: {quoted(function if isinstance(function, dict) else given)})')
    return tool


def tools_in_text(system: str) -> list[dict] | None:
    """The tools that a system turn lists between <tools> and </tools>; None where they cannot be read."""
    bodies = [body for body in TOOLS_IN_TEXT.findall(system) if body.strip()]
    try:
        return [tool for body in bodies for tool in _tools_of_text(body)]
    except Unreadable:
        return None


def _tools_of_text(body: str) -> list[dict]:
    """A JSON list as Hermes has it, or an object a line as Qwen's templates write them."""
    try:
        value = parsed(body, "")
    except Unreadable:
        value = [parsed(line, "") for line in body.splitlines() if line.strip()]
    return [_tool(tool, "", True) for tool in (value if isinstance(value, list) else [value])]


# ---- calls


class FoundCall(NamedTuple):
    """call: as in the inner form. unread: keys that the file has beside it and that nothing reads."""

    id: str | None
    call: dict
    unread: tuple[str, ...] = ()


def calls_in_keys(said: dict[str, object]) -> list[FoundCall]:
    """said: "tool_calls" or OpenAI's older "function_call" -> its value."""
    if len(said) > 1:
        raise Unreadable(f"has {quoted(said)}; keep one of them")
    [(key, value)] = said.items()
    in_text = isinstance(value, str)
    value = (parsed(value, f'"{key}"') if value.strip() else []) if in_text else value
    value = [value] if key == "function_call" and isinstance(value, dict) else value
    if not isinstance(value, list):
        expected = "an object" if key == "function_call" else "a list of calls"
        raise Unreadable(f'"{key}" must be {expected}, found {kind(value)}')
    names = [f'"{key}" entry {i}' if len(value) > 1 else f'"{key}"' for i in range(1, len(value) + 1)]
    return [_call(entry, name, in_text) for entry, name in zip(value, names)]


def calls_turn(value: object) -> tuple[str, list[FoundCall], str]:
    """(content, calls, thoughts) of a turn that is one call or a list of them; <think>…</think> may stand before them."""
    thoughts, in_text = "", isinstance(value, str)
    if in_text:
        text = value.strip()
        if text.startswith("<think>"):
            if "</think>" not in text:
                raise Unreadable("has <think> but no </think>: the thoughts are cut off; write the whole turn or remove it")
            thoughts, _, text = text.removeprefix("<think>").partition("</think>")
        if text.lstrip().startswith("<tool_call>"):
            return "", calls_in_text(text)[1], thoughts.strip()
        value = parsed(text.strip(), "the call")
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise Unreadable("has no call; write one or remove the turn")
    return "", [_call(entry, "the call", in_text) for entry in entries], thoughts.strip()


def calls_in_text(text: str, tools: list[dict] = ()) -> tuple[str, list[FoundCall]]:
    """(what stands before, the calls) of an answer with <tool_call>…</tool_call>. tools: say the types of unquoted values."""
    content, calls = split_calls(text, tools)
    if not calls:
        raise Unreadable("holds <tool_call>, but not calls that can be read; they must be JSON and end the answer")
    for body in re.findall(r"<tool_call>(.*?)</tool_call>", text[len(content) :], re.DOTALL):
        if body.lstrip().startswith("{"):  # what split_calls reads without a look at keys that stand twice
            clean(parsed(body, "the call"), "the call", keep_null=True)
    for found in calls:
        clean(found, "the call", keep_null=True)
    return content, [FoundCall(None, found) for found in calls]


def _call(entry: object, what: str, in_text: bool) -> FoundCall:
    """in_text: the file gives the call as JSON in a string, so that its nulls are the author's."""
    if not isinstance(entry, dict):
        raise Unreadable(f"{what} must be an object with a name and arguments, found {kind(entry)}")
    if TWICE in entry:
        clean(entry, what, keep_null=True)
    function = entry.get("function") if entry.get("function") is not None else entry
    if entry.get("type") not in (None, "function"):
        raise Unreadable(f"{what} is of type {shown(json.dumps(entry['type'], default=str, skipkeys=True))}; only functions can be called")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise Unreadable(f'{what} has no "name" of a tool (keys: {quoted(key for key in entry if key is not TWICE)})')
    clean(name, what, keep_null=True)
    if TWICE in function:
        clean(function, what, keep_null=True)
    given_as = next((key for key in ("arguments", "parameters") if function.get(key) is not None), None)
    if given_as is None and function.keys() - {"name", "arguments", "parameters", *AROUND_CALL}:
        raise Unreadable(f'{what} of {quoted([name])} has no "arguments" (keys: {quoted(function)})')
    arguments = _arguments(function.get(given_as), f'"arguments" of {quoted([name])}', in_text)
    read = {"name", given_as, *(AROUND_CALL if function is entry else ())}
    unread = {key for key in function if key not in read and function[key] is not None}
    if function is not entry:
        unread |= {key for key in entry if key not in AROUND_CALL and entry[key] is not None}
    return FoundCall(_id(entry.get("id"), what), call(name, arguments), tuple(unread))


def _id(value: object, what: str) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    raise Unreadable(f'"id" of {what.removeprefix("the ")} must be a string, found {kind(value)}')


def _arguments(given: object, what: str, in_text: bool) -> dict:
    if given is None:
        return {}
    if isinstance(given, str):
        given, in_text = (parsed(given, what) if given.strip() else {}), True
    if not isinstance(given, dict):
        raise Unreadable(f"{what} must be a JSON object, found {kind(given)}")
    return clean(given, what, keep_null=in_text)
