"""--tools: reading the file, and a conversation in which the model calls tools and the user says what they give back."""

import json
from pathlib import Path

from ..errors import UserError, visible

REMEDY = 'give a JSON list of tools: {"name": ..., "description": ..., "parameters": ...}, or that as "function" of each'


def read_tools(path: Path) -> list[dict]:
    """The tools of a file, in OpenAI's form. It may have them bare, or in Qwen's own form (name_for_model ...)."""
    from qwen_model.react import function_of

    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"--tools {path}: {error} - {REMEDY}") from error
    if not isinstance(found, list) or not found:
        raise UserError(f"--tools {path}: not a list of tools - {REMEDY}")
    tools, problems = [], []
    for number, tool in enumerate(found, 1):
        try:
            plain = function_of(tool, number)
        except ValueError as error:
            problems.append(f"--tools {path}: {error} - {REMEDY}")
            continue
        tools.append(tool if "function" in tool else {"type": "function", "function": tool if "name" in tool else plain})
    if problems:
        raise UserError(*problems)
    return tools


def told(message: dict) -> str:
    """A message of the model in lines: thoughts, content, calls."""
    thoughts, calls = message.get("reasoning_content"), message.get("tool_calls", [])
    lines = [f"thinks: {thoughts}"] if thoughts else []
    lines += [message["content"]] if message["content"] or not (thoughts or calls) else []
    return "\n".join([*lines, *(f"calls {written(call)}" for call in calls)])


def written(call: dict) -> str:
    """A call as name(arguments)."""
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{call['function']['name']}({text})"


def asked(what: str) -> str:
    """A line from the terminal; "" at the end."""
    try:
        return input(what).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def converse_with_tools(answerer, tools: list[dict]) -> None:
    """Reads questions, and the results of what the model calls, until an empty line or the end."""
    messages = []
    while question := asked("you: "):
        messages.append({"role": "user", "content": question})
        waiting = True
        while waiting:
            message = answerer.reply(messages, tools)
            print(f"model: {visible(told(message))}", flush=True)
            messages.append(message)
            waiting = message.get("tool_calls", [])
            for call in waiting:
                name = call["function"]["name"]
                result = asked(f"result of {name}: ")
                if not result:
                    return
                messages.append({"role": "tool", "content": result, "name": name})
