"""Calls and results of a whole conversation: calls in text, turns that are one message, results put to their calls."""

import re

from . import tool_spellings
from .data_notes import Noted
from .file_findings import FileFindings, quoted
from .tool_spellings import Unreadable
from .turns import Turn

RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
NO_CALL = "a result without a call: the turn before it calls no tool in a spelling that is read (data/README.md)"
FOR_ASSEMBLY = ("ids", "calls_only", "id", "for_all")  # what Turn.more holds only until here


def assemble(found: FileFindings, noted: Noted, turns: list[Turn], tools: list[dict]) -> tuple[list[Turn], list[dict]]:
    """(the turns as messages of the inner form, the tools to be laid out beside them) of a conversation that may have tools.

    tools: those beside the turns. Plain text passes as it is where nothing in the conversation has to do with tools.
    """
    system = turns[0].content if turns[0].role == "system" else ""
    in_text = tool_spellings.tools_in_text(system) if "<tools>" in system else []
    known = tools or in_text
    listed = None if known is None else {tool["function"]["name"] for tool in known}
    turns = joined(found, [read for turn in turns for read in read_text(found, turn, known or [])])
    turns = matched(found, turns)
    check_names(found, turns, listed)
    if in_text == []:
        return [without(turn, FOR_ASSEMBLY) for turn in turns], tools
    if tools:
        noted.tools_in_text.add(found.number)
    return [without(turn, FOR_ASSEMBLY) for turn in turns], []


def without(turn: Turn, private: tuple[str, ...]) -> Turn:
    more = {key: value for key, value in (turn.more or {}).items() if key not in private}
    return turn._replace(more=more or None)


# ---- calls and results that stand in text, as Hermes and later Qwens write them


def read_text(found: FileFindings, turn: Turn, tools: list[dict]) -> list[Turn]:
    """The turn, with <tool_call> read into calls; a turn of <tool_response>s as one result each."""
    if turn.role == "assistant" and "<tool_call>" in turn.content and not (turn.more or {}).get("tool_calls"):
        try:
            content, calls = tool_spellings.calls_in_text(turn.content, tools)
        except Unreadable as error:
            found.find(str(error), turn.place)
            return [turn]
        more = {"tool_calls": [each.call for each in calls], "ids": [None] * len(calls)}
        return [turn._replace(content=content, more=(turn.more or {}) | more)]
    if turn.role in ("tool", "user") and turn.content.lstrip().startswith("<tool_response>"):
        results = RESPONSE.findall(turn.content) if turn.content.rstrip().endswith("</tool_response>") else []
        if results and not RESPONSE.sub("", turn.content).strip():
            more = (turn.more or {}) if len(results) == 1 else {}
            return [Turn(turn.place, "tool", result, more) for result in results]
    return [turn]


# ---- turns that are one message


def joined(found: FileFindings, turns: list[Turn]) -> list[Turn]:
    """Turns of nothing but calls, put to the answer or the calls directly before them."""
    messages: list[Turn] = []
    for turn in turns:
        before = messages[-1] if messages else None
        if before and before.role == "assistant" and (turn.more or {}).get("calls_only"):
            messages[-1] = before._replace(more=_together(found, before, turn))
        else:
            messages.append(turn)
    return messages


def _together(found: FileFindings, answer: Turn, calls: Turn) -> dict:
    first, second = answer.more or {}, calls.more
    if first.get("weight", 1) != second.get("weight", 1):
        what = "they are to be learned differently; say the same on both"
        found.find(f"is one message with {answer.place}, but {what}", calls.place)
    thoughts = {key: text for more in (first, second) if (text := more.get(key := "reasoning_content"))}
    if len({first.get("reasoning_content"), second.get("reasoning_content")} - {None}) > 1:
        what = "both have thoughts; put them together"
        found.find(f"is one message with {answer.place}, but {what}", calls.place)
    both = {key: first.get(key, []) + second.get(key, []) for key in ("tool_calls", "ids")}
    return first | second | thoughts | both


# ---- results and their calls


def matched(found: FileFindings, turns: list[Turn]) -> list[Turn]:
    """Puts the results behind each answer into the order of its calls, by their ids where there are any."""
    messages, i = [], 0
    while i < len(turns):
        turn, end = turns[i], i + 1
        while end < len(turns) and turns[end].role == "tool":
            end += 1
        results = turns[i + 1 : end]
        messages.append(turn)
        if turn.role == "tool":  # only the first turn of all: every other result stands behind another turn
            results = turns[i:end]
            messages.pop()
        calls = (turn.more or {}).get("tool_calls", []) if turn.role == "assistant" else []
        if calls and (results or end < len(turns)):  # calls that end a conversation need no result
            messages += _results_of(found, turn, calls, results)
        else:
            for result in results:
                found.find(NO_CALL, result.place)
            messages += results
        i = end
    return messages


def _results_of(found: FileFindings, answer: Turn, calls: list[dict], results: list[Turn]) -> list[Turn]:
    names = [call["function"]["name"] for call in calls]
    if len(results) == 1 and len(calls) > 1 and results[0].more.get("for_all"):
        return results  # ShareGPT has one observation, however many calls there were
    ids, by_call, in_order = answer.more["ids"], {}, []
    if len(set(ids) - {None}) < len([id for id in ids if id]):
        found.find(f"two calls have the id {quoted(sorted({id for id in ids if id and ids.count(id) > 1}))}; give each its own", answer.place)
        return results
    for result in results:
        id = result.more.get("id")
        if id is None or not any(ids):
            in_order.append(result)
        elif id not in ids:
            found.find(f'a result without a call: the answer before it makes no call {quoted([id])}', result.place)
        elif ids.index(id) in by_call:
            found.find(f'a second result of the call {quoted([id])}; keep one of them', result.place)
        else:
            by_call[ids.index(id)] = result
    for at in range(len(calls)):
        if at not in by_call and in_order:
            by_call[at] = result = in_order.pop(0)
            if result.more.get("name", names[at]) != names[at]:
                what = f'a result of {quoted([result.more["name"]])}, but the call that it answers is of {quoted([names[at]])}'
                found.find(f"{what}; put results into the order of the calls, or give both ids", result.place)
    for result in in_order:
        found.find(f"a result without a call: the answer before it makes {len(calls)}", result.place)
    missing = [name for at, name in enumerate(names) if at not in by_call]
    if missing:
        found.find(f"calls {quoted(missing)}, and no result of it follows; add it or remove the call", answer.place)
    return [by_call[at]._replace(more={"name": names[at]}) for at in sorted(by_call)]


def check_names(found: FileFindings, turns: list[Turn], listed: set[str] | None) -> None:
    """Every tool that is called must be listed. listed: None where the list cannot be read."""
    if listed is None:
        return
    for turn in turns:
        for call in (turn.more or {}).get("tool_calls", []):
            name = call["function"]["name"]
            if not listed:
                return found.find(f'calls {quoted([name])}, but the sample has no "tools"; list them beside the turns', turn.place)
            if name not in listed:
                found.find(f'calls {quoted([name])}, which is not among its tools ({quoted(sorted(listed))})', turn.place)
