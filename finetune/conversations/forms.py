"""The shapes of a sample that people publish: one table, and which of them a sample has. data/README.md describes it.

A sample holds its conversation in a list of turns (TURNS), or a single question and answer under two keys (SINGLE).
"""

import functools
from typing import NamedTuple

# keys of a turn, who speaks and what is said; any of the first with any of the second
SPEAKERS = ("role", "from", "speaker", "author")
TEXTS = ("content", "value", "text", "message")
OWN = {"conversations": ("from", "value"), "messages": ("role", "content")}  # the documented form's, OpenAI's
# keys of a list of turns; those that are not OWN count only where the list cannot be anything else
TURNS = (*OWN, "conversation", "dialog", "dialogue", "turns", "chat", "data")


class Single(NamedTuple):
    """question: its key; below: keys whose text is put below it, on a line of its own; answers: keys of the answer."""

    question: str
    below: tuple[str, ...]
    answers: tuple[str, ...]


SINGLE = (
    Single("instruction", ("input", "context"), ("output", "response", "answer", "completion")),  # Alpaca, Dolly
    Single("query", (), ("response", "answer")),  # ms-swift, MetaMath
    Single("question", (), ("answer", "response")),  # GSM8K, OpenOrca
    Single("prompt", (), ("response", "completion", "answer", "output")),  # OpenAI's older form, TRL
    Single("input", (), ("output", "response", "target")),  # xtuner, Firefly
    Single("problem", (), ("solution", "answer")),  # NuminaMath
    Single("human", (), ("assistant", "bot", "gpt")),  # Firefly's pairs
    Single("user", (), ("assistant", "bot")),
)
SINGLE_KEYS = frozenset(key for single in SINGLE for key in (single.question, *single.below, *single.answers))
HISTORY = "history"  # earlier questions and answers of a single one, in pairs

# What is no form, by a key that tells: what it is, and what to do.
NO_FORM = {
    "message_tree_id": "is a tree of messages (Open Assistant): write each path from its root to an answer as a sample of its own",
    "mapping": "is a tree of messages (an export of ChatGPT): write the path of each conversation as a sample of its own",
    "text": 'is one text without turns, which is pre-training data: give questions and answers, as {"messages": [...]}',
}
LAID_OUT = 'is a text that is laid out as ChatML already: take it apart into {"messages": [{"role": ..., "content": ...}, ...]}'


class Form(NamedTuple):
    """turns: the key of a list of turns; else question, below and answer: the keys of a single question, and of its answer."""

    turns: str = ""
    question: str = ""
    below: tuple[str, ...] = ()
    answer: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.turns,) if self.turns else (self.question, *self.below, self.answer)

    def __str__(self) -> str:
        return f'"{self.turns}"' if self.turns else f'"{self.question}"/"{self.answer}"'


CONVERSATIONS, MESSAGES = Form("conversations"), Form("messages")  # the usual ones, made once


def forms_of(sample: dict) -> list[Form]:
    """The forms that a sample may be read in: none, one, or several, which are ambiguous. Keys whose value is null are absent."""
    names = tuple(key for key, value in sample.items() if value is not None and isinstance(key, str))
    turns = [Form(key) for key in TURNS if key in names and (key in OWN or holds_turns(sample[key]))]
    return turns + list(singles(names))


@functools.lru_cache(maxsize=4096)
def singles(names: tuple[str, ...]) -> tuple[Form, ...]:
    """The single questions and answers among the keys of a sample."""
    found = [
        Form("", single.question, tuple(key for key in single.below if key in names), answer)
        for single in SINGLE
        for answer in single.answers
        if single.question in names and answer in names
    ]
    inner = {key for form in found for key in form.below}  # {"instruction", "input", "output"}: the input is no question
    return tuple(form for form in found if form.question not in inner)


def question_without_answer(names) -> Single | None:
    """The one form whose question a sample has; None where it has none or several."""
    found = [single for single in SINGLE if single.question in names]
    return found[0] if len(found) == 1 else None


def holds_turns(value: object) -> bool:
    """Whether a value can be nothing but a conversation: turns, pairs of question and answer, or texts in turn."""
    if isinstance(value, str):
        value = value.lstrip()
        return value.startswith("[{") and any(f'"{key}"' in value for key in TEXTS)
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return len(value) > 1 and all(isinstance(each, str) for each in value)
    return isinstance(first, dict) and (fields_of(first) is not None or len(forms_of_pair(first)) == 1)


def fields_of(turn: dict, own: tuple[str, str] | None = None) -> tuple[str, str] | None:
    """The two keys of a turn: `own` where it has one of these; None for what is no turn."""
    if own and own[0] in turn and own[1] in turn:
        return own
    if own and (own[0] in turn or own[1] in turn):
        others = [speaker for speaker in SPEAKERS if speaker in turn and any(text in turn for text in TEXTS)]
        if own[0] in turn or not others:
            speaker = own[0]
            text = own[1] if own[1] in turn else next((key for key in TEXTS if key in turn), own[1])
            return speaker, text
    speaker = next((key for key in SPEAKERS if key in turn), None)
    text = next((key for key in TEXTS if key in turn), None)
    return (speaker, text) if speaker and text else None


def forms_of_pair(entry: dict) -> tuple[Form, ...]:
    """The forms of one entry of a list of pairs: {"human": ..., "assistant": ...}."""
    return singles(tuple(key for key, value in entry.items() if value is not None and isinstance(key, str)))


def lowered(sample: dict) -> dict | None:
    """The sample with its keys in lower case, as a table's header may have them; None where that changes nothing or loses one."""
    small = {key.lower() if isinstance(key, str) else key: value for key, value in sample.items()}
    return small if len(small) == len(sample) and small.keys() != sample.keys() else None
