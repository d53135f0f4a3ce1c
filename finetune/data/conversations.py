"""Reads and validates conversations: every finding of a file at once, each with file, sample, turn, field and remedy.

Samples and turns are counted from 1. First each turn is checked by itself (`_Checker.turns`), then their order
(`_Checker._order`); what is allowed but worth a line is counted in data_notes.py.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tqdm import tqdm

from ..errors import UserError, on_first_rank
from .data_notes import Noted
from .sample_files import TWICE, SampleFile

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
FIELDS = {"conversations": ("from", "value"), "messages": ("role", "content")}  # the documented form, OpenAI's
FORMS = ("conversations", "messages", "instruction")  # the last one is alpaca's
KNOWN = {"id", "system", *FORMS}
KNOWN_ALPACA = {"id", "system", "instruction", "input", "output", "history"}
SURROGATE = re.compile("[\ud800-\udfff]")
BEGINNING_BYTES = 8 << 20  # a tenth to half a second of work
SHOWN = 20  # findings of one file that are printed
KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


class Turn(NamedTuple):
    """place: how messages name it, "turn 3" or, in the alpaca form, its field."""

    place: str
    role: str
    content: str
    train: bool | None = None

    def message(self) -> dict:
        """As the renderer takes it; "train" only where the file says it."""
        message = {"role": self.role, "content": self.content}
        return message if self.train is None else message | {"train": self.train}


class Conversations:
    """The conversations of one validated file. Iterating reads the file again, so that no more than one is in memory.

    len() is their number; each is a list of messages {"role", "content", optional "train"}. notes: lines to print.
    """

    def __init__(self, file: SampleFile, count: int, notes: list[str]):
        self.file, self.count, self.notes = file, count, notes

    @property
    def path(self) -> str:
        return self.file.path

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[dict]]:
        checker = _Checker(self.path)
        for line, sample in self.file:
            yield [turn.message() for turn in checker.turns(line, sample)]


def read(path: str | os.PathLike, *, allow_special: bool = False, flag: str = "--data_path") -> Conversations:
    """Reads a whole file (see data/README.md for its forms) and checks every sample; holds none of them.

    allow_special: special-token text becomes control tokens; here it only words the note about it.
    flag: the option that named the file. Raises UserError with all findings, of which 20 are spelt out.
    """
    file = SampleFile(path, flag)
    checker = _Checker(file.path)
    bar = {"desc": "checking data", "unit": "B", "unit_scale": True, "delay": 2, "disable": not on_first_rank()}
    with tqdm(total=file.bytes, **bar) as progress:
        try:
            for line, sample in file:
                checker.check(line, sample)
                if not checker.number % 256:
                    progress.update(file.position - progress.n)
        except UserError as error:  # broken JSON ends the reading; what was found before it counts too
            checker.stop(error)
        else:
            checker.finish(file.layout)
    return Conversations(file, checker.number, checker.noted.lines(allow_special))


def begins_well(path: str | os.PathLike, flag: str = "--data_path") -> bool:
    """Is nothing wrong with the first BEGINNING_BYTES of a file? read() tells what is.

    For a program that reads the file later, after what takes seconds: of a file of usual size it is all.
    """
    try:
        file = SampleFile(path, flag)
        checker = _Checker(file.path)
        for line, sample in file:
            checker.check(line, sample)
            if checker.count or file.position > BEGINNING_BYTES:
                return not checker.count
        checker.finish(file.layout)
    except UserError:
        return False
    return True


@dataclass
class _Checker:
    """Walks through the samples of one file and keeps what is wrong with them, and what is worth a note."""

    path: str
    number: int = 0
    line: int | None = None
    findings: list[str] = field(default_factory=list)
    count: int = 0  # findings in all
    forms: dict[str, int] = field(default_factory=dict)  # form -> first sample
    nameless: tuple[str, ...] | None = None  # the keys of a first sample that has no form and no lookalike of one
    noted: Noted = field(default_factory=Noted)

    def find(self, finding: str, place: str = "") -> None:
        """Adds a finding about the current sample."""
        self.count += 1
        if self.count <= SHOWN:
            line = f" (line {self.line})" if self.line and self.line > 1 else ""
            self.findings.append(f"{self.path}: sample {self.number}{line}{' ' * bool(place)}{place}: {finding}")

    def check(self, line: int | None, sample: object) -> None:
        """Checks one sample, with everything the notes need."""
        before = self.count
        turns = self.turns(line, sample)
        if turns and self.count == before:
            self._order(turns)
            self.noted.conversation(self.number, turns)

    def turns(self, line: int | None, sample: object) -> list[Turn]:
        """The turns of the next sample, each checked by itself."""
        self.number, self.line = self.number + 1, line
        if not isinstance(sample, dict):
            self.find(f'must be an object with "conversations", found {_kind(sample)}')
            return []
        self._once(sample)
        found = [key for key in FORMS if key in sample]
        if len(found) != 1:
            self._no_form(sample, found)
            return []
        turns = self._alpaca(sample) if found == ["instruction"] else self._chat(sample, found[0])
        return self._system(sample, turns) if turns else turns

    # ---- forms

    def _chat(self, sample: dict, container: str) -> list[Turn]:
        messages = sample[container]
        self._mark_unread(sample, KNOWN)
        if not isinstance(messages, list):
            self.find(f'"{container}" must be a list of turns, found {_kind(messages)}')
            return []
        if not messages:
            self.forms.setdefault(_form(container, FIELDS[container]), self.number)
            self.find("empty conversation; remove it")
            return []
        speaker, text = _fields(container, messages[0])
        self.forms.setdefault(_form(container, (speaker, text)), self.number)
        turns = [self._turn(f"turn {t}", message, speaker, text) for t, message in enumerate(messages, 1)]
        return [turn for turn in turns if turn]

    def _turn(self, place: str, message: object, speaker: str, text: str) -> Turn | None:
        if not isinstance(message, dict):
            return self.find(f'must be an object with "{speaker}" and "{text}", found {_kind(message)}', place)
        role, content = message.get(speaker), message.get(text)
        if (
            len(message) == 2
            and type(role) is str
            and role in ROLES
            and type(content) is str
            and not _half_character(content)
        ):
            return Turn(place, ROLES[role], content)  # the usual turn; what follows is for the others
        self._once(message, place)
        missing = [key for key in (speaker, text) if key not in message]
        for key in missing:
            self.find(_missing(key, message), place)
        role = None if speaker in missing else self._role(message[speaker], speaker, place)
        content = None if text in missing else self._text(message[text], text, place, parts=text == "content")
        train = message.get("train")
        if train is not None and (role != "assistant" or not isinstance(train, bool)):
            wrong = (
                f"found {_kind(train)}"
                if not isinstance(train, bool)
                else f"only on an assistant turn, found on role {role}"
            )
            self.find(f'"train" must be true or false, {wrong}', place)
        self._mark_unread(message, {speaker, text, "train"})
        return None if role is None or content is None else Turn(place, role, content, train)

    def _role(self, role: object, speaker: str, place: str) -> str | None:
        if not isinstance(role, str):
            return self.find(f'"{speaker}" must be a string, found {_kind(role)}', place)
        if role not in ROLES:
            guess = difflib.get_close_matches(role.strip().lower(), ROLES, 1, 0.75)
            meant = f'; did you mean "{guess[0]}"?' if guess else ""
            allowed = "system, user, assistant (human and gpt are read as user and assistant)"
            return self.find(f'role "{role}" unknown; allowed: {allowed}{meant}', place)
        return ROLES[role]

    def _text(self, value: object, name: str, place: str = "", parts: bool = False) -> str | None:
        """The text of a field; parts: also OpenAI's list of {"type": "text", "text": …}, joined as they are."""
        if parts and isinstance(value, list):
            for i, part in enumerate(value, 1):
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    shown = f'type "{part["type"]}"' if isinstance(part, dict) and "type" in part else _kind(part)
                    text_only = 'only {"type": "text", "text": "…"} can be trained on'
                    return self.find(f'"{name}" part {i} is {shown}; {text_only}', place)
            value = "".join(part["text"] for part in value)
        if not isinstance(value, str):
            return self.find(f'"{name}" must be a string, found {_kind(value)}', place)
        if half := _half_character(value):
            return self.find(
                f'"{name}" holds half of a character (\\u{ord(half[0]):x} alone); write it whole or remove it', place
            )
        return value

    def _alpaca(self, sample: dict) -> list[Turn]:
        """history's pairs, then instruction and input on lines of their own, then output."""
        self.forms.setdefault('"instruction"/"output"', self.number)
        self._mark_unread(sample, KNOWN_ALPACA)
        before = self.count
        pairs = sample.get("history")
        turns = []
        if pairs is not None and not isinstance(pairs, list):
            self.find(f'"history" must be a list of [question, answer] pairs, found {_kind(pairs)}')
        else:
            for i, pair in enumerate(pairs or [], 1):
                if not isinstance(pair, list) or len(pair) != 2:
                    self.find(f"must be a [question, answer] pair, found {_kind(pair)}", f"history {i}")
                    continue
                for role, name, text in zip(("user", "assistant"), ("question", "answer"), pair):
                    turns.append(Turn(f"history {i} {name}", role, self._text(text, name, f"history {i}")))
        if "output" not in sample:
            self.find(_missing("output", sample))
        question = [self._text(sample["instruction"], "instruction")]
        if sample.get("input") is not None:
            question.append(self._text(sample["input"], "input"))
        answer = self._text(sample.get("output", ""), "output")
        if self.count > before:
            return []
        prompt = "\n".join(text for text in question if text)
        return [*turns, Turn('"instruction"', "user", prompt), Turn('"output"', "assistant", answer)]

    def _system(self, sample: dict, turns: list[Turn]) -> list[Turn]:
        """Puts a "system" that stands beside the turns before them; an empty one counts as none."""
        system = sample.get("system")
        if system is None or system == "":
            return turns
        if turns[0].role == "system":
            self.find('has a "system" and a system turn; keep one')
        text = self._text(system, "system")
        return turns if text is None else [Turn('"system"', "system", text), *turns]

    def _no_form(self, sample: dict, found: list[str]) -> None:
        if found:
            return self.find(f"has {_quoted(found)}; keep one of them")
        keys = [key for key in sample if key is not TWICE]
        if {"from", "value"} <= set(keys) or {"role", "content"} <= set(keys):
            return self.find('is a single turn; put the turns of a conversation into {"conversations": [...]}')
        if "output" in keys:
            return self.find(_missing("instruction", sample))
        for key in keys:
            guess = difflib.get_close_matches(key.lower(), FORMS, 1, 0.75) or _lookalike(sample[key])
            if guess:
                shown = f'did you mean "{guess[0]}"? Rename the key "{key}"'
                return self.find(f'no "{guess[0]}" (keys: {_quoted(keys)}); {shown}')
        if self.number == 1:
            self.nameless = tuple(keys)
        expected = 'expected "conversations" (from/value), "messages" (role/content) or "instruction"/"output"'
        self.find(f'no "conversations" (keys: {_quoted(keys)}); {expected}')

    def _once(self, value: dict, place: str = "") -> None:
        if TWICE in value:
            self.find(f'has "{value[TWICE]}" twice; one of them would be lost', place)

    def _mark_unread(self, value: dict, known: set[str]) -> None:
        for key in value.keys() - known:
            if key is not TWICE:
                self.noted.unread_key(self.number, key)

    # ---- whole conversations

    def _order(self, turns: list[Turn]) -> None:
        """Who may follow whom, and whether there is something to learn."""
        for before, turn in pairwise(turns):
            if turn.role == "system":
                self.find("system turn only allowed first", turn.place)
            elif turn.role == before.role:
                self.find(
                    f"{_two(before.place, turn.place)} are both {turn.role}; join them or add the turn between them"
                )
        first = turns[turns[0].role == "system" :][:1]
        if first and first[0].role == "assistant":
            self.find("starts with assistant; the first turn (after a system turn) must be the user's")
        answers = [turn for turn in turns if turn.role == "assistant"]
        if not answers:
            self.find("no assistant answer to learn from")
        elif turns[-1].role == "user":
            self.find("last user turn has no answer; add it or remove the turn", turns[-1].place)
        elif all(turn.train is False for turn in answers):
            self.find('no assistant answer to learn from: every one has "train": false')
        for turn in answers:
            if not turn.content.strip():
                self.find("empty answer; write one or remove the sample", turn.place)

    # ---- what comes of it

    def stop(self, error: UserError) -> None:
        """Ends with the findings so far and those of error."""
        raise UserError(*self._shown(), *error.findings)

    def finish(self, layout: str) -> None:
        """Raises the file's findings, all together."""
        if not self.number:
            raise UserError(f"{self.path}: no samples")
        if self.number == 1 and layout == "lines" and self.nameless is not None:
            raise UserError(
                f"{self.path}: top level is an object with keys {_quoted(self.nameless)}; expected a list of samples"
            )
        if len(self.forms) > 1:
            firsts = ", ".join(f"{form} (first: sample {number})" for form, number in self.forms.items())
            self.findings.insert(0, f"{self.path}: mixes forms: {firsts}; keep one form per file")
            self.count += 1
        if self.findings:
            raise UserError(*self._shown())

    def _shown(self) -> list[str]:
        more = [f"{self.path}: and {self.count - SHOWN:,} more findings"] if self.count > SHOWN else []
        return self.findings[:SHOWN] + more


def _fields(container: str, message: object) -> tuple[str, str]:
    """The two keys of a turn: the container's own, or the other form's where the first turn speaks that."""
    own = FIELDS[container]
    others = [pair for pair in FIELDS.values() if pair != own and isinstance(message, dict) and pair[0] in message]
    return others[0] if others and own[0] not in message else own


def _lookalike(value: object) -> list[str]:
    """Which list of turns a value looks like."""
    first = value[0] if isinstance(value, list) and value else None
    return [name for name, pair in FIELDS.items() if isinstance(first, dict) and set(pair) <= set(first)]


def _missing(key: str, value: dict) -> str:
    keys = [name for name in value if name is not TWICE]
    guess = difflib.get_close_matches(key, [name.lower() for name in keys], 1, 0.7)
    meant = [name for name in keys if guess and name.lower() == guess[0]]
    return f'no "{key}" (keys: {_quoted(keys)})' + (
        f'; did you mean "{key}"? Rename the key "{meant[0]}"' if meant else ""
    )


def _form(container: str, pair: tuple[str, str]) -> str:
    return f'"{container}" with {"/".join(pair)}'


def _two(a: str, b: str) -> str:
    """ "turns 2,3", or the names of two fields."""
    return f"turns {a[5:]},{b[5:]}" if a.startswith("turn ") else f"{a} and {b}"


def _quoted(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(f'"{key}"' for key in keys[:12]) + (", …" if len(keys) > 12 else "")


def _half_character(text: str) -> re.Match | None:
    """A surrogate without its other half, from an escape like "\\ud83d" in the JSON: no encoding can hold it."""
    return None if text.isascii() else SURROGATE.search(text)


def _kind(value: object) -> str:
    return KINDS.get(type(value), "a number")
