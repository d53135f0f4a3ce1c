"""What a data file may do but its owner should know of: counted while it is read, told in one line each."""

import difflib
import hashlib
import unicodedata
from array import array
from dataclasses import dataclass, field

import numpy as np

from . import keys

MAX_UNREAD = 1000  # different keys remembered; a file that uses ids as keys could have millions
SHOWN_UNREAD = 12


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
    """The counts over one file, and 64 bits per sample of its prompt (all but the last answer) and of all of it.

    The same text has the same bits on every machine: samples are drawn by them.
    """

    blank: Seen = field(default_factory=Seen)
    composed: Seen = field(default_factory=Seen)
    unclosed: Seen = field(default_factory=Seen)
    unopened: Seen = field(default_factory=Seen)
    tools_in_text: Seen = field(default_factory=Seen)
    greetings: Seen = field(default_factory=Seen)
    unanswered: Seen = field(default_factory=Seen)  # last questions that were left out
    unread: dict[str, Seen] = field(default_factory=dict)
    prompts: array = field(default_factory=lambda: array("q"))
    wholes: array = field(default_factory=lambda: array("q"))

    def unread_key(self, number: int, key: str) -> None:
        """Sample `number` has a key that nothing reads."""
        if key in self.unread or len(self.unread) < MAX_UNREAD:
            self.unread.setdefault(key, Seen()).add(number)

    def conversation(self, number: int, turns: list, tools: list[dict]) -> None:
        """turns: of sample `number`, each a turns.Turn; the last one is an answer."""
        texts, more = [], None
        for _, role, content, more_of_turn in turns:
            if role == "user" and not content.strip():
                self.blank.add(number)
            if not (content.isascii() or unicodedata.is_normalized("NFC", content)):
                self.composed.add(number)
            texts += (role, content)
            more = more or more_of_turn
        answer = texts.pop()
        if tools or more:
            texts.append(repr((tools, [turn.more for turn in turns[:-1]])))
            answer += repr(turns[-1].more)
        prompt = hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=8)
        self.prompts.append(int.from_bytes(prompt.digest(), "little", signed=True))
        prompt.update(answer.encode(errors="surrogatepass"))
        self.wholes.append(int.from_bytes(prompt.digest(), "little", signed=True))

    def lines(self) -> list[str]:
        """One line for each thing there is to know."""
        lines = []
        if self.blank.samples:
            lines.append(f"{counted(self.blank.samples)} with an empty user turn (first: {self.blank.first})")
        if self.unanswered.samples:
            where = f"{counted(self.unanswered.samples)} with a last question that has no answer (first: {self.unanswered.first})"
            lines.append(f"{where}; the question is left out")
        if self.greetings.samples:
            where = f"{counted(self.greetings.samples)} that the assistant begins (first: {self.greetings.first})"
            lines.append(f'{where}; what it says first is context, unless it is marked with "train": true')
        if self.unclosed.samples:
            where = f"{counted(self.unclosed.samples)} with <think> but no </think> in an answer"
            lines.append(f"{where} (first: {self.unclosed.first}); it is learned as it stands")
        if self.unopened.samples:
            where = f"{counted(self.unopened.samples)} with </think> but no <think> in an answer"
            what = "a chat template takes what stands before it for thoughts"
            lines.append(f"{where} (first: {self.unopened.first}); {what}")
        if self.tools_in_text.samples:
            where = f'{counted(self.tools_in_text.samples)} with "tools" and <tools> in the system turn'
            what = "the system turn is kept, the tools are not laid out again"
            lines.append(f"{where} (first: {self.tools_in_text.first}); {what}")
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
    for key, seen in sorted(unread.items())[:SHOWN_UNREAD]:
        guess = [] if key in keys.ALL else difflib.get_close_matches(key.lower(), keys.ALL, 1, 0.75)
        meant = f'; did you mean "{guess[0]}"?' if guess else ""
        shown.append(f'"{key}" ({counted(seen.samples)}, first: {seen.first}{meant})')
    return ", ".join(shown) + (f" and {len(unread) - SHOWN_UNREAD} more" if len(unread) > SHOWN_UNREAD else "")


def counted(samples: int) -> str:
    """ "1 sample", "1,234 samples"."""
    return f"{samples:,} sample{'' if samples == 1 else 's'}"
