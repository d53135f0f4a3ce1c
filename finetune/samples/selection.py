"""Which samples of which files are taken: shares of a file, what is held out, several files as one.

Conversations are drawn by a hash of their prompt: the same ones on every start and every machine, in any order of the file, for every
model and length; equal prompts stay together, and so do all samples of a conversation.
"""

import hashlib

import numpy as np

from ..data_files.sources import Source
from ..errors import UserError
from .rendered_samples import Samples, described

SHARES, HELD_OUT = 0x5348415245, 0x48454C444F5554  # two independent draws


def select(loaded: list[tuple[Source, Samples]], eval_split: float | None):
    """(training samples, evaluation samples or None). loaded: each file with its samples; eval_split: the share held out.

    Raises UserError where nothing is left on one side.
    """
    training, evaluation = [], []
    for source, samples in loaded:
        taken = np.ones(len(samples), bool) if source.share == 1 else drawn(samples, source.share, SHARES)
        (training if source.flag == "--data_path" else evaluation).append((source, samples, taken))
    if not eval_split:
        return joined(training), joined(evaluation) if evaluation else None
    kept, held_out = [], []
    for source, samples, taken in training:
        out = drawn(samples, eval_split, HELD_OUT)
        kept.append((source, samples, taken & ~out))
        held_out.append((source, samples, taken & out))
    if not any(taken.any() for _, _, taken in kept) or not any(taken.any() for _, _, taken in held_out):
        what = f"--eval_split {eval_split:g}: leaves nothing to train on, or nothing to evaluate on"
        raise UserError(f"{what} (conversations with the same question stay together) - give another share, or --eval_data_path")
    return joined(kept), joined(held_out, f"{eval_split:g} of ")


def joined(parts, name: str = ""):
    """The samples that are taken of (source, samples, taken bool[n]); of one file whole, its samples themselves."""
    parts = [(source, samples, np.flatnonzero(taken)) for source, samples, taken in parts if taken.any()]
    if len(parts) == 1 and len(parts[0][2]) == len(parts[0][1]):
        return parts[0][1]
    return Selection([(samples, chosen) for _, samples, chosen in parts], name + ", ".join(str(source) for source, _, _ in parts))


class Selection:
    """Some samples of some files, one behind the other, with the interface of Samples."""

    def __init__(self, parts: list[tuple[Samples, np.ndarray]], path: str):
        """parts: (samples of a file, numbers of those that are taken, in order). path: how people know them."""
        assert parts and all(len(chosen) for _, chosen in parts)
        self.parts, self.path, self.max_length = parts, path, parts[0][0].max_length
        self.notes = [line for samples, _ in parts for line in samples.notes]
        self.left_out = b"".join(samples.left_out for samples, _ in parts)
        systems = {samples.system for samples, _ in parts}
        self.system = systems.pop() if len(systems) == 1 else None
        self._ends = np.cumsum([len(chosen) for _, chosen in parts])
        for name in ("lengths", "supervised", "weight_sums", "conversations", "prompts"):
            setattr(self, name, np.concatenate([getattr(samples, name)[chosen] for samples, chosen in parts]))
        self.total_tokens, self.total_supervised = int(self.lengths.sum()), int(self.supervised.sum())
        self.without_thoughts = all(samples.without_thoughts for samples, _ in parts)
        digest = hashlib.sha256()
        for samples, chosen in parts:
            digest.update(samples.fingerprint.encode() + np.asarray(chosen, np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, i: int) -> tuple[Samples, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        part = int(np.searchsorted(self._ends, i, side="right"))
        samples, chosen = self.parts[part]
        return samples, int(chosen[i - (self._ends[part] - len(chosen))])

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        samples, number = self._place(i)
        return samples[number]

    def token_weights(self, i: int) -> np.ndarray | None:
        samples, number = self._place(i)
        return samples.token_weights(number)

    def origin(self, i: int) -> tuple[str, int]:
        samples, number = self._place(i)
        return samples.origin(number)

    def describe(self) -> str:
        return described(self)


def drawn(samples: Samples, share: float, draw: int) -> np.ndarray:
    """bool[n]: which samples belong to a share of the conversations, at least one of them.

    draw: SHARES or HELD_OUT. The prompts whose mixed hashes are lowest are taken until the share is full.
    """
    _, first = np.unique(samples.conversations, return_index=True)
    prompts, count = np.unique(samples.prompts[first], return_counts=True)
    order = np.argsort(mixed(prompts, draw), kind="stable")
    taken = np.cumsum(count[order])
    number = max(1, int(np.searchsorted(taken, round(share * len(first)), side="right")))
    return np.isin(samples.prompts, prompts[order[:number]])


def mixed(values: np.ndarray, draw: int) -> np.ndarray:
    """uint64: the finalizer of SplitMix64 (Steele et al., 2014) over int64 hashes and a number that tells draws apart."""
    z = values.view(np.uint64) ^ np.uint64(draw * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
