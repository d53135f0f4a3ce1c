"""How long a run takes, from what its passes multiply and how fast this machine multiplies.

A pass over T tokens multiplies each weight of the blocks with each token: 2 T floating-point operations (FLOP) a weight forward, the
same again for the gradients of the inputs, and once more for those of weights that train (Kaplan et al., 2020: 6 N T). Attention
multiplies each token with those before it in its sample; the head, supervised tokens alone. An optimizer step reads and writes
what stands for each trained parameter.
"""

import time
from dataclasses import dataclass

import numpy as np

from .memory_model import Run, Sizes, trained

# What a step reaches of a plain matrix product's speed. GPU: 48 to 66 % of it on an H200 (README's table), which is model FLOP: without
# those of blocks computed again. CPU: 17 to 58 % over six cases of benchmarks/dry_run.py.
REACHED_ON_GPU, REACHED_ON_CPU = 0.55, 0.3
UPDATE_BYTES = 28  # a trained parameter: weight, gradient and AdamW's two moments in float32 read, all but the gradient written
MEASURED_SECONDS = 0.3


@dataclass(frozen=True)
class Speed:
    """flops: FLOP a second of a large matrix product; bytes: read and written a second; assumed: not measured here."""

    flops: float
    bytes: float
    assumed: bool = False


ELSEWHERE = Speed(100e12, 1e12, assumed=True)  # of a GPU that is not here


@dataclass(frozen=True)
class Work:
    """What a run does, all processes together: FLOP of its passes, and bytes of its updates on each process."""

    flop: float
    update_bytes: float

    def seconds(self, speed: Speed, run: Run) -> float:
        reached = REACHED_ON_GPU if run.on_gpu else REACHED_ON_CPU
        return self.flop / (run.ranks * speed.flops * reached) + self.update_bytes / speed.bytes


def work(sizes: Sizes, run: Run, lengths: np.ndarray, supervised: np.ndarray, epochs: float, steps: int, again: float) -> Work:
    """lengths, supervised: int[n], tokens of each sample, and how many of them are learned; again: the share of the blocks
    that is computed again."""
    tokens, squares = float(lengths.sum()), float((lengths.astype(np.float64) ** 2).sum())
    blocks = 2 * sizes.blocks * tokens
    # queries with keys, and what comes of it with values; a token sees half of its sample on average
    attention = 2 * 2 * sizes.layers * sizes.queries * squares / 2
    adapters = 2 * sizes.adapters(run.rank) * tokens
    head = 2 * sizes.vocabulary * sizes.hidden * float(supervised.sum())
    full, learns_head = not run.rank, not run.rank or run.embeddings
    flop = (2 + full + again) * blocks + (3 + again) * attention + (3 + again) * adapters + (2 + learns_head) * head
    ways = run.ranks if run.engine.startswith(("ZeRO", "FSDP")) else 1
    return Work(epochs * flop, steps * UPDATE_BYTES * trained(sizes, run) / ways)


def measured(device, dtype) -> Speed:
    """The speed of this machine: a matrix product in `dtype`, and a copy."""
    import torch

    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    large = torch.zeros(1 << (28 if device.type == "cuda" else 25), dtype=torch.uint8, device=device)
    seconds = _best_time(lambda: a @ a, device)
    return Speed(2 * size**3 / seconds, 2 * large.numel() / _best_time(large.clone, device))


def _best_time(job, device) -> float:
    """Seconds of the fastest of the runs that MEASURED_SECONDS allow."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    job(), wait()
    best, end = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        job(), wait()
        best = min(best, time.perf_counter() - begin)
    return best


def in_words(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 20 min", "2 days 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min"
    return f"{hours // 24} days {hours % 24} h"
