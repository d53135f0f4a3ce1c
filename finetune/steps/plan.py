"""Which samples make up which forward pass of which rank at which step: a pure function of lengths, seed and ranks.

A step holds the samples that its users asked for (batch size x accumulation x ranks). They are laid one after another,
without padding, into as few forward passes as `max_tokens_per_pass` allows, every rank making the same number of passes
of nearly the same number of tokens. Because the loss is a sum over tokens, divided by the supervised tokens of the whole
step (or by what they weigh), the layout changes speed and memory and nothing else. Resuming at step k is asking for step k.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

LAID_OUT = 64  # how many steps are laid out to find the largest pass


@dataclass(frozen=True)
class Step:
    """One optimizer step. passes[rank][k]: the samples of that rank's k-th forward pass (none where there are too few)."""

    passes: tuple[tuple[tuple[int, ...], ...], ...]
    samples: int
    tokens: int
    supervised_tokens: int
    loss_weight: float  # what they weigh together: the loss's denominator


class Plan:
    """The steps of every epoch.

    lengths, supervised: int arrays (samples,): tokens of each sample, and how many of them are predicted and count.
    weights: float64 (samples,), what these weigh together; None: 1 each.
    samples_per_step: over all ranks. drop_last: leave out a last, smaller step.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        supervised: np.ndarray,
        *,
        weights: np.ndarray | None = None,
        samples_per_step: int,
        world_size: int = 1,
        max_tokens_per_pass: int,
        seed: int = 42,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        assert len(lengths) == len(supervised) > 0 and samples_per_step >= 1 and world_size >= 1
        self.lengths, self.supervised = np.asarray(lengths), np.asarray(supervised)
        self.weights = self.supervised if weights is None else np.asarray(weights)
        assert len(self.weights) == len(self.lengths)
        self.samples_per_step, self.world_size = samples_per_step, world_size
        self.max_tokens_per_pass, self.seed, self.shuffle = max_tokens_per_pass, seed, shuffle
        full, rest = divmod(len(self.lengths), samples_per_step)
        self.steps_per_epoch = full + (rest > 0 and not (drop_last and full > 0))
        self._order: tuple[int, np.ndarray] | None = None
        self.front: tuple[int, ...] = self.largest_two() if shuffle else ()

    def in_words(self, steps: int) -> str:
        """How many steps a run has, and of what."""
        each = min(self.samples_per_step, len(self.lengths))
        return f"{steps:,} ({self.steps_per_epoch:,} an epoch, {each} sample{'s' * (each > 1)} each)"

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of the samples; the same on every rank and every machine."""
        if self._order is None or self._order[0] != epoch:
            samples = np.arange(len(self.lengths))
            if self.shuffle:
                np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(samples)
            self._order = epoch, samples
        return self._order[1]

    def step(self, epoch: int, index: int) -> Step:
        """Step `index` (from 0) of an epoch (from 0)."""
        assert 0 <= index < self.steps_per_epoch
        samples, lengths, bins = self.laid_out(epoch, group_at(index, self.front) if epoch == 0 else index)
        passes = [tuple(int(samples[i]) for i in members) for members in bins]
        return Step(
            # fullest first, dealt out in turns: the passes that run at the same time are alike
            passes=tuple(tuple(passes[rank :: self.world_size]) for rank in range(self.world_size)),
            samples=len(samples),
            tokens=int(lengths.sum()),
            supervised_tokens=int(self.supervised[samples].sum()),
            loss_weight=float(self.weights[samples].sum()),
        )

    def laid_out(self, epoch: int, index: int):
        """(samples, their lengths, the passes as positions in both) of the index-th group of the epoch's order."""
        begin = index * self.samples_per_step
        samples = self.order(epoch)[begin : begin + self.samples_per_step]
        lengths = self.lengths[samples]
        return samples, lengths, lay_out(lengths.tolist(), self.max_tokens_per_pass, self.world_size)

    def largest_step(self) -> int:
        """Tokens of the first epoch's largest step, all ranks together."""
        return int(self.sums_of_steps(np.add).max())

    def sums_of_steps(self, ufunc) -> np.ndarray:
        """Of each group of the first epoch: np.add, its tokens; np.maximum, its longest sample."""
        lengths = self.lengths[self.order(0)[: self.steps_per_epoch * self.samples_per_step]]
        return ufunc.reduceat(lengths, np.arange(self.steps_per_epoch) * self.samples_per_step)

    def largest_two(self) -> tuple[int, ...]:
        """The groups of the first epoch with the largest pass and the next largest, among the likeliest few.

        They depend on the layout: a run that is gone on with has to keep the `front` that it began with.
        """
        return tuple(sorted(self.likely(), key=lambda index: (-max(self.passes_of(index)), index))[:2])

    def likely(self) -> list[int]:
        """The groups of the first epoch that may have the largest passes, LAID_OUT of them at most."""
        longest, tokens = self.sums_of_steps(np.maximum), self.sums_of_steps(np.add)
        # no pass is larger: one sample, or as many as the limit takes
        at_most = np.maximum(longest, np.minimum(tokens, self.max_tokens_per_pass))
        return np.argsort(-at_most, kind="stable")[:LAID_OUT].tolist()

    def passes_of(self, index: int) -> list[int]:
        """Tokens of each pass of a group of the first epoch."""
        _, lengths, bins = self.laid_out(0, index)
        return [int(lengths[members].sum()) for members in bins if members]

    def largest_passes(self) -> dict[bool, int]:
        """Tokens of the largest pass that is alone in its step (False), and of the largest of a step of several (True)."""
        found: dict[bool, int] = {}
        for passes in map(self.passes_of, self.likely()):
            several = len(passes) > self.world_size
            found[several] = max(found.get(several, 0), *passes)
        return found

    def total_steps(self, epochs: float, max_steps: int = -1) -> int:
        """Optimizer steps of a run of so many epochs; max_steps, where positive, wins (transformers' rule)."""
        return max_steps if max_steps > 0 else math.ceil(epochs * self.steps_per_epoch)


def group_at(index: int, front: tuple[int, ...]) -> int:
    """The index-th group where those of `front` come first and the others follow in their order."""
    if index < len(front):
        return front[index]
    index -= len(front)
    for group in sorted(front):
        index += index >= group
    return index


def lay_out(lengths: list[int], max_tokens: int, ranks: int) -> list[list[int]]:
    """Deals samples into the fewest bins, a multiple of `ranks`, of at most `max_tokens`; fullest bin first.

    A sample longer than max_tokens has a bin of its own. Longest first into the emptiest bin (Graham, 1969) keeps the bins
    level; where that overflows, longest first into the first bin with room (first fit decreasing) may still fit.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = ranks * max(1, -(-sum(min(length, max_tokens) for length in lengths) // (max_tokens * ranks)))
    while True:
        for fill in (fill_level, fill_first):
            bins = fill(longest_first, lengths, max_tokens, count)
            if bins is not None:
                loads = [sum(lengths[i] for i in members) for members in bins]
                return [bins[b] for b in sorted(range(count), key=lambda b: (-loads[b], b))]
        count += ranks


def fill_level(longest_first, lengths, max_tokens: int, count: int) -> list[list[int]] | None:
    """Each sample into the emptiest bin; None if a bin of several samples overflows."""
    heap, bins = [(0, b) for b in range(count)], [[] for _ in range(count)]
    for i in longest_first:
        load, b = heapq.heappop(heap)
        if bins[b] and load + lengths[i] > max_tokens:
            return None
        bins[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return bins


def fill_first(longest_first, lengths, max_tokens: int, count: int) -> list[list[int]] | None:
    """Each sample into the first bin with room; None if there is none."""
    loads, bins = [0] * count, [[] for _ in range(count)]
    for i in longest_first:
        b = next((b for b in range(count) if not bins[b] or loads[b] + lengths[i] <= max_tokens), None)
        if b is None:
            return None
        bins[b].append(i)
        loads[b] += lengths[i]
    return bins
