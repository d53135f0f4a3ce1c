"""Compares the two layouts: logits of a few prompts in float32, block by block, and token ids."""

from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from ..compare.agreement import question_prompts
from ..errors import note
from ..folders.config_files import config_of
from ..folders.model_folder import trained_length
from ..gptq.streamed import streamed
from ..samples.time_limit import of_template
from .export_tokenizer import PROBE_TEXTS

CONVERSATION = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
# largest difference between two logits, as a share of the largest: float32 sums in another order differ by less
TOLERANCE = 1e-4


def compare(one: tuple, other: tuple, prompts: list[list[int]]) -> float:
    """The largest difference between the two models' logits; RuntimeError if it is more than rounding explains.

    one, other: (config, weights), where weights(name) is the tensor of a parameter.
    """
    expected, found = logits(*one, prompts), logits(*other, prompts)
    difference = max((a - b).abs().max().item() for a, b in zip(expected, found))
    scale = max(1.0, *(a.abs().max().item() for a in expected))
    if not difference <= TOLERANCE * scale:
        what = f"the logits of the two layouts differ by {difference:.2e}, of {scale:.1f} at most"
        raise RuntimeError(f"{what}: this is a bug of the toolkit, and nothing was written")
    note(f"both layouts, computed in float32 on {len(prompts)} prompts: logits differ by at most {difference:.1e}")
    return difference


@torch.no_grad()
def logits(config, weights: Callable, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits (T, V) of each prompt. All prompts are one batch, so that each weight is read once."""
    what = f"comparing, {config.model_type}"
    with tqdm(total=config.num_hidden_layers, desc=what, unit=" blocks", delay=2, leave=False) as bar:
        model = streamed(config, weights, block_done=bar.update)
        ids_BT = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        found = model(ids_BT, use_cache=False).logits  # causal attention: padding on the right changes nothing
    return [row[: len(prompt)] for row, prompt in zip(found, prompts)]


def prompts(tokenizer, folder) -> list[list[int]]:
    """Token ids of a few chat prompts, each cut at the length that the model was trained on."""
    longest = trained_length(config_of(folder))
    return [prompt[:longest] for prompt in question_prompts(tokenizer)]


def check_tokens(one, other) -> None:
    """RuntimeError where two tokenizers give different ids. Chat templates that differ are only noted."""
    for text in PROBE_TEXTS:
        if one(text)["input_ids"] != other(text)["input_ids"]:
            what = f"the two tokenizers differ on {text!r}"
            raise RuntimeError(f"{what}: this is a bug of the toolkit, and nothing was written")
    settings = {"add_generation_prompt": True, "tokenize": False}
    texts = []
    for tokenizer in (one, other):
        with of_template(tokenizer):
            texts.append(tokenizer.apply_chat_template(CONVERSATION, **settings))
    if texts[0] != texts[1]:
        note("the model's chat template is not plain ChatML: the export has plain ChatML in its place")
