"""Whole conversations: who may follow whom, is there something to learn, and texts that are not what they seem."""

import re
from itertools import pairwise

from .data_notes import Noted
from .file_findings import FileFindings
from .keys import SHOWN_MEDIA
from .turns import Turn

# where a picture stands in a text: at its beginning, at its end, or alone on a line; Qwen-VL writes its path into the tag
IN_PLACE = re.compile(r"\A\s*{0}|{0}\s*\Z|^[ \t]*{0}[ \t]*\r?$".format("(<(?:image|audio|video)>)"), re.MULTILINE)
QWEN_VL = re.compile(r"<img>[^<\n]*</img>")


def settle(noted: Noted, number: int, turns: list[Turn], marked: set[str], drop: bool = False) -> list[Turn]:
    """The turns of sample `number` as they are trained on: an answer before the first question is context, unless it is marked.

    marked: places of the answers whose weight the file states. drop: a last question without an answer is left out, where another
    answer is there.
    """
    if drop and turns[-1].role == "user" and any(turn.role == "assistant" for turn in turns):
        noted.unanswered.add(number)
        turns = turns[:-1]
    first = 1 if turns[0].role == "system" else 0
    if len(turns) > first and turns[first].role == "assistant":
        noted.greetings.add(number)
        if turns[first].place not in marked:  # a model is never asked to speak first
            context = turns[first]._replace(more=(turns[first].more or {}) | {"weight": 0.0})
            turns = [*turns[:first], context, *turns[first + 1 :]]
    return turns


def check(found: FileFindings, noted: Noted, turns: list[Turn]) -> None:
    """turns: as messages of the inner form, settled."""
    for before, turn in pairwise(turns):
        role = turn.role
        if role == "system":
            found.find("system turn only allowed first", turn.place)
        elif role == before.role and role != "tool":
            found.find(f"are both {role}; join them or add the turn between them", _two(before.place, turn.place))
        elif role == "user" and before.role == "tool":
            found.find("the result before it has no answer; add the turn between them", turn.place)
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        found.find("no assistant answer to learn from; add one, or remove the sample")
    elif turns[-1].role == "user":
        what = "last user turn has no answer; add it or remove the turn (--bad_samples drop removes such turns)"
        found.find(what, turns[-1].place)
    elif turns[-1].role == "tool":
        what = "nothing follows this result; add the answer, or remove the turns behind the last answer"
        found.find(what, turns[-1].place)
    elif all(turn.more and turn.more.get("weight") == 0 for turn in answers):
        marks = '"train": false, "weight": 0 or the like'
        if len(answers) == 1 and turns[turns[0].role == "system"] is answers[0]:
            found.find('only answer is before any question; mark it with "train": true to learn it, or remove the sample')
        else:
            found.find(f"no assistant answer to learn from: all are marked as not to be learned ({marks}); remove the sample")
    for turn in turns:
        _, role, content, more = turn
        if role == "assistant":
            if not content.strip() and not (more and "tool_calls" in more):
                found.find("empty answer; write one or remove the sample", turn.place)
            if "think>" in content:
                _check_thoughts(found, noted, turn)
                alone = content.rpartition("</think>")[2]
                if content.strip() and not alone.strip() and not (more and "tool_calls" in more):
                    found.find("thoughts without an answer; write one behind </think> or remove the sample", turn.place)
        elif role == "user" and "<" in content:
            _check_media(found, content)


def _check_thoughts(found: FileFindings, noted: Noted, answer: Turn) -> None:
    opened, closed = "<think>" in answer.content, "</think>" in answer.content
    if opened and not closed:
        if answer.content.lstrip().startswith("<think>"):
            found.find("<think> without </think>: the answer was cut off; write it whole or remove the sample", answer.place)
        noted.unclosed.add(found.number)
    if closed and not opened:
        noted.unopened.add(found.number)


def _check_media(found: FileFindings, text: str) -> None:
    """What stands for a picture; a tag that is closed, or that a sentence speaks of, is text about HTML."""
    if "<image>" in text or "<audio>" in text or "<video>" in text:
        tags = {tag for tags in IN_PLACE.findall(text) for tag in tags if tag}
        for tag in sorted(tags):
            if f"</{tag[1:]}" not in text:
                found.refuse(SHOWN_MEDIA, f"{tag} in a user's text")
    if "<img>" in text and QWEN_VL.search(text):
        found.refuse(SHOWN_MEDIA, "<img>…</img> in a user's text")


def _two(a: str, b: str) -> str:
    """ "turns 2,3", or the names of two fields."""
    return f"turns {a[5:]},{b[5:]}" if a.startswith("turn ") else f"{a} and {b}"
