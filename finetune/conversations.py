"""Reads and validates conversations: every finding of a file at once, each with file, sample, turn, field and remedy.

Samples and turns are counted from 1. A turn is checked by itself (`_Checker._chat`, `_Checker._alpaca`), then the order of the turns.
"""

import difflib
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .errors import UserError, on_first_rank
from .sample_files import TWICE, SampleFile

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
FIELDS = {"conversations": ("from", "value"), "messages": ("role", "content")}  # the documented form, OpenAI's
FORMS = ("conversations", "messages", "instruction")  # the last one is alpaca's
KNOWN = {"id", "system", *FORMS}
KNOWN_ALPACA = {"id", "system", "instruction", "input", "output", "history"}
SPECIAL = re.compile(r"<\|(?:endoftext|im_start|im_end|extra_(?:\d|[1-9]\d|1\d\d|20[0-4]))\|>")
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

    len() is their number; each is a list of messages {"role", "content", optional "train"}. notes: lines worth printing.
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

    allow_special: special-token text becomes control tokens; here it only words the note about it. flag: the option that named the file.
    Raises UserError with all findings, of which 20 are spelt out.
    """
    file = SampleFile(path, flag)
    checker = _Checker(file.path)
    progress = tqdm(total=file.bytes, unit="B", unit_scale=True, desc="checking data", delay=2, disable=not on_first_rank())
    with progress:
        try:
            for line, sample in file:
                checker.check(line, sample)
                if not checker.number % 256:
                    progress.update(file.position - progress.n)
        except UserError as error:  # broken JSON ends the reading; what was found before it counts too
            checker.stop(error)
        else:
            checker.finish(file.layout)
    return Conversations(file, checker.number, checker.notes(allow_special))


@dataclass
class _Seen:
    """How many samples have a property, and the first of them."""

    samples: int = 0
    first: int = 0
    last: int = 0

    def add(self, number: int) -> None:
        if self.last != number:
            self.samples, self.first, self.last = self.samples + 1, self.first or number, number


@dataclass
class _Checker:
    """Walks through the samples of one file and keeps the findings, the counts for the notes, and a hash per prompt and sample."""

    path: str
    number: int = 0
    line: int | None = None
    findings: list[str] = field(default_factory=list)
    count: int = 0  # findings in all
    forms: dict[str, int] = field(default_factory=dict)  # form -> first sample
    nameless: tuple[str, ...] | None = None  # the keys of a first sample that has no form and no lookalike of one
    unread: dict[str, _Seen] = field(default_factory=dict)
    blank: _Seen = field(default_factory=_Seen)
    special: _Seen = field(default_factory=_Seen)
    composed: _Seen = field(default_factory=_Seen)
    prompts: array = field(default_factory=lambda: array("q"))
    wholes: array = field(default_factory=lambda: array("q"))

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
            self._look_at(turns)

    def turns(self, line: int | None, sample: object) -> list[Turn]:
        """The turns of the next sample, each checked by itself."""
        self.number, self.line = self.number + 1, line
        if not isinstance(sample, dict):
            self.find(f"must be an object with \"conversations\", found {_kind(sample)}")
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
        self._once(message, place)
        missing = [key for key in (speaker, text) if key not in message]
        for key in missing:
            self.find(_missing(key, message), place)
        role = None if speaker in missing else self._role(message[speaker], speaker, place)
        content = None if text in missing else self._text(message[text], text, place, parts=text == "content")
        train = message.get("train")
        if train is not None and (role != "assistant" or not isinstance(train, bool)):
            wrong = f"found {_kind(train)}" if not isinstance(train, bool) else f"only on an assistant turn, found on role {role}"
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
        """The text of a field; with parts, also OpenAI's list of {"type": "text", "text": …}, whose texts are joined as they are."""
        if parts and isinstance(value, list):
            for i, part in enumerate(value, 1):
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    shown = f'type "{part["type"]}"' if isinstance(part, dict) and "type" in part else _kind(part)
                    text_only = 'only {"type": "text", "text": "…"} can be trained on'
                    return self.find(f'"{name}" part {i} is {shown}; {text_only}', place)
            value = "".join(part["text"] for part in value)
        if not isinstance(value, str):
            return self.find(f'"{name}" must be a string, found {_kind(value)}', place)
        if not value.isascii() and (lone := re.search("[\ud800-\udfff]", value)):
            return self.find(f'"{name}" holds half of a character (\\u{ord(lone[0]):x} alone); write it whole or remove it', place)
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
        question = [self._text(sample["instruction"], "instruction"), self._text(sample.get("input") or "", "input")]
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
            if key is not TWICE and (key in self.unread or len(self.unread) < 1000):
                self.unread.setdefault(key, _Seen()).add(self.number)

    # ---- whole conversations

    def _order(self, turns: list[Turn]) -> None:
        """Who may follow whom, and whether there is something to learn."""
        for before, turn in zip(turns, turns[1:]):
            if turn.role == "system":
                self.find("system turn only allowed first", turn.place)
            elif turn.role == before.role:
                self.find(f"{_two(before.place, turn.place)} are both {turn.role}; join them or add the turn between them")
        first = turns[turns[0].role == "system" :][:1]
        if first and first[0].role == "assistant":
            self.find("starts with assistant; the first turn (after a system turn) must be the user's", first[0].place)
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

    def _look_at(self, turns: list[Turn]) -> None:
        """Counts what is allowed but worth a note."""
        for turn in turns:
            if turn.role == "user" and not turn.content.strip():
                self.blank.add(self.number)
            if "<|" in turn.content and SPECIAL.search(turn.content):
                self.special.add(self.number)
            if not turn.content.isascii() and not unicodedata.is_normalized("NFC", turn.content):
                self.composed.add(self.number)
        texts = tuple(text for turn in turns for text in (turn.role, turn.content))
        self.prompts.append(hash(texts[:-1]))
        self.wholes.append(hash(texts))

    # ---- what comes of it

    def stop(self, error: UserError) -> None:
        """Ends with the findings so far and those of error."""
        raise UserError(*self.findings, *self._more(), *error.findings)

    def finish(self, layout: str) -> None:
        """Raises the file's findings, all together."""
        if not self.number:
            raise UserError(f"{self.path}: no samples")
        if self.number == 1 and layout == "lines" and self.nameless is not None:
            raise UserError(f"{self.path}: top level is an object with keys {_quoted(self.nameless)}; expected a list of samples")
        if len(self.forms) > 1:
            firsts = ", ".join(f"{form} (first: sample {number})" for form, number in self.forms.items())
            self.findings.insert(0, f"{self.path}: mixes forms: {firsts}; keep one form per file")
        if self.findings:
            raise UserError(*self.findings, *self._more())

    def _more(self) -> list[str]:
        return [f"{self.path}: and {self.count - SHOWN:,} more findings"] if self.count > SHOWN else []

    def notes(self, allow_special: bool) -> list[str]:
        """One line for each thing a user should know."""
        notes = []
        if self.blank.samples:
            notes.append(f"{self.blank.samples:,} samples have an empty user turn (first: {self.blank.first})")
        if self.special.samples:
            what = "it becomes control tokens" if allow_special else "it is encoded as plain text. --allow_special to change"
            notes.append(f"{self.special.samples:,} samples contain special-token text (first: {self.special.first}); {what}")
        if self.composed.samples:
            what = "text that is not in Unicode's composed form (NFC); the tokenizer composes it, which changes no meaning"
            notes.append(f"{self.composed.samples:,} samples have {what} (first: {self.composed.first})")
        if self.unread:
            notes.append(f"keys that are not read: {_unread(self.unread)}")
        return notes + _repeated(self.prompts, self.wholes)


def _repeated(prompts: array, wholes: array) -> list[str]:
    """D23: exact copies, and equal prompts (all but the last answer) with different answers."""
    samples = np.array(wholes)
    order = np.lexsort((samples, np.array(prompts)))
    by_prompt, by_whole = np.array(prompts)[order], samples[order]
    same_prompt, same = by_prompt[1:] == by_prompt[:-1], by_whole[1:] == by_whole[:-1]
    copies, conflicts = np.flatnonzero(same), np.flatnonzero(same_prompt & ~same)
    notes = []
    if len(copies):
        a, b = sorted(order[copies[0] : copies[0] + 2] + 1)
        notes.append(f"duplicates: {len(copies):,} samples repeat another one (for example {a} and {b}); they count double")
    if len(conflicts):
        a, b = sorted(order[conflicts[0] : conflicts[0] + 2] + 1)
        group = np.cumsum(np.concatenate(([0], ~same_prompt)))
        count = np.isin(group, group[conflicts]).sum()
        notes.append(f"conflicting: {count:,} samples share their prompt but not their answer (for example {a} and {b})")
    return notes


def _unread(unread: dict[str, _Seen]) -> str:
    shown = []
    for key, seen in sorted(unread.items(), key=lambda item: -item[1].samples)[:5]:
        guess = difflib.get_close_matches(key.lower(), ("train", "system", "input", "history"), 1, 0.75)
        meant = f'; did you mean "{guess[0]}"?' if guess else ""
        shown.append(f'"{key}" ({seen.samples:,} samples, first: {seen.first}{meant})')
    return ", ".join(shown) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")


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
    return f'no "{key}" (keys: {_quoted(keys)})' + (f'; did you mean "{key}"? Rename the key "{meant[0]}"' if meant else "")


def _form(container: str, pair: tuple[str, str]) -> str:
    return f'"{container}" with {"/".join(pair)}'


def _two(a: str, b: str) -> str:
    """ "turns 2,3", or the names of two fields."""
    return f"turns {a[5:]},{b[5:]}" if a.startswith("turn ") else f"{a} and {b}"


def _quoted(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(f'"{key}"' for key in keys[:12]) + (", …" if len(keys) > 12 else "")


def _kind(value: object) -> str:
    return KINDS.get(type(value), "a number")
