"""What is wrong with one file of samples: findings about places, refusals of the whole file, and the words for them."""

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..data_files.window import TWICE
from .data_notes import Seen, counted, shown
from .keys import Refusal

SHOWN = 20  # kinds of findings of one file that are printed
SHOWN_PLACES = 3  # places that one kind names
LONGEST_WORD = 100  # characters; what is longer is no misspelt key or role
SHOWN_NAMES = 6  # keys that one refusal names
MOST_KINDS = 1000  # that are told apart; a file in which each finding is another would fill the memory
SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    type(None): "null",
    int: "a number",
    float: "a number",
}


@dataclass
class Places:
    """Where findings of one kind are: how many, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN_PLACES:
            self.first.append(place)

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


@dataclass
class FileFindings:
    """number, line: of the sample at hand, both counted from 1; no line in parquet. count: findings in all.

    reasons: what is wrong with the sample at hand, each with its place within the sample. kinds: text -> where it was found;
    others: findings beyond MOST_KINDS.
    """

    path: str
    number: int = 0
    line: int | None = None
    count: int = 0
    reasons: list[str] = field(default_factory=list)
    kinds: dict[str, Places] = field(default_factory=dict)
    others: int = 0
    refused: dict[str, tuple[Seen, list[str]]] = field(default_factory=dict)  # why -> the samples, what is refused in them

    def next(self, line: int | None) -> None:
        """Goes to the next sample."""
        self.number, self.line, self.reasons = self.number + 1, line, []

    def find(self, finding: str, place: str = "") -> None:
        """Adds a finding about the current sample. Findings of the same text are one kind: what differs belongs into place.

        Texts of the file stand in it as quoted() and shown() show them.
        """
        self.count += 1
        self.reasons.append(f"{place}: {finding}" if place else finding)
        if finding not in self.kinds and len(self.kinds) >= MOST_KINDS:
            self.others += 1
            return
        places = self.kinds.setdefault(finding, Places())
        line = f" (line {self.line})" if self.line and self.line > 1 and not places.count else ""
        places.add(f"sample {self.number}{line}{' ' * bool(place)}{place}")

    def refuse(self, refusal: Refusal, what: str) -> None:
        """The current sample has something for which the file is refused: one line, however many samples have it."""
        self.reasons.append(f"{what}: {refusal.why}")
        if refusal.why not in self.refused:
            self.refused[refusal.why] = Seen(), []
            self.count += 1
        seen, names = self.refused[refusal.why]
        seen.add(self.number)
        if what not in names:
            names.append(what)

    def lines(self) -> list[str]:
        """All of it: refusals, the first kinds of findings, and how many more there are."""
        lines = []
        for why, (seen, names) in self.refused.items():
            listed = ", ".join(names[:SHOWN_NAMES]) + ", …" * (len(names) > SHOWN_NAMES)
            lines.append(f"{self.path}: {counted(seen.samples)} with {listed} (first: {seen.first}): {why}")
        first = list(self.kinds.items())[:SHOWN]
        lines += [f"{self.path}: {places}: {finding}" for finding, places in first]
        hidden = self.others + sum(places.count for places in self.kinds.values()) - sum(places.count for _, places in first)
        return lines + [f"{self.path}: and {hidden:,} more findings"] * (hidden > 0)

    def once(self, value: dict, place: str = "") -> None:
        """Finds a key that stands twice in an object of the file."""
        if TWICE in value:
            self.find(f'has {quoted([value[TWICE]])} twice; one of them would be lost', place)

    def missing(self, key: str, value: dict, place: str = "", but: Iterable[str] = ()) -> None:
        """Finds that `key` is not in value, and which misspelt key may be meant; those of `but` are not."""
        keys = [name for name in value if name is not TWICE]
        guess = self.meant(key, [name.lower() for name in keys if name not in but], 0.7)
        meant = [name for name in keys if guess and name.lower() == guess]
        remedy = f'; did you mean "{key}"? Rename the key {quoted(meant[:1])}' if meant else ""
        self.find(f'no "{key}" (keys: {quoted(keys)}){remedy}', place)

    def meant(self, word: str, words: Iterable[str], likeness: float = 0.75) -> str:
        """The one of `words` that `word` may be a misspelling of; "" for none, and where no finding is printed any more."""
        return _meant(word[:LONGEST_WORD], tuple(words), likeness) if len(self.kinds) < SHOWN else ""


@functools.lru_cache(maxsize=1000)
def _meant(word: str, words: tuple[str, ...], likeness: float) -> str:
    guess = difflib.get_close_matches(word, words, 1, likeness)
    return guess[0] if guess else ""


def quoted(keys: Iterable[str]) -> str:
    """Texts of the file, in quotes: the first twelve, each as far as shown() shows it."""
    keys = list(keys)
    return ", ".join(f'"{shown(key)}"' for key in keys[:12]) + (", …" if len(keys) > 12 else "")


def kind(value: object) -> str:
    return KINDS.get(type(value)) or f"a value of type {type(value).__name__}"


def half_character(text: str) -> re.Match | None:
    """A surrogate without its other half, from an escape like "\\ud83d" in the JSON: no encoding can hold it."""
    if text.isascii():
        return None
    try:
        text.encode()  # a tenth of the search's time
        return None
    except UnicodeEncodeError:
        return SURROGATE.search(text)
