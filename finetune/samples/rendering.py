"""How conversations become ids and labels: what a user may choose, and what every renderer has in common."""

import json
from typing import NamedTuple

from ..conversations.data_notes import Seen
from ..conversations.file_findings import SHOWN
from ..errors import UserError

MOST = 1000  # conversations that cannot be rendered, until the rest is not looked at
FRAME = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # of the formats themselves: never from a text, unless asked for
PROBE = "It's 1984, don't\r\n\tpanic!  é é Å 你好，世界 👩‍👩‍👧 <|im_start|><|endoftext|>  \n\n x"  # two ways to write é


class Rendering(NamedTuple):
    """supervise: "assistant", or "chatml" for the published mask of first-generation Qwen.

    allow_special: special tokens that stand in a text become control tokens; without it those of train_tokens alone do.
    multi_turn: "unroll" (each answer after the prompt that the model will get for it, in a sample of its own where the chat
    template shows it differently in a longer conversation), "last" (the answer to the last question alone) or "as_is" (each
    conversation is one sample).
    empty_thoughts: "context" or "learn", for the empty block of thoughts that a template puts before an answer without any.
    """

    supervise: str = "assistant"
    allow_special: bool = False
    train_tokens: tuple[str, ...] = ()
    multi_turn: str = "unroll"
    empty_thoughts: str = "context"

    @classmethod
    def of_record(cls, record: dict) -> "Rendering":
        """How a run laid out its conversations, from its training.json; the usual way where that says nothing."""
        said = record.get("data", {}) | {"train_tokens": tuple(record.get("method", {}).get("train_tokens") or ())}
        return cls(**{name: said[name] for name in cls._fields if name in said})

    def tokens_in_text(self, special: list[str]) -> frozenset[str]:
        """Which special tokens become control tokens where they stand in a text."""
        return frozenset(special) if self.allow_special else frozenset(self.train_tokens) - set(FRAME)

    def wanted(self, messages: list[dict]) -> list[int]:
        """The numbers of the messages that are to be learned."""
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]
        if self.multi_turn != "last":
            return numbers
        questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
        return [number for number in numbers if not questions or number > questions[-1]]


class Refused(Exception):
    """A conversation that cannot be rendered; why is among the Problems."""


class Problems:
    """What is wrong with the conversations of a file, as it shows when they are laid out. The same problem is told once.

    dropping: such conversations are left out; then reasons has why, by their number.
    """

    def __init__(self, path: str, dropping: bool = False):
        self.path, self.dropping, self.found, self.count = path, dropping, {}, 0
        self.reasons: dict[int, str] = {}

    def refuse(self, number: int, what: str, cause: Exception | None = None):
        """Notes the problem of conversation `number`; raises Refused, or a UserError where there are too many to go on."""
        self.found.setdefault(what, Seen()).add(number)
        self.count += 1
        if self.dropping:
            self.reasons.setdefault(number, what)
        elif self.count >= MOST:
            self.raise_if_any()
        raise Refused(what) from cause

    def lines(self) -> list[str]:
        """A line for each problem."""
        lines = []
        for what, seen in list(self.found.items())[:SHOWN]:
            others = f" (and {seen.samples - 1:,} more samples)" if seen.samples > 1 else ""
            lines.append(f"sample {seen.first}{others}: {what}")
        return lines + [f"and {len(self.found) - SHOWN:,} more findings"] * (len(self.found) > SHOWN)

    def raise_if_any(self) -> None:
        if self.found:
            raise UserError(*(f"{self.path}: {line}" for line in self.lines()))


def unlearned_results(messages: list[dict]) -> list[dict]:
    """The messages; results inside answers that are ReAct text are marked as context ("spans")."""
    if not any("Observation:" in message["content"] for message in messages):
        return messages
    from qwen_model.react import observation_spans

    return observation_spans(messages)


def identity_of(*parts) -> str:
    return json.dumps(parts)
