"""What is wrong with one file of samples: findings about places, refusals of the whole file, and the words for them."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..data_files.sample_files import TWICE
from .data_notes import Seen, counted
from .keys import Refusal

SHOWN = 20  # findings of one file that are printed
SHOWN_NAMES = 6  # keys that one refusal names
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
class FileFindings:
    """number, line: of the sample at hand, both counted from 1; no line in parquet. count: findings in all."""

    path: str
    number: int = 0
    line: int | None = None
    count: int = 0
    findings: list[str] = field(default_factory=list)
    refused: dict[str, tuple[Seen, list[str]]] = field(default_factory=dict)  # why -> the samples, what is refused in them

    def find(self, finding: str, place: str = "") -> None:
        """Adds a finding about the current sample."""
        self.count += 1
        if len(self.findings) < SHOWN:
            line = f" (line {self.line})" if self.line and self.line > 1 else ""
            self.findings.append(f"{self.path}: sample {self.number}{line}{' ' * bool(place)}{place}: {finding}")

    def refuse(self, refusal: Refusal, what: str) -> None:
        """The current sample has something for which the file is refused: one line, however many samples have it."""
        if refusal.why not in self.refused:
            self.refused[refusal.why] = Seen(), []
            self.count += 1
        seen, names = self.refused[refusal.why]
        seen.add(self.number)
        if what not in names:
            names.append(what)

    def lines(self) -> list[str]:
        """All of it: refusals, the first findings, and how many more there are."""
        lines = []
        for why, (seen, names) in self.refused.items():
            shown = ", ".join(names[:SHOWN_NAMES]) + ", …" * (len(names) > SHOWN_NAMES)
            lines.append(f"{self.path}: {counted(seen.samples)} with {shown} (first: {seen.first}): {why}")
        hidden = self.count - len(self.refused) - len(self.findings)
        return lines + self.findings + [f"{self.path}: and {hidden:,} more findings"] * (hidden > 0)

    def once(self, value: dict, place: str = "") -> None:
        """Finds a key that stands twice in an object of the file."""
        if TWICE in value:
            self.find(f'has "{value[TWICE]}" twice; one of them would be lost', place)

    def missing(self, key: str, value: dict, place: str = "") -> None:
        """Finds that `key` is not in value, and which misspelt key may be meant."""
        keys = [name for name in value if name is not TWICE]
        guess = self.meant(key, [name.lower() for name in keys], 0.7)
        meant = [name for name in keys if guess and name.lower() == guess]
        shown = f'; did you mean "{key}"? Rename the key "{meant[0]}"' if meant else ""
        self.find(f'no "{key}" (keys: {quoted(keys)}){shown}', place)

    def meant(self, word: str, words: Iterable[str], likeness: float = 0.75) -> str:
        """The one of `words` that `word` may be a misspelling of; "" for none, and where no finding is printed any more."""
        guess = difflib.get_close_matches(word, words, 1, likeness) if len(self.findings) < SHOWN else []
        return guess[0] if guess else ""


def quoted(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(f'"{key}"' for key in keys[:12]) + (", …" if len(keys) > 12 else "")


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
