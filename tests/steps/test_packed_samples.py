"""From a file with weights, unrolled answers and tools to the loss of packed rows: that of one sample at a time."""

import numpy as np
import pytest
import torch
from chat_templates import make_tokenizer, real_template
from talks import talk, write
from tiny import later_model, small_checkpoint

from finetune.model import later_qwen, loading
from finetune.samples.rendered_samples import load
from finetune.steps.batches import Steps
from finetune.steps.plan import Plan

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def calling(question: str, **more) -> dict:
    """A conversation with a call, its result, an answer, and another question."""
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Adding.", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."} | more,
        *talk("More?", "No.")["messages"][:2],
    ]
    return {"messages": messages, "tools": TOOLS}


def conversations() -> list[dict]:
    weighted, early = talk("a", "b", "c", "d"), talk("Who?", "Me.", "Sure?", "Yes, very.")
    weighted["messages"][1]["weight"] = 0.25
    early["messages"][3]["weight"] = 0
    return [weighted, early, calling("x"), calling("y", weight=0.5), talk("hi", "yo", weight=3.0), talk("e", "f")]


def models(folder, name: str):
    """(tokenizer, model) of first-generation Qwen or of a Qwen3 with its published template."""
    if name == "qwen3":
        tokenizer = make_tokenizer()
        tokenizer.chat_template = real_template("qwen3")
        return tokenizer, later_qwen.prepare(later_model("qwen3"))
    place = small_checkpoint(folder / "model")
    from qwen_model.modeling_qwen import QWenLMHeadModel

    return loading.load_tokenizer(place), QWenLMHeadModel.from_pretrained(place, dtype=torch.float32).eval()


def alone(model, samples, i: int) -> torch.Tensor:
    """Sum of w times loss over the targets of a sample, from the logits of a plain forward pass."""
    ids, labels = (torch.from_numpy(values.astype(np.int64)) for values in samples[i])
    weights = samples.token_weights(i)
    weights = torch.ones(len(ids)) if weights is None else torch.from_numpy(weights.copy())
    log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    places = (labels[1:] != -100).nonzero().flatten()
    return -(weights[1:][places].double() * log_p[places, labels[1:][places]]).sum()


@pytest.mark.parametrize("name", ["qwen", "qwen3"])
def test_packed_rows_have_the_losses_of_one_sample_at_a_time(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    tokenizer, model = models(tmp_path, name)
    samples = load(write(tmp_path, conversations()), tokenizer, max_length=2048)
    assert len(samples) > 6 and not np.array_equal(samples.weight_sums, samples.supervised)
    plan = Plan(
        samples.lengths, samples.supervised, weights=samples.weight_sums, samples_per_step=len(samples), max_tokens_per_pass=700
    )
    (step,) = [Steps(samples, plan)[0, index] for index in range(plan.steps_per_epoch)]
    assert 1 < len(step.rows) < len(samples) and step.loss_weight == samples.weight_sums.sum()
    with torch.no_grad():
        together = sum(model(**row, num_items_in_batch=step.loss_weight).loss.double() for row in step.rows)
        one_by_one = sum(alone(model, samples, i) for i in range(len(samples))) / samples.weight_sums.sum()
        unweighted = model(**{k: v for k, v in step.rows[0].items() if k != "shift_weights"}, num_items_in_batch=1).loss
        weighted = model(**step.rows[0], num_items_in_batch=1).loss
    assert abs(together - one_by_one) < 1e-5 * one_by_one
    assert abs(unweighted - weighted) > 1e-3 * weighted, "weights make a difference here"
