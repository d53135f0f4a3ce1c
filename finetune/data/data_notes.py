"""What a data file may do but its owner should know of: counted while it is read, told in one line each."""

import difflib
import re
import unicodedata
from array import array
from dataclasses import dataclass, field

import numpy as np

SPECIAL = re.compile(r"<\|(?:endoftext|im_start|im_end|extra_(?:\d|[1-9]\d|1\d\d|20[0-4]))\|>")
MAX_UNREAD = 1000  # different keys remembered; a file that uses ids as keys could have millions
WHOLE_CORPUS = 8  # times max_length: a sample as long as that is hardly one conversation


@dataclass
class Seen:
    """How many samples have a property, and the first of them."""

    samples: int = 0
    first: int = 0
    last: int = 0

    def add(self, number: int) -> None:
        if self.last != number:
            self.samples, self.first, self.last = self.samples + 1, self.first or number, number


@dataclass
class Noted:
    """The counts over one file, and 64 bits per sample of its prompt (all but the last answer) and of all of it."""

    blank: Seen = field(default_factory=Seen)
    special: Seen = field(default_factory=Seen)
    composed: Seen = field(default_factory=Seen)
    unread: dict[str, Seen] = field(default_factory=dict)
    prompts: array = field(default_factory=lambda: array("q"))
    wholes: array = field(default_factory=lambda: array("q"))

    def unread_key(self, number: int, key: str) -> None:
        """Sample `number` has a key that nothing reads."""
        if key in self.unread or len(self.unread) < MAX_UNREAD:
            self.unread.setdefault(key, Seen()).add(number)

    def conversation(self, number: int, turns: list) -> None:
        """turns: of sample `number`, with .role and .content; the last one is an answer."""
        for turn in turns:
            if turn.role == "user" and not turn.content.strip():
                self.blank.add(number)
            if "<|" in turn.content and SPECIAL.search(turn.content):
                self.special.add(number)
            if not (turn.content.isascii() or unicodedata.is_normalized("NFC", turn.content)):
                self.composed.add(number)
        texts = tuple(text for turn in turns for text in (turn.role, turn.content))
        self.prompts.append(hash(texts[:-1]))
        self.wholes.append(hash(texts))

    def lines(self, allow_special: bool) -> list[str]:
        """One line for each thing there is to know."""
        lines = []
        if self.blank.samples:
            lines.append(f"{counted(self.blank.samples)} with an empty user turn (first: {self.blank.first})")
        if self.special.samples:
            what = (
                "it becomes control tokens"
                if allow_special
                else "it is encoded as plain text. --allow_special to change"
            )
            contain = "contains" if self.special.samples == 1 else "contain"
            where = f"{counted(self.special.samples)} {contain} special-token text (first: {self.special.first})"
            lines.append(f"{where}; {what}")
        if self.composed.samples:
            where = f"{counted(self.composed.samples)} with text outside Unicode's normal form C"
            lines.append(f"{where} (first: {self.composed.first}); the tokenizer normalizes it")
        if self.unread:
            lines.append(f"keys that are not read: {_unread(self.unread)}")
        return lines + _repeated(np.array(self.prompts), np.array(self.wholes))


def _repeated(prompts: np.ndarray, wholes: np.ndarray) -> list[str]:
    """Exact copies, and equal prompts with different answers. prompts, wholes: int64[n], a hash of each sample."""
    order = np.lexsort((wholes, prompts))
    same_prompt = prompts[order][1:] == prompts[order][:-1]
    same_whole = wholes[order][1:] == wholes[order][:-1]
    lines = []
    if same_whole.any():
        first = order[:-1][same_whole].min()
        second = np.flatnonzero(wholes == wholes[first])[1]
        what = f"equal to an earlier one (first: {first + 1} and {second + 1})"
        lines.append(f"duplicates: {counted(same_whole.sum())} {what}")
    group = np.cumsum(np.concatenate(([0], ~same_prompt)))  # one number per prompt
    conflicting = order[np.isin(group, group[1:][same_prompt & ~same_whole])]
    if len(conflicting):
        first = conflicting.min()
        second = np.flatnonzero((prompts == prompts[first]) & (wholes != wholes[first]))[0]
        what = f"with the same prompt but different answers (first: {first + 1} and {second + 1})"
        lines.append(f"conflicting: {counted(len(conflicting))} {what}")
    return lines


def _unread(unread: dict[str, Seen]) -> str:
    shown = []
    for key, seen in sorted(unread.items(), key=lambda item: -item[1].samples)[:5]:
        guess = difflib.get_close_matches(key.lower(), ("train", "system", "input", "history"), 1, 0.75)
        meant = f'; did you mean "{guess[0]}"?' if guess else ""
        shown.append(f'"{key}" ({counted(seen.samples)}, first: {seen.first}{meant})')
    return ", ".join(shown) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")


def too_long(full: np.ndarray, source: np.ndarray, max_length: int, long_samples: str) -> list[str]:
    """Notes on samples longer than max_length. full: int[n], tokens of every sample before cutting or dropping; source: their
    numbers in the file."""
    long = np.flatnonzero(full > max_length)
    if not len(long):
        return []
    cut, at = long_samples == "cut", int(full.argmax())
    done = f"cut to {max_length:,} tokens" if cut else f"dropped, being longer than {max_length:,} tokens"
    lost = int((full[long] - cut * max_length).sum())
    share = f"{100 * len(long) / len(full):.2g} %"
    lines = [f"{counted(len(long))} {done} ({share}), longest {full[at]:,}; {lost:,} tokens lost"]
    if full[at] >= WHOLE_CORPUS * max_length:
        times = f"{full[at]:,} tokens = {full[at] / max_length:.0f} × max length"
        lines.append(f"sample {source[at]} has {times}; one sample should be one conversation")
    return lines


def counted(samples: int) -> str:
    """ "1 sample", "1,234 samples"."""
    return f"{samples:,} sample{'' if samples == 1 else 's'}"
