"""What a data file may do but its owner should know of: counted while it is read, told in one line each."""

import difflib
import hashlib
import re
import unicodedata
from array import array
from dataclasses import dataclass, field

import numpy as np

from ..errors import listed
from . import keys

MAX_UNREAD = 1000  # different keys remembered; a file that uses ids as keys could have millions
SHOWN_UNREAD = 12
SHOWN_CHARS = 40  # of one text of the file
MAX_SYSTEMS = 1000  # different system texts remembered
LONGEST_SYSTEM = 20_000  # characters of one that is written into training.json
FEW = 10  # conversations that may well have one answer
# what templates leave in: {{name}}, {% if %}, [INSERT NAME], [Your Name], <your name>
PLACEHOLDER = re.compile(
    r"\{\{ ?[A-Za-z_]\w{0,30} ?\}\}|\{% ?(?:if|for|end|set)[^%\n]{0,60}%\}|\[INSERT[^\]\n]{0,40}\]|\[[Yy]our [^\]\n]{1,30}\](?!\()|<[Yy]our [^>\n]{1,30}>"
)


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
    placeholders: Seen = field(default_factory=Seen)
    placeholder: str = ""  # the first
    systems: dict[str | None, int] = field(default_factory=dict)  # system text -> conversations; None where there is none
    answers: array = field(default_factory=lambda: array("q"))  # of each conversation's last answer
    unread: dict[str, Seen] = field(default_factory=dict)
    prompts: bytearray = field(default_factory=bytearray)
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
            texts += (role, content)
            more = more or more_of_turn
        said = "\0".join(texts)
        if not (said.isascii() or unicodedata.is_normalized("NFC", said)):
            self.composed.add(number)
        # a mark of a placeholder; written out, because a loop over them takes four times as long
        if "{{" in said or "{%" in said or "[I" in said or "[Y" in said or "[y" in said or "<y" in said or "<Y" in said:
            self._placeholder(number, said)
        system = turns[0].content if turns[0].role == "system" else None
        if system in self.systems or len(self.systems) < MAX_SYSTEMS:
            self.systems[system] = self.systems.get(system, 0) + 1
        answer = texts[-1]
        prompt = said[: len(said) - len(answer)]
        if tools or more:
            prompt += repr((tools, [turn.more for turn in turns[:-1]]))
            answer += repr(turns[-1].more)
        self.prompts += hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=8).digest()
        self.wholes.append(hash((prompt, answer)))
        self.answers.append(hash(answer))

    def _placeholder(self, number: int, said: str) -> None:
        if found := PLACEHOLDER.search(said):
            self.placeholder = self.placeholder or found[0]
            self.placeholders.add(number)

    def hashes(self) -> np.ndarray:
        """int64: of the prompt of each conversation so far."""
        return np.frombuffer(bytes(self.prompts), "<i8").astype(np.int64)

    def system(self) -> str | None:
        """The system text that all conversations have; None where they have none, or several."""
        text = next(iter(self.systems), None) if len(self.systems) == 1 else None
        return text if text and len(text) <= LONGEST_SYSTEM else None

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
        if self.placeholders.samples:
            where = f"{counted(self.placeholders.samples)} with what looks like a placeholder, {shown(self.placeholder)}"
            lines.append(f"{where} (first: {self.placeholders.first}); it is learned as it stands")
        if len(self.systems) > 1:
            lines.append(_systems(self.systems))
        lines += _equal_answers(self.answers)
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
        return lines + _repeated(self.hashes(), np.array(self.wholes))


def _systems(systems: dict[str | None, int]) -> str:
    """That a model is told different things before its conversations."""
    given = {text: count for text, count in systems.items() if text is not None}
    at_least = "at least " * (len(systems) == MAX_SYSTEMS)
    texts = f"{at_least}{len(given):,} different system texts" if len(given) > 1 else "a system text"
    where = f"{texts}, the commonest in {counted(max(given.values()))}"
    without = f", none in {counted(systems[None])}" if None in systems else ""
    return f"{where}{without}: the model answers as trained when it is asked with the one that fits (finetune.ask --system)"


def _equal_answers(answers: array) -> list[str]:
    """Where over half of more than FEW conversations end with the same answer."""
    if len(answers) <= FEW:
        return []
    _, counts = np.unique(np.array(answers), return_counts=True)
    most = int(counts.max())
    return [f"{most:,} of {counted(len(answers))} end with the same answer"] * (most > len(answers) / 2)


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
    found = []
    for key, seen in sorted(unread.items()):
        guess = [] if key in keys.ALL else difflib.get_close_matches(key.lower(), keys.ALL, 1, 0.75)
        meant = f'; did you mean "{guess[0]}"?' if guess else ""
        found.append(f'"{shown(key)}" ({counted(seen.samples)}, first: {seen.first}{meant})')
    return listed(found, SHOWN_UNREAD)


def counted(samples: int) -> str:
    """ "1 sample", "1,234 samples"."""
    return f"{samples:,} sample{'' if samples == 1 else 's'}"


def shown(text: str) -> str:
    """A text of the file for a message: its beginning, and without characters that a terminal would obey."""
    begin = str(text)[:SHOWN_CHARS]
    visible = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in begin)
    return visible + "…" * (len(text) > SHOWN_CHARS)
