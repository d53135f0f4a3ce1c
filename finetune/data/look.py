"""A look at data and at a run, as one value that every page shows: numbers, lengths, a few samples, what is odd.

data_look() needs the rendered samples alone; run_rows() adds what a prepared run would do. Nothing is trained or written.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..samples.rendered_samples import Samples

BARS = 12  # of a histogram
TAIL = 0.995  # the share of the samples that the bars share evenly; what is longer is in the last one
SHOWN_IN_TERMINAL, SHOWN_ON_PAGE = 3, 30
LONGEST_TEXT = 20_000  # characters of a sample that a page shows


class Span(NamedTuple):
    """A stretch of a sample: its text, and whether it is learned. tokens: how many it has."""

    text: str
    learned: bool
    tokens: int


class Shown(NamedTuple):
    """One sample as it will be trained on. number: its place among the samples, from 1; name: why it is shown."""

    number: int
    name: str
    tokens: int
    learned: int
    spans: list[Span]


class Bar(NamedTuple):
    """Samples of `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Look:
    """title: the files. findings: what would end a run. notes: what is odd. rows: (name, text) of what there is and will be.

    bars: how long the samples are; limit: the most tokens that one may have. shown: a few samples.
    """

    title: str
    rows: list[tuple[str, str]]
    bars: list[Bar]
    limit: int
    shown: list[Shown]
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def data_look(samples: Samples, tokenizer, title: str, rows=(), findings=(), count: int = SHOWN_ON_PAGE) -> Look:
    """A look at rendered samples. count: how many samples it holds; rows: what stands beside those of the data."""
    own = [
        ("samples", f"{len(samples):,}"),
        ("tokens", f"{samples.total_tokens:,}, {samples.total_supervised:,} of them learned ({share(samples)})"),
        ("lengths", lengths_in_words(samples)),
    ]
    shown = [show(samples, tokenizer, number, name) for number, name in choose(samples.lengths, count)]
    bars = histogram(samples.lengths)
    return Look(title, own + list(rows), bars, samples.max_length, shown, list(samples.notes), list(findings))


def share(samples: Samples) -> str:
    return f"{samples.total_supervised / samples.total_tokens:.0%}"


def lengths_in_words(samples: Samples) -> str:
    """Shortest, median, longest."""
    low, middle, high = (int(value) for value in np.quantile(samples.lengths, [0, 0.5, 1], method="nearest"))
    return f"{low:,} to {high:,} tokens, half of the samples at most {middle:,} (limit {samples.max_length:,})"


# ---- how long samples are


def histogram(lengths: np.ndarray, bars: int = BARS) -> list[Bar]:
    """At most `bars` + 1 bars of a round width; the last one holds everything that is longer than the usual samples."""
    usual = int(np.quantile(lengths, TAIL, method="higher"))
    width = round_up(usual / bars)
    last = -(-usual // width)  # bar number 1 ends at `width`
    place = np.minimum((lengths - 1) // width, last)
    counts = np.bincount(place, minlength=last + 1)
    found = [Bar(i * width + 1, (i + 1) * width, int(counts[i])) for i in range(last)]
    if counts[last]:
        found.append(Bar(last * width + 1, int(lengths.max()), int(counts[last])))
    first = next(i for i, bar in enumerate(found) if bar.count)
    return found[first:]


def round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    if value <= 1:
        return 1
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


# ---- samples to look at


def choose(lengths: np.ndarray, count: int) -> list[tuple[int, str]]:
    """Up to `count` samples, each with its name: the first, one of median length, the longest, then evenly spread ones."""
    order = np.argsort(lengths, kind="stable")
    chosen = {0: "the first", int(order[len(order) // 2]): "of median length", int(order[-1]): "the longest"}
    for place in np.linspace(0, len(lengths) - 1, min(count, len(lengths))).astype(int).tolist():
        if len(chosen) >= count:
            break
        chosen.setdefault(place, "")
    return list(chosen.items())[:count]


def show(samples: Samples, tokenizer, number: int, name: str = "") -> Shown:
    """Sample `number` (from 0) as text, in stretches that are learned and such that are not."""
    ids, labels = samples[number]
    learned = labels >= 0
    learned[:1] &= False  # nothing predicts the first token
    weights = samples.token_weights(number)
    if weights is not None:
        learned &= weights > 0
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    spans = []
    for begin, end in zip(borders, borders[1:]):
        text = tokenizer.decode(ids[begin:end].tolist())
        spans.append(Span(text[:LONGEST_TEXT], bool(learned[begin]), end - begin))
    return Shown(number + 1, name, len(ids), int(learned.sum()), spans)
