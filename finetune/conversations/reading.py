"""Reads and validates conversations: every finding of a file at once, each with file, sample, turn, field and remedy.

Samples and turns are counted from 1. First each turn is read and checked by itself (turns.py), then calls and results are
put together (tool_turns.py), then their order is checked (order.py); what is allowed but worth a line is counted in
data_notes.py. Which keys mean something is said in keys.py.
"""

import os
from collections.abc import Iterator

from tqdm import tqdm

from ..data_files.sample_files import TWICE, SampleFile
from ..errors import UserError, on_first_rank
from . import keys, order, tool_turns
from .data_notes import Noted
from .file_findings import FileFindings, kind, quoted
from .messages import Conversation
from .tool_spellings import Unreadable, tools_in_keys
from .turns import Turn, TurnReader

FIELDS = {"conversations": ("from", "value"), "messages": ("role", "content")}  # the documented form, OpenAI's
FORMS = ("conversations", "messages", "instruction")  # the last one is alpaca's
PLAIN_KEYS = {"id", "conversations", "messages"}
BEGINNING_BYTES = 8 << 20  # a tenth to half a second of work


class Conversations:
    """The conversations of one validated file. Iterating reads the file again, so that no more than one is in memory.

    len() is their number; each is a messages.Conversation. notes: lines to print.
    """

    def __init__(self, file: SampleFile, count: int, notes: list[str]):
        self.file, self.count, self.notes = file, count, notes

    @property
    def path(self) -> str:
        return self.file.path

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Conversation]:
        reader = _Reader(self.path)
        for line, sample in self.file:
            turns, tools = reader.sample(line, sample)
            yield Conversation([turn.message() for turn in turns], tools)


def read(path: str | os.PathLike, *, flag: str = "--data_path") -> Conversations:
    """Reads a whole file (see data/README.md for its forms) and checks every sample; holds none of them.

    flag: the option that named the file. Raises UserError with all findings, of which 20 are spelt out.
    """
    file = SampleFile(path, flag)
    reader = _Reader(file.path)
    bar = {"desc": "checking data", "unit": "B", "unit_scale": True, "delay": 2, "disable": not on_first_rank()}
    with tqdm(total=file.bytes, **bar) as progress:
        try:
            for line, sample in file:
                reader.check(line, sample)
                if not reader.found.number % 256:
                    progress.update(file.position - progress.n)
        except UserError as error:  # broken JSON ends the reading; what was found before it counts too
            raise UserError(*reader.found.lines(), *error.findings) from None
    reader.finish(file.layout)
    return Conversations(file, reader.found.number, reader.noted.lines())


def begins_well(path: str | os.PathLike, flag: str = "--data_path") -> bool:
    """Is nothing wrong with the first BEGINNING_BYTES of a file? read() tells what is.

    For a program that reads the file later, after what takes seconds: of a file of usual size it is all.
    """
    try:
        file = SampleFile(path, flag)
        reader = _Reader(file.path)
        for line, sample in file:
            reader.check(line, sample)
            if reader.found.count or file.position > BEGINNING_BYTES:
                return not reader.found.count
        reader.finish(file.layout)
    except UserError:
        return False
    return True


class _Reader:
    """Walks through the samples of one file and keeps what is wrong with them, and what is worth a note."""

    def __init__(self, path: str):
        self.found, self.noted = FileFindings(path), Noted()
        self.one = TurnReader(self.found, self.noted)  # reads one turn
        self.forms: dict[str, int] = {}  # form -> first sample
        self.nameless: list[str] | None = None  # the keys of a first sample that has no form and no lookalike of one

    def check(self, line: int | None, sample: object) -> None:
        """Checks one sample, with everything the notes need."""
        before = self.found.count
        turns, tools = self.sample(line, sample)
        if turns and self.found.count == before:
            order.check(self.found, self.noted, turns)
            self.noted.conversation(self.found.number, turns, tools)

    def sample(self, line: int | None, sample: object) -> tuple[list[Turn], list[dict]]:
        """The turns and the tools of the next sample; none where there are findings about it that hide the rest."""
        found = self.found
        found.number, found.line = found.number + 1, line
        if not isinstance(sample, dict):
            found.find(f'must be an object with "conversations", found {kind(sample)}')
            return [], []
        beside = {}  # kind of key -> what stands beside the turns
        if not sample.keys() <= PLAIN_KEYS:
            found.once(sample)
            sample = {key: value for key, value in sample.items() if value is not None and key is not TWICE}
            beside = self._beside(sample)
            if self._is_preference(beside):
                return [], []
        forms = [form for form in FORMS if sample.get(form) is not None]
        if len(forms) != 1:
            self._no_form(sample, forms)
            return [], []
        self.one.with_tools, self.one.tools, before = False, None, found.count
        turns = self._alpaca(sample, beside) if forms == ["instruction"] else self._chat(sample, forms[0])
        if beside and turns:
            turns = self._with_system(beside.get("system", {}), turns)
            turns = self._weighed(beside.get("learn", {}), turns)
        in_text = turns and turns[0].role == "system" and "<tools>" in turns[0].content
        if turns and (self.one.with_tools or "tools" in beside or in_text):
            tools = self._tools(beside.get("tools"), self.one.tools)
            return tool_turns.assemble(found, self.noted, turns, tools) if found.count == before else (turns, [])
        return turns, []

    # ---- beside the turns

    def _beside(self, sample: dict) -> dict[str, dict]:
        """The keys of keys.BESIDE_TURNS that a sample has, by what they are; notes the others."""
        table = keys.ALPACA if "instruction" in sample else keys.BESIDE_TURNS
        beside: dict[str, dict] = {}
        for key, value in sample.items():
            what = table.get(key)
            if what is None:
                self.noted.unread_key(self.found.number, key)
            elif what == "refused":
                if value not in keys.REFUSED_BESIDE[key].harmless:
                    self.found.refuse(keys.REFUSED_BESIDE[key], f'"{key}" beside the turns')
            elif what == "media":
                if value:
                    self.found.refuse(keys.SHOWN_MEDIA, f'"{key}"')
            elif what == "marks" and key != "kto_tag" and value not in (0, 1):  # a class, or any other label
                self.noted.unread_key(self.found.number, key)
            elif what == "boxes":
                if isinstance(value, dict) and any(value.get(part) for part in keys.BOXES[key]):
                    self.found.refuse(keys.SHOWN_MEDIA, f'"{key}"')
                elif value and (not isinstance(value, dict) or any(value.values())):
                    self.noted.unread_key(self.found.number, key)
            elif what != "read" and (what in ("learn", "marks") or value not in ("", [], {})):
                beside.setdefault(what, {})[key] = value
        return beside

    def _is_preference(self, beside: dict[str, dict]) -> bool:
        for what, refusal in (("pairs", keys.PREFERENCES), ("marks", keys.GOOD_OR_BAD)):
            for key in beside.get(what, ()):
                self.found.refuse(refusal, f'"{key}"')
        return "pairs" in beside or "marks" in beside

    def _with_system(self, said: dict[str, object], turns: list[Turn]) -> list[Turn]:
        """Puts a system text that stands beside the turns before them; it may stand there twice if it is the same."""
        texts = {key: self.one.text(value, key) for key, value in said.items()}
        if not said or None in texts.values():
            return turns
        key, text = next(iter(texts.items()))
        if len(set(texts.values())) > 1:
            self.found.find(f"has {quoted(texts)} with different texts; keep one of them")
        if turns[0].role != "system":
            return [Turn(f'"{key}"', "system", text), *turns]
        if turns[0].content not in ("", text):
            self.found.find(f'has a "{key}" and a system turn with another text; keep one')
        return [turns[0]._replace(content=text), *turns[1:]]

    def _weighed(self, said: dict[str, object], turns: list[Turn]) -> list[Turn]:
        """The answers, with their weights times that of the sample."""
        if not isinstance(said.get("loss", True), bool):
            what = '"loss" beside the turns must be true or false; a number there is usually a loss that was measured'
            self.found.find(f'{what}: remove the key, or call it "weight" if it is one')
            return turns
        weight = self.one.weight(said)
        return turns if weight == 1 else [self._times(turn, weight) for turn in turns]

    @staticmethod
    def _times(turn: Turn, weight: float) -> Turn:
        if turn.role != "assistant":
            return turn
        more = dict(turn.more or {})
        product = more.pop("weight", 1.0) * weight
        return turn._replace(more=(more | {"weight": product} if product != 1 else more) or None)

    def _tools(self, beside: dict[str, object] | None, on_system: dict[str, object] | None) -> list[dict]:
        if beside and on_system:
            self.found.find("has tools beside the turns and on the system turn; keep one of them")
        try:
            return tools_in_keys(beside or on_system) if beside or on_system else []
        except Unreadable as error:
            self.found.find(str(error))
            return []

    # ---- forms

    def _chat(self, sample: dict, container: str) -> list[Turn]:
        messages = sample[container]
        if not isinstance(messages, list):
            self.found.find(f'"{container}" must be a list of turns, found {kind(messages)}')
            return []
        if not messages:
            self.forms.setdefault(_form(container, FIELDS[container]), self.found.number)
            self.found.find("empty conversation; remove it")
            return []
        speaker, text = _fields(container, messages[0])
        self.forms.setdefault(_form(container, (speaker, text)), self.found.number)
        turns = [self.one.turn(f"turn {t}", message, speaker, text) for t, message in enumerate(messages, 1)]
        return [turn for turn in turns if turn]

    def _alpaca(self, sample: dict, beside: dict) -> list[Turn]:
        """history's pairs, then instruction and input on lines of their own, then output."""
        self.forms.setdefault('"instruction"/"output"', self.found.number)
        before, find, text = self.found.count, self.found.find, self.one.text
        pairs = sample.get("history", [])
        turns = []
        if not isinstance(pairs, list):
            find(f'"history" must be a list of [question, answer] pairs, found {kind(pairs)}')
            pairs = []
        for i, pair in enumerate(pairs, 1):
            if not isinstance(pair, list) or len(pair) != 2:
                find(f"must be a [question, answer] pair, found {kind(pair)}", f"history {i}")
                continue
            for role, name, said in zip(("user", "assistant"), ("question", "answer"), pair):
                turns.append(Turn(f"history {i} {name}", role, text(said, name, f"history {i}")))
        if "output" not in sample:
            self.found.missing("output", sample)
        question = [text(sample["instruction"], "instruction")]
        if "input" in sample:
            question.append(text(sample["input"], "input"))
        answer = text(sample.get("output", ""), "output")
        thoughts = self.one.thoughts(beside.get("thoughts", {}))
        if thoughts and answer and answer.lstrip().startswith("<think>"):
            find(f'has thoughts twice ({quoted(beside["thoughts"])} and <think> in "output"); keep one of them')
        if self.found.count > before:
            return []
        prompt = "\n".join(text for text in question if text)
        more = {"reasoning_content": thoughts} if thoughts else None
        return [*turns, Turn('"instruction"', "user", prompt), Turn('"output"', "assistant", answer, more)]

    def _no_form(self, sample: dict, forms: list[str]) -> None:
        find, names = self.found.find, [key for key in sample if key is not TWICE and sample[key] is not None]
        if forms:
            return find(f"has {quoted(forms)}; keep one of them")
        if {"from", "value"} <= set(names) or {"role", "content"} <= set(names):
            return find('is a single turn; put the turns of a conversation into {"conversations": [...]}')
        if "output" in names:
            return self.found.missing("instruction", sample)
        for key in names:
            guess = self.found.meant(key.lower(), FORMS) or _lookalike(sample[key])
            if guess:
                return find(f'no "{guess}" (keys: {quoted(names)}); did you mean "{guess}"? Rename the key "{key}"')
        if self.found.number == 1:
            self.nameless = names
        expected = 'expected "conversations" (from/value), "messages" (role/content) or "instruction"/"output"'
        find(f'no "conversations" (keys: {quoted(names)}); {expected}')

    def finish(self, layout: str) -> None:
        """Raises the file's findings, all together."""
        found = self.found
        if not found.number:
            raise UserError(f"{found.path}: no samples")
        if found.number == 1 and layout == "lines" and self.nameless is not None:
            what = f"top level is an object with keys {quoted(self.nameless)}"
            raise UserError(f"{found.path}: {what}; expected a list of samples")
        lines = found.lines()
        if len(self.forms) > 1:
            firsts = ", ".join(f"{form} (first: sample {number})" for form, number in self.forms.items())
            lines.insert(0, f"{found.path}: mixes forms: {firsts}; keep one form per file")
        if lines:
            raise UserError(*lines)


def _fields(container: str, message: object) -> tuple[str, str]:
    """The two keys of a turn: the container's own, or the other form's where the first turn speaks that."""
    own = FIELDS[container]
    others = [pair for pair in FIELDS.values() if pair != own and isinstance(message, dict) and pair[0] in message]
    return others[0] if others and own[0] not in message else own


def _lookalike(value: object) -> str:
    """Which list of turns a value looks like; "" for none."""
    first = value[0] if isinstance(value, list) and value else None
    return next((name for name, pair in FIELDS.items() if isinstance(first, dict) and set(pair) <= set(first)), "")


def _form(container: str, pair: tuple[str, str]) -> str:
    return f'"{container}" with {"/".join(pair)}'
