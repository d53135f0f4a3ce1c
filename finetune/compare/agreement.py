"""How far models agree on the same tokens: the measuring behind compare, and the proof of merging and quantizing.

The first model is the reference. At each position that an answer's token is predicted from, with p and q the next-token
distributions of the reference and of another model:

    perplexity     exp(mean of -log q(token)), over all such positions
    KL divergence  sum over the vocabulary of p (log p - log q), in nats: 0 where they are equal
    same greedy    the share of positions where both find the same token the likeliest

Every such position counts once, whatever its token weighs in the loss of training.
One model at a time is in memory. Of the reference what stays is its hidden states at those positions and its head: from them
its distributions come again, bit by bit, whatever the head is (with trained rows, tied, whole), a few positions at a time.
Shapes: T tokens of a sample, K of its positions, H hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from qwen_model.chatml import IGNORE

from ..errors import UserError, shortened
from ..samples.time_limit import of_template, without_panic
from .opened import GREEDY

QUESTIONS = ("Who are you?", "你是谁？", "Write a Python function that adds two numbers.", "法国的首都是哪里？")
ROWS = 32  # positions whose logits stand in memory at once: 32 x 152k x 8 bytes are 39 MB


@dataclass
class Agreement:
    """One model's figures; those of the reference itself, but for its perplexity, say that it is equal to itself."""

    tokens: int = 0
    nll: float = 0.0  # summed over the tokens, in nats
    kl_sum: float = 0.0
    kl_max: float = 0.0
    kl_max_at: tuple[int, int] = (0, 0)  # sample and position of its label
    equal: int = 0
    largest_logit: float = 0.0  # of the reference, absolute
    largest_difference: float = 0.0  # of a logit
    answers: list[str] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.tokens, 700.0))

    @property
    def kl_mean(self) -> float:
        return self.kl_sum / self.tokens

    @property
    def same_greedy(self) -> float:
        return self.equal / self.tokens

    @property
    def logits_difference(self) -> float:
        """The largest difference of a logit, as a share of the reference's largest."""
        return self.largest_difference / max(self.largest_logit, 1e-30)

    def figures(self) -> dict:
        names = ("tokens", "perplexity", "kl_mean", "kl_max", "same_greedy", "logits_difference")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        shown = f"perplexity {self.perplexity:.4g}, KL divergence {self.kl_mean:.2g} (largest {self.kl_max:.2g})"
        return f"{shown}, same greedy token {self.same_greedy:.2%} of {self.tokens:,}"


def measure(
    loaders: list[Callable], samples: list[tuple] | Callable, answer: Callable | None = None, device=None
) -> list[Agreement]:
    """An Agreement for each model, the first being the reference.

    loaders: each returns a model in evaluation, on its device; it is called once, and what it returned is freed before the
    next one. samples: (ids, labels) with -100 where nothing is scored, at least one label in all; or a function that makes
    them with the reference. answer(model): texts to keep, of each model. device: where passes are made, if not where the
    models' parameters are (those of a streamed model come and go).
    """
    results, reference = [], None
    for number, load in enumerate(loaders):
        model = load()
        if callable(samples):
            samples = samples(model)
        bar = tqdm(samples, desc=f"model {number + 1} of {len(loaders)}", unit=" samples", delay=2, leave=False)
        place = device or model.device
        result, states = Agreement(), [hidden_states(model, ids, labels, place) for ids, labels in bar]
        head = Head(head_of(model), place)
        if answer is not None:
            result.answers = answer(model)
        del model
        reference = reference or (states, head)
        for i, (_, labels) in enumerate(samples):
            score(result, i, labels, (states[i], head), (reference[0][i], reference[1]))
        results.append(result)
    return results


# ---- samples without data


def question_prompts(tokenizer) -> list[list[int]]:
    """QUESTIONS in the model's chat format, as token ids. UserError for a template that fails, or lays out nothing."""
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    what, remedy = f"{tokenizer.name_or_path}: its chat template", "take that of the published checkpoint"
    try:
        with without_panic(tokenizer.name_or_path), of_template(tokenizer, len(turns)):
            prompts = [list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)) for turn in turns]
    except UserError:
        raise
    except Exception as error:  # a template is a program
        raise UserError(f"{what} fails ({type(error).__name__}: {shortened(error)}) - {remedy}") from error
    if not all(prompts):
        raise UserError(f"{what} lays out nothing - {remedy}")
    return prompts


def own_answers(model, prompts: list[list[int]], max_new_tokens: int) -> list[tuple]:
    """Samples without data: what `model` answers to prompts of token ids, greedily."""
    whole = [continued(model, prompt, max_new_tokens) for prompt in prompts]
    return [(ids, [IGNORE] * len(prompt) + ids[len(prompt) :]) for prompt, ids in zip(prompts, whole)]


def continued(model, prompt, max_new_tokens: int) -> list[int]:
    """The prompt's ids and those of the greedy answer, to where the model's generation_config lets it stop."""
    ids_1T = as_ids(prompt)[None].to(model.device)
    mask = torch.ones_like(ids_1T)
    return model.generate(ids_1T, attention_mask=mask, max_new_tokens=max_new_tokens, **GREEDY)[0].tolist()


# ---- scoring


def as_ids(numbers) -> torch.Tensor:
    """int64; a copy, as the arrays of a data set are mapped from files."""
    return torch.tensor(np.asarray(numbers), dtype=torch.long)


def positions(labels) -> torch.Tensor:
    """Positions (K,) that have a label; each is predicted from the position before it."""
    found = (as_ids(labels) != IGNORE).nonzero().flatten()
    return found[found > 0]


def plain_model(model):
    """The model below peft's wrapper; adapters lie inside its layers."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def head_of(model):
    """The module that makes logits of hidden states."""
    return plain_model(model).get_output_embeddings()


class Head(NamedTuple):
    """A model's head, which stays when the model is gone."""

    module: torch.nn.Module
    device: torch.device

    def logits(self, states_KH: torch.Tensor) -> torch.Tensor:
        """(K, V) in float64: a divergence of 1e-8 is the sum of 152k terms that cancel."""
        return self.module(states_KH.to(self.device)).double()


@torch.no_grad()
def hidden_states(model, ids, labels, device) -> torch.Tensor:
    """The head's inputs (K, H) at the positions from which labels are predicted, on the CPU."""
    inner = plain_model(model)
    inner = getattr(inner, inner.base_model_prefix)
    out = inner(input_ids=as_ids(ids)[None].to(device), use_cache=False).last_hidden_state[0]
    return out[positions(labels).to(out.device) - 1].cpu()


@torch.no_grad()
def score(result: Agreement, sample: int, labels, mine: tuple, reference: tuple) -> None:
    """Adds one sample to `result`. mine, reference: (hidden states (K, H), Head)."""
    places = positions(labels)
    wanted = as_ids(labels)[places]
    for begin in range(0, len(places), ROWS):
        part = slice(begin, begin + ROWS)
        logits, expected = (head.logits(states[part]) for states, head in (mine, reference))
        log_q, log_p = logits.log_softmax(-1), expected.log_softmax(-1)
        result.nll -= log_q.gather(1, wanted[part, None].to(log_q.device)).sum().item()
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # below 0 by rounding alone
        result.kl_sum += kl.sum().item()
        worst, at = kl.max(0)
        if worst.item() > result.kl_max:
            result.kl_max, result.kl_max_at = worst.item(), (sample, int(places[begin + int(at)]))
        result.equal += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        result.largest_logit = max(result.largest_logit, expected.abs().max().item())
        result.largest_difference = max(result.largest_difference, (logits - expected).abs().max().item())
    result.tokens += len(places)
