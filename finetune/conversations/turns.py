"""One turn of a conversation file, in whatever spelling: checked by itself, and read into role, content and what it says."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..data_files.window import TWICE
from . import keys, tool_spellings
from .data_notes import Noted
from .file_findings import FileFindings, half_character, kind, quoted
from .tool_spellings import Unreadable

PLAIN_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
OTHER_NAMES = {
    "system": ("developer", "sys", "系统"),  # developer: OpenAI's newer word
    "user": ("prompter", "client", "customer", "person", "usr", "question", "用户", "人类"),  # prompter: Open Assistant
    "assistant": ("chatgpt", "gpt4", "gpt-4", "bot", "chatbot", "model", "ai", "agent", "bing", "bard", "claude", "gemini", "llama", "qwen", "moss",
                  "llm", "answer", "助手", "机器人"),
    "calls": (
        "function_call",  # ShareGPT, LLaMA-Factory
        "function-call",
        "tool_call",  # ms-swift
    ),
    "tool": (
        "tool_response",  # ms-swift
        "function",  # OpenAI's older form
        "function_response",
        "function-response",
        "observation",  # ShareGPT, LLaMA-Factory
        "ipython",  # Llama 3
    ),
}  # fmt: skip
ROLES = PLAIN_ROLES | {"tool": "tool"} | {name: role for role, names in OTHER_NAMES.items() for name in names}
ALLOWED = "allowed: system, user, assistant, tool and their other names in data/README.md"
NUMBERS = f"true, false, 0 or a number from {keys.LEAST:f} to {keys.MOST:,.0f}"
TEXT_ONLY = 'only {"type": "text", "text": "…"} can be trained on'
TEXT_PARTS = ("text", "refusal")  # each has its text under its own name
TWO_THOUGHTS = "has thoughts twice ({}), which differ; keep one of them"


class Turn(NamedTuple):
    """place: how messages name it, "turn 3" or, of a single question and answer, its field.

    more: what else the message has in the inner form (see messages.py): weight, reasoning_content, tool_calls, name.
    Until tool_turns.assemble has put calls and results together also: ids (of the calls) and calls_only; of a result,
    id, and for_all where it may answer all calls before it.
    """

    place: str
    role: str
    content: str
    more: dict | None = None

    def message(self) -> dict:
        message = {"role": self.role, "content": self.content}
        return message | self.more if self.more else message


@dataclass
class TurnReader:
    """Reads the turns of one file. with_tools: has a turn of the current sample calls, results or tools?"""

    found: FileFindings
    noted: Noted
    with_tools: bool = False
    tools: object = None  # those that the current sample's system turn brings
    marked: set[str] = field(default_factory=set)  # places of the current sample's answers whose weight the file states

    def turn(self, place: str, message: object, speaker: str, text: str) -> Turn | None:
        """speaker, text: the keys of the role and the content."""
        if not isinstance(message, dict):
            return self.found.find(f'must be an object with "{speaker}" and "{text}", found {kind(message)}', place)
        role, content = message.get(speaker), message.get(text)
        if (
            type(role) is str
            and role in PLAIN_ROLES
            and type(content) is str
            and not half_character(content)
            and (len(message) == 2 or list(message.values()).count(None) == len(message) - 2)
        ):
            return Turn(place, PLAIN_ROLES[role], content)  # the usual turn; what follows is for the others
        before = self.found.count
        self.found.once(message, place)
        role = self._role(message, speaker, place)
        given = self._sorted_by_kind(message, {speaker, text}, role, place)
        if role in ("assistant", "calls"):
            turn = self._answer(message, text, role, given, place)
        else:
            turn = self._other(message, speaker, text, role, given, place)
        return turn if self.found.count == before else None

    def _sorted_by_kind(self, message: dict, known: set[str], role: str | None, place: str) -> dict[str, dict]:
        """The keys of keys.ON_TURN that the turn has, by what they are; notes the others."""
        given: dict[str, dict] = {}
        for key, value in message.items():
            what = keys.ON_TURN.get(key)
            if value is None or key is TWICE or key in known or (key == "name" and role == "tool"):
                continue
            if what is None or (what == "result" and role != "tool"):
                self._note_unread([key])
            elif what == "refused":
                if key == "label" and value not in (0, 1):  # a class, or what somebody thinks of the answer
                    self.noted.unread_key(self.found.number, key)
                elif value not in keys.REFUSED_ON_TURNS[key].harmless:
                    self.found.refuse(keys.REFUSED_ON_TURNS[key], f'"{key}" on a turn')
            elif what == "media":
                if value:
                    self.found.refuse(keys.SHOWN_MEDIA, f'"{key}"')
            elif what == "learn" or value not in ("", [], {}):
                given.setdefault(what, {})[key] = value
        return given

    def _note_unread(self, names: Iterable[str]) -> None:
        for name in names:
            self.noted.unread_key(self.found.number, name)

    def _role(self, message: dict, speaker: str, place: str) -> str | None:
        if speaker not in message:
            return self.found.missing(speaker, message, place)
        role = message[speaker]
        if not isinstance(role, str):
            return self.found.find(f'"{speaker}" must be a string, found {kind(role)}', place)
        known = ROLES.get(role) or ROLES.get(role.strip().lower())
        if known is None:
            guess = self.found.meant(role.strip().lower(), (*PLAIN_ROLES, "tool"))
            meant = f'; did you mean "{guess}"?' if guess else ""
            return self.found.find(f"role {quoted([role])} unknown; {ALLOWED}{meant}", place)
        return known

    # ---- answers

    def _answer(self, message: dict, text: str, role: str, given: dict[str, dict], place: str) -> Turn | None:
        """An answer, or a turn that holds nothing but calls."""
        more, thoughts, calls = {}, self.thoughts(given.get("thoughts", {}), place), []
        if role == "calls":
            content, calls, in_text = self._calls_turn(message, text, place)
            more["calls_only"] = True
            if "refusal" in given:
                self.found.find('"refusal" on a turn of calls; only an answer can have it', place)
        else:
            content, in_text = self._answer_text(message, text, given, place)
        if given.get("calls"):
            calls += self._read(tool_spellings.calls_in_keys, given["calls"], place) or []
        if "tools" in given:
            self.found.find(f"{quoted(given['tools'])} must stand beside the turns, not on an answer", place)
        if in_text:
            if thoughts and thoughts != in_text:
                self.found.find(TWO_THOUGHTS.format(f"{quoted(given['thoughts'])} and the content"), place)
            thoughts = in_text
        if given.get("thoughts") and thoughts and content.lstrip().startswith("<think>"):
            both = f"{quoted(given['thoughts'])} and <think> in the content"
            self.found.find(f"has thoughts twice ({both}); keep one of them", place)
        weight = self.weight(given.get("learn", {}), place)
        if thoughts and thoughts.strip():
            more["reasoning_content"] = thoughts
        if calls:
            self.with_tools = True
            more |= {"tool_calls": [each.call for each in calls], "ids": [each.id for each in calls]}
            self._note_unread(key for each in calls for key in each.unread)
        if given.get("learn"):
            self.marked.add(place)
        if weight != 1:
            more["weight"] = weight
        return Turn(place, "assistant", content, more or None)

    def _answer_text(self, message: dict, text: str, given: dict, place: str) -> tuple[str, str]:
        """(content, thoughts among its parts)."""
        refusal = given.get("refusal", {}).get("refusal")
        if message.get(text) in (None, "", []) and (refusal or "calls" in given):
            return (self.text(refusal, "refusal", place) or "" if refusal else ""), ""
        if text not in message:
            self.found.missing(text, message, place)
            return "", ""
        if refusal and refusal != message[text]:
            self.found.find(f'has "{text}" and "refusal"; keep one of them', place)
        return self._parts_or_text(message[text], text, place, thoughts=True)

    def _calls_turn(self, message: dict, text: str, place: str) -> tuple[str, list, str]:
        """(content, calls, thoughts) of a turn whose text is calls."""
        if text not in message:
            self.found.missing(text, message, place)
            return "", [], ""
        return self._read(tool_spellings.calls_turn, message[text], place) or ("", [], "")

    def _read(self, read, value: object, place: str):
        """read(value), or a finding."""
        try:
            return read(value)
        except Unreadable as error:
            return self.found.find(str(error), place)

    def thoughts(self, said: dict[str, object], place: str = "") -> str:
        """The thoughts that the keys of keys.THOUGHTS give; "" for none."""
        texts = {key: self.text(value, key, place) or "" for key, value in said.items()}
        different = {text for text in texts.values() if text.strip()}
        if len(different) > 1:
            self.found.find(TWO_THOUGHTS.format(quoted(texts)), place)
        return max(different, default="")

    def weight(self, said: dict[str, object], place: str = "") -> float:
        """What the keys of keys.TRAINED and keys.MASKED say of an answer, or of all answers of a sample."""
        good = {}
        for key, value in said.items():
            if keys.weight_of(key, value) is not None:
                good[key] = value
                continue
            allowed = "true or false" if key in keys.MASKED else NUMBERS
            shown = f"found {value}" if isinstance(value, int | float) and abs(value) < 1e15 else f"found {kind(value)}"
            shown = shown if not isinstance(value, float) or math.isfinite(value) else "found a number that is not finite"
            self.found.find(f'"{key}" must be {allowed}, {shown}', place)
        weight = keys.one_weight(good)
        if weight is None:
            self.found.find(f"{quoted(good)} contradict each other; keep one of them", place)
        return 1.0 if weight is None else weight

    # ---- all other turns

    def _other(self, message: dict, speaker: str, text: str, role: str | None, given: dict, place: str) -> Turn | None:
        """A turn that is no answer. role: None where it could not be read."""
        for what, found in given.items():
            if what == "learn":
                before = self.found.count
                if self.weight(found, place) and role and self.found.count == before:
                    self.found.find(f"{quoted(found)} on role {role}: only answers are learned; remove it there", place)
            elif what == "tools" and role == "system":
                self.tools, self.with_tools = found, True
            elif what == "tools" and role:
                self.found.find(f"{quoted(found)} must stand beside the turns, not on role {role}", place)
            elif what in ("thoughts", "calls", "refusal") and role:
                self.found.find(f"{quoted(found)} on role {role}; only an answer can have it", place)
        if role == "tool":
            return self._result(message, speaker, text, given, place)
        if text not in message:
            if role == "system" and "tools" in given:
                return Turn(place, role, "")
            return self.found.missing(text, message, place)
        if role == "system" and message[text] is None:
            return Turn(place, role, "") if "tools" in given else None
        content, _ = self._parts_or_text(message[text], text, place)
        return Turn(place, role, content) if role else None

    def _result(self, message: dict, speaker: str, text: str, given: dict, place: str) -> Turn | None:
        """A tool's result: text, text in parts, or any other value as its JSON."""
        if text not in message:
            return self.found.missing(text, message, place)
        value, more = message[text], {"for_all": message[speaker] == "observation"}
        for key, name in (("id", "tool_call_id"), ("name", "name")):
            if message.get(name) not in (None, ""):
                more[key] = self.text(message[name], name, place)
        self.with_tools = True
        if isinstance(value, list) and value and all(_is_part(part) for part in value):
            content, _ = self._parts_or_text(value, text, place)
        elif value is None or isinstance(value, str):
            content = self.text(value or "", text, place)
        else:
            content = self._read(tool_spellings.as_json, value, place)
        return Turn(place, "tool", content or "", more)

    # ---- texts

    def _parts_or_text(self, value: object, name: str, place: str, thoughts: bool = False) -> tuple[str, str]:
        """(text, thoughts) of a content: a string, or OpenAI's list of parts, whose texts are joined as they are."""
        if name != "content" or not isinstance(value, list):
            return self.text(value, name, place) or "", ""
        texts, thought = [], []
        for i, part in enumerate(value, 1):
            what = _type_of(part)
            if what in keys.MEDIA_PARTS:
                self.found.refuse(keys.SHOWN_MEDIA, f'a part of type "{what}"')
            elif what in TEXT_PARTS and isinstance(part.get(what), str):
                texts.append(self._of_part(part, what, f'"{name}" part {i}', place))
            elif what in keys.THOUGHT_PARTS and thoughts:
                thought.append(self._thought_part(part, f'"{name}" part {i}', place))
            else:
                shown = f"type {quoted([what])}" if what else kind(part)
                self.found.find(f'"{name}" part {i} is {shown}; {TEXT_ONLY}', place)
                break
        return "".join(texts), "".join(thought)

    def _thought_part(self, part: dict, name: str, place: str) -> str:
        key = next((key for key in keys.THOUGHT_PARTS[part["type"]] if part.get(key) is not None), part["type"])
        inner = part.get(key)
        if isinstance(inner, list) and all(isinstance(each, dict) for each in inner):  # Mistral: in parts again
            part = part | {key: "".join(self._of_part(each, "text", name, place) for each in inner)}
        return self._of_part(part, key, name, place)

    def _of_part(self, part: dict, key: str, name: str, place: str) -> str:
        """The text under a key of a part."""
        self.found.once(part, place)
        self._note_unread(other for other in part if other not in ("type", key, TWICE) and part[other] is not None)
        return self.text(part.get(key), name, place, quote="") or ""

    def text(self, value: object, name: str, place: str = "", quote: str = '"') -> str | None:
        """value, where it is a text that can be learned."""
        if not isinstance(value, str):
            return self.found.find(f"{quote}{name}{quote} must be a string, found {kind(value)}", place)
        if half := half_character(value):
            what = f"holds half of a character (\\u{ord(half[0]):x} alone); write it whole or remove it"
            return self.found.find(f"{quote}{name}{quote} {what}", place)
        return value


def _is_part(value: object) -> bool:
    """Is an entry of a result's list a part of a content? It may be data: {"type": "file", "name": "a.txt"} in a folder."""
    what = value.get("type") if isinstance(value, dict) else None
    return what in (*TEXT_PARTS, *keys.MEDIA_PARTS) and any(key in value for key in (what, "data", "source"))


def _type_of(part: object) -> str | None:
    """The type of a part of a content; Qwen-VL has no "type", but {"image": "a.png"}."""
    if not isinstance(part, dict):
        return None
    if "type" not in part:
        return next((key for key in part if key in keys.MEDIA_PARTS), None)
    return part["type"] if isinstance(part["type"], str) else None
