"""Compares the 16-bit with the quantized model on a few calibration samples."""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from qwen_model.chatml import IGNORE

from ..compare.agreement import Agreement, measure
from ..folders import quant_settings
from ..folders.shards import Shards
from ..quantized import quantized_model
from .streamed import release_memory, streamed

SAMPLES, TOKENS = 4, 1024  # of the proof; tokens of each sample
WORSE = 1.1  # a perplexity so many times as high deserves a warning


def proof(
    source: Path, made: Path, samples: list[tuple[np.ndarray, np.ndarray]], device, dtype: torch.dtype
) -> tuple[Agreement, Agreement]:
    """Compares the model in `source`, read block by block, with the quantized one in `made`, loaded as for Q-LoRA.

    samples: (ids, labels); a few are used. dtype: of the former's passes. RuntimeError if the latter gives no numbers.
    """

    def loaded():
        release_memory()  # the plain one's
        half = torch.float16 if device.type == "cuda" else torch.float32
        return quantized_model.load(made, quant_settings.of_folder(made), half, device, attn_implementation="sdpa").eval()

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with Shards(source) as shards:
        plain = functools.partial(streamed, config, shards.__getitem__, dtype, device)
        before, after = measure([plain, loaded], choose(samples), device=device)
    if not math.isfinite(after.nll):
        raise RuntimeError(f"{made}: the quantized model's answers are not numbers - nothing was written")
    return before, after


def lines(before: Agreement, after: Agreement) -> list[str]:
    """The comparison as two lines of text."""
    old, new = before.perplexity, after.perplexity
    return [
        f"perplexity on answers of the calibration: {old:.4g} before, {new:.4g} quantized ({new / old - 1:+.1%})",
        f"the same likeliest token at {after.same_greedy:.1%} of {after.tokens:,} places",
    ]


def choose(samples: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """About SAMPLES samples, evenly spread, cut at TOKENS; each has a token of an answer."""
    cut = [(ids[:TOKENS], labels[:TOKENS]) for ids, labels in samples]
    answered = [(ids, labels) for ids, labels in cut if (labels[1:] != IGNORE).any()]
    return answered[:: -(-len(answered) // SAMPLES)]
