"""Conversations for a model to be quantized on: drawn from a file, rendered as they are for training."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..conversations.messages import Conversation
from ..conversations.reading import Conversations
from ..folders import config_files, model_folder
from ..samples.renderers import renderer_of
from ..samples.rendering import Rendering
from .settings import FEW, MANY

BATCH = 256  # conversations rendered at a time


@dataclass
class Calibration:
    """samples: (ids, labels) of each conversation drawn, int32, at most max_length tokens; labels -100 but in answers.

    given: conversations in the file. notes: lines about the file.
    """

    path: str
    samples: list[tuple[np.ndarray, np.ndarray]]
    given: int
    seed: int
    max_length: int
    cut: int  # samples that were longer
    notes: list[str]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, ascending."""
        return sorted(len(ids) for ids, _ in self.samples)

    def describe(self) -> list[str]:
        """Lines to print: how many samples, how long, and whether that is enough."""
        lengths = self.lengths
        drawn = f"{self.given:,} given, {len(self):,} taken (seed {self.seed})"
        median, cut = lengths[len(lengths) // 2], f", {self.cut:,} cut" if self.cut else ""
        sizes = f"shortest {lengths[0]:,}, median {median:,}, longest {lengths[-1]:,} (limit {self.max_length:,}{cut})"
        lines = [f"calibration: {self.path}: {drawn}; {sum(lengths):,} tokens, {sizes}"]
        if not FEW <= len(self) <= MANY:
            asked = f"{self.given:,} given" if len(self) == self.given else f"{len(self):,} taken"
            lines.append(f"use {FEW}-{MANY} samples; {asked}")
        return lines

    def record(self) -> dict:
        """What training.json says of the calibration."""
        lengths = self.lengths
        sizes = {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]}
        drawn = {"path": self.path, "given": self.given, "taken": len(self), "seed": self.seed}
        return drawn | {"max_length": self.max_length, "tokens": sum(lengths)} | sizes


def longest(folder: Path, max_len: int) -> int:
    """--max_len, but not beyond the length of the model's own training samples."""
    return min(max_len, model_folder.trained_length(config_files.config_of(folder)) or max_len)


def draw(conversations: Conversations, tokenizer, count: int, seed: int, max_length: int) -> Calibration:
    """`count` conversations (or all, where there are fewer), the same ones for the same file and seed.

    They keep the order of the file. max_length: tokens of each, from its beginning.
    """
    given = len(conversations)
    chosen = set(random.Random(seed).sample(range(given), min(count, given)))
    renderer, samples, cut = renderer_of(tokenizer, conversations.path, Rendering(multi_turn="as_is")), [], 0
    drawn = (conversation for number, conversation in enumerate(conversations) if number in chosen)
    for ids, labels in rendered(renderer, drawn):
        cut += len(ids) > max_length
        samples.append((ids[:max_length].copy(), labels[:max_length].copy()))  # not a view of the whole batch
    renderer.problems.raise_if_any()
    notes = [f"{conversations.path}: {line}" for line in conversations.notes + renderer.notes()]
    return Calibration(conversations.path, samples, given, seed, max_length, cut, notes)


def rendered(renderer, conversations: Iterator[Conversation]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) of each conversation, as one sample."""
    while batch := list(islice(conversations, BATCH)):
        for samples in renderer.render_batch(batch):
            yield from ((sample.ids, sample.labels) for sample in samples)
