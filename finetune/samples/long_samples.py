"""--long_samples: what becomes of samples that are longer than --model_max_length, and what that costs."""

from dataclasses import dataclass, field

import numpy as np

from ..conversations.data_notes import counted
from ..conversations.messages import Conversation
from ..errors import UserError

WAYS = ("error", "cut", "drop", "split")
WHOLE_CORPUS = 8  # times max_length: a sample as long as that is hardly one conversation


@dataclass
class LongSamples:
    """Cuts the samples of one file, and counts.

    way: of WAYS. frame: ids that are supervised without being content; end: the id that ends an answer. full, source: tokens of every
    sample before cutting, and the number of its conversation. lost, lost_learned: tokens that no sample has; unanswered: numbers of
    conversations of which no answer is left; behind: answers of unrolled conversations that are not; split: (conversations, samples).
    """

    way: str
    max_length: int
    frame: set[int]
    end: int
    full: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    lost: int = 0
    lost_learned: int = 0
    unanswered: list[int] = field(default_factory=list)
    behind: int = 0
    split: list[int] = field(default_factory=lambda: [0, 0])

    def settle(self, number: int, samples: list) -> list:
        """What is left of the samples (chatml.Rendered) of conversation `number`."""
        self.full += [len(sample.ids) for sample in samples]
        self.source += [number] * len(samples)
        if all(len(sample.ids) <= self.max_length for sample in samples):
            return samples
        cut = [self.cut(sample) for sample in samples]
        for sample, left in zip(samples, cut):
            self.lost += len(sample.ids) - (len(left.ids) if left else 0)
            self.lost_learned += learned(sample) - (learned(left) if left else 0)
        kept = [left for left in cut if left]
        if self.way == "drop":
            return kept
        if kept:  # of a conversation that was unrolled, later answers may lie behind the limit
            self.behind += len(cut) - len(kept)
        else:
            self.unanswered.append(number)
        return kept

    def cut(self, sample):
        """The sample within the limit; None where nothing to learn is left of it, or it is to be dropped.

        It ends with the last answer that is whole; where there is none, in the midst of an answer.
        """
        if len(sample.ids) <= self.max_length:
            return sample
        labels = sample.labels[: self.max_length]
        content = ~np.isin(labels, [IGNORE, *self.frame])
        content[0] = False  # nothing predicts the first token
        if self.way == "drop" or not content.any():
            return None
        whole = np.flatnonzero((labels == self.end) & (np.cumsum(content) > 0))
        length = int(whole[-1]) + 1 if len(whole) else self.max_length
        return type(sample)(*(None if values is None else values[:length] for values in sample))

    # ---- what is said of it

    def check(self, kept: int, conversations: int, path: str) -> None:
        """Raises UserError where long samples are an error, and where cutting or dropping leaves nothing to learn.

        kept: samples that are left; conversations: how many there were.
        """
        full = np.array(self.full)
        long = np.flatnonzero(full > self.max_length)
        if not len(full):
            raise UserError(f"{path}: no sample whose last answer is to be learned, so --multi_turn last leaves none; leave it out")
        if self.way == "error" and len(long):
            what = f"{counted(len(long))} longer than {self.max_length:,} tokens (longest {full.max():,})"
            first = named(self.source[at] for at in long.tolist())
            raise UserError(f"{path}: {what}: sample {first}; raise --model_max_length, or give --long_samples cut, drop or split")
        if self.unanswered:
            what = f"{len(self.unanswered):,} of {conversations:,} samples have no answer token within {self.max_length:,}"
            raise UserError(f"{path}: {what}: sample {named(self.unanswered)}; raise --model_max_length or --long_samples drop")
        if not kept:
            what = f"all samples are longer than {self.max_length:,} tokens (shortest {full.min():,})"
            raise UserError(f"{path}: {what}, so --long_samples drop leaves none; raise --model_max_length")

    def notes(self) -> list[str]:
        """A line for each thing that long samples cost."""
        full, lines = np.array(self.full), []
        long = np.flatnonzero(full > self.max_length)
        if self.split[0]:
            what = f"{self.split[0]:,} conversation{'s' * (self.split[0] > 1)} longer than {self.max_length:,} tokens"
            lines.append(f"{what} split into {self.split[1]:,} samples: later ones begin without the questions before")
        if len(long):
            limit = f"{self.max_length:,} tokens"
            done = f"dropped, being longer than {limit}" if self.way == "drop" else f"cut to {limit}"
            share, longest = f"{100 * len(long) / len(full):.2g} %", f"longest {full.max():,}"
            lines.append(f"{counted(len(long))} {done} ({share}), {longest}; {self.lost:,} tokens lost, {self.lost_learned:,} of them learned")
            at = int(full.argmax())
            if full[at] >= WHOLE_CORPUS * self.max_length:
                times = f"{full[at]:,} tokens = {full[at] / self.max_length:.0f} × max length"
                lines.append(f"sample {self.source[at]} has {times}; one sample should be one conversation")
        if self.behind:
            what = f"their answers lie behind {self.max_length:,} tokens"
            lines.append(f"{self.behind:,} samples of unrolled conversations are left out: {what}")
        return lines


IGNORE = -100  # qwen_model.chatml's, which would bring torch


def learned(sample) -> int:
    """Tokens of a chatml.Rendered that are learned."""
    return int(np.count_nonzero(sample.labels[1:] >= 0))


def named(numbers) -> str:
    """The first five, and whether there are more."""
    numbers = list(dict.fromkeys(numbers))
    return ", ".join(map(str, numbers[:5])) + ", …" * (len(numbers) > 5)


def rounds_of(conversation: Conversation) -> tuple[list[dict], list[list[dict]]]:
    """(the system turn, if any; the rounds: each a question with all that follows it)."""
    messages = conversation.messages
    system = [message for message in messages[:1] if message["role"] == "system"]
    rounds: list[list[dict]] = []
    for message in messages[len(system) :]:
        if message["role"] == "user" and (not rounds or any(other["role"] == "user" for other in rounds[-1])):
            rounds.append([])
        elif not rounds:
            rounds.append([])  # a greeting: it belongs to the first question
        rounds[-1].append(message)
    return system, rounds


def parts_of(conversation: Conversation, lengths_of, max_length: int) -> list[Conversation]:
    """A long conversation in several, each of as many rounds as fit into max_length; one where it cannot be taken apart.

    lengths_of(conversations) -> tokens of each, as one sample. A part without anything to learn is left out.
    """
    system, rounds = rounds_of(conversation)
    if len(rounds) < 2:
        return [conversation]
    measured = [conversation.messages, *([*system, *round] for round in rounds)]
    whole, *lengths = lengths_of([Conversation(list(map(without_weight, each)), conversation.tools) for each in measured])
    shared = max(0, (sum(lengths) - whole) // (len(rounds) - 1))  # what each of them has of its own: system turn and tools
    parts, size = [[]], 0
    for round, length in zip(rounds, lengths):
        more = length if not parts[-1] else length - shared
        if parts[-1] and size + more > max_length:
            parts.append([])
            size, more = 0, length
        parts[-1] += round
        size += more
    found = [Conversation([*system, *part], conversation.tools) for part in parts]
    return [part for part in found if any(is_learned(message) for message in part.messages)]


def without_weight(message: dict) -> dict:
    """What is not learned at all would not be laid out, and have no length."""
    return {key: value for key, value in message.items() if key != "weight"}


def is_learned(message: dict) -> bool:
    return message["role"] == "assistant" and bool(message.get("weight", 1))
