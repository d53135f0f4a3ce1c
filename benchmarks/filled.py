"""Samples of one length, of random tokens, all of them supervised: with the interface of rendered_samples.Samples."""

import numpy as np


class Filled:
    def __init__(self, length: int, count: int, vocabulary: int):
        self.ids = np.random.default_rng(0).integers(0, vocabulary, (count, length), dtype=np.int32)
        self.lengths, self.total_tokens = np.full(count, length), count * length
        self.supervised = self.weight_sums = np.full(count, length - 1)  # nothing predicts the first

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[i], self.ids[i].copy()

    def token_weights(self, i) -> None:
        """1 each."""

    def origin(self, i) -> tuple[str, int]:
        return "random tokens", i + 1
