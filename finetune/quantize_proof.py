"""The 16-bit and the quantized model on a few of the calibration samples: what the answers have lost.

Shapes: B samples, T tokens of the longest, H hidden size, V vocabulary, R answer tokens of one sample.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import quantized
from .shards import Shards
from .streamed import streamed

SAMPLES, TOKENS, ANSWER_TOKENS = 8, 1024, 256  # of the proof; tokens of each sample, and of its answers
WORSE = 1.1  # a perplexity so much higher deserves a warning


@dataclass
class Proof:
    """On `tokens` answer tokens of `samples` samples: perplexity of the plain and the quantized model, and the share of
    tokens that both hold for the likeliest next.
    """

    samples: int
    tokens: int
    plain: float
    quantized: float
    same: float

    def lines(self) -> list[str]:
        change = self.quantized / self.plain - 1
        return [
            f"perplexity on the answers: {self.plain:.4g} before, {self.quantized:.4g} quantized ({change:+.1%}), "
            f"on {self.tokens:,} tokens of {self.samples:,} calibration samples",
            f"the same likeliest token at {self.same:.1%} of them",
        ]


def proof(source: Path, made: Path, samples: list[tuple[np.ndarray, np.ndarray]], device, dtype) -> Proof:
    """Compares the model in `source`, read block by block, with the quantized one in `made`, loaded as for Q-LoRA.

    samples: (ids, labels); a few are used. dtype: of the passes. RuntimeError if the quantized one gives no numbers.
    """
    chosen = choose(samples)
    with Shards(source) as shards:
        plain, likeliest = answers(streamed(shards, dtype, device), chosen, device)
    loaded = quantized.load(made, quantized.of_folder(made), dtype, device, attn_implementation="sdpa")
    found, likeliest_now = answers(loaded.eval(), chosen, device)
    if not found.isfinite().all():
        raise RuntimeError(f"{made}: the quantized model's answers are not numbers - nothing was written")
    same = (likeliest == likeliest_now).double().mean().item()
    return Proof(len(chosen), len(found), *((-each.mean()).exp().item() for each in (plain, found)), same)


def choose(samples: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """SAMPLES of them from beginning to end, of which something is an answer."""
    cut = [(ids[:TOKENS], labels[:TOKENS]) for ids, labels in samples]
    answered = [(ids, labels) for ids, labels in cut if (labels[1:] != -100).any()]
    return answered[:: -(-len(answered) // SAMPLES)]


@torch.no_grad()
def answers(model, samples: list, device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each answer token: its log-probability (float64), and the token that is likeliest in its place."""
    hidden_BTH = getattr(model, model.base_model_prefix)(**batch(samples, device), use_cache=False).last_hidden_state
    chances, likeliest = [], []
    for x_TH, (_, labels) in zip(hidden_BTH, samples):
        targets = torch.from_numpy(np.flatnonzero(labels[1:] != -100)[:ANSWER_TOKENS])
        logits_RV = model.lm_head(x_TH[targets.to(device)]).float()
        chosen = torch.from_numpy(labels[1:])[targets].long().to(device)
        chances.append(logits_RV.log_softmax(-1).gather(1, chosen[:, None])[:, 0].double().cpu())
        likeliest.append(logits_RV.argmax(-1).cpu())
    return torch.cat(chances), torch.cat(likeliest)


def batch(samples: list, device) -> dict[str, torch.Tensor]:
    """(B, T) ids, padded on the right, and their mask."""
    longest = max(len(ids) for ids, _ in samples)
    ids = np.stack([np.pad(ids, (0, longest - len(ids))) for ids, _ in samples])
    mask = np.stack([np.arange(longest) < len(ids) for ids, _ in samples])
    return {
        "input_ids": torch.from_numpy(ids).long().to(device),
        "attention_mask": torch.from_numpy(mask).long().to(device),
    }
