"""Trained rows of embedding and head: the same numbers as peft's own forward, without a copy of the matrix."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import packed, random_samples, tiny_model, tiny_qwen2
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.lora import token_rows

IDS = [151, 3, 77]


MODELS = {
    "qwen": (tiny_model, ["c_attn", "w1"], {"wte": IDS, "lm_head": IDS}),
    "qwen2 tied": (tiny_qwen2, ["q_proj"], {"embed_tokens": IDS}),
    "qwen2 untied": (lambda: tiny_qwen2(tied=False), ["q_proj"], {"embed_tokens": IDS, "lm_head": IDS}),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """(a model with peft's own forward, the same one with ours), whose rows differ from the base's"""
    return make_pair(request.param)


def make_pair(name: str):
    make, targets, rows = MODELS[name]
    config = LoraConfig(r=2, target_modules=targets, trainable_token_indices=rows, init_lora_weights=False)
    theirs = get_peft_model(make(), config).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in key:
                parameter.normal_()
    ours = copy.deepcopy(theirs)
    token_rows.install(ours)
    return theirs, ours


def ids_and_labels():
    ids = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[0, 2:5], ids[1, -2:] = torch.tensor(IDS), torch.tensor(IDS[:2])
    return ids, ids.roll(-1, 1)


def trained(model) -> dict:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_logits_and_gradients_are_those_of_peft(pair):
    ids, labels = ids_and_labels()
    for model in pair:
        logits = model(input_ids=ids).logits
        cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    theirs, ours = map(trained, pair)
    assert theirs.keys() == ours.keys() and any("trainable_tokens_delta" in name for name in ours)
    for name in theirs:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)
        assert ours[name].grad.any()
    torch.testing.assert_close(pair[1](input_ids=ids).logits, pair[0](input_ids=ids).logits)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_a_packed_row_is_that_of_peft(weighted):
    """With labels, the head returns its loss without ever giving logits; peft's forward can only give logits."""
    theirs, ours = make_pair("qwen")
    samples, labels = random_samples(4)
    samples[0][1:4], labels[0][1:4] = IDS, IDS
    row = packed(samples, labels)
    weights = torch.linspace(0.1, 3.0, row["shift_labels"].numel())
    own_row = row | ({"shift_weights": weights[None]} if weighted else {})
    ours(**own_row, num_items_in_batch=5).loss.backward()
    expected = theirs(**{key: value for key, value in row.items() if key != "shift_labels"}).logits
    losses = cross_entropy(expected.flatten(0, 1), row["shift_labels"].flatten(), reduction="none")
    loss = (losses * weights if weighted else losses).sum() / 5
    loss.backward()
    for name, parameter in trained(ours).items():
        torch.testing.assert_close(parameter.grad, trained(theirs)[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    # peft's own wrapper drops labels: there the loss must come from logits, too
    torch.testing.assert_close(theirs(**own_row, num_items_in_batch=5).loss, loss.detach())


def test_switched_off_it_is_the_base(pair):
    theirs, ours = pair
    ids, _ = ids_and_labels()
    with theirs.disable_adapter(), ours.disable_adapter():
        expected, base = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
    torch.testing.assert_close(base, expected)
    assert (base - ours(input_ids=ids).logits).abs().max() > 0.1


def test_merged_it_is_an_ordinary_model(pair):
    _, ours = pair
    ids, _ = ids_and_labels()
    expected = ours.eval()(input_ids=ids).logits
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    assert type(embedding) is torch.nn.Embedding and not any("token_adapter" in name for name in merged.state_dict())
    assert (embedding.weight is head.weight) == merged.config.tie_word_embeddings


def test_generation_uses_the_rows(pair):
    theirs, ours = pair
    ids, _ = ids_and_labels()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 159}
    expected = theirs.eval().generate(input_ids=ids[:1], **settings)
    assert torch.equal(ours.eval().generate(input_ids=ids[:1], **settings), expected)


def test_rows_are_float32_over_a_frozen_bfloat16_model():
    _, ours = make_pair("qwen")
    for parameter in ours.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    row = packed(*random_samples(3))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(**row).loss
    loss.backward()
    rows = [parameter for name, parameter in ours.named_parameters() if "trainable_tokens_delta" in name]
    assert len(rows) == 2 and all(r.dtype == r.grad.dtype == torch.float32 and r.grad.any() for r in rows)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes, views left out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
        return result


def test_no_matrix_is_copied():
    """Forward and backward over the whole model: nothing as large as the embedding is made; by peft's forward it is."""
    matrix = 160 * 32
    row = packed(*random_samples(2, longest=12))
    theirs, ours = make_pair("qwen")
    assert row["shift_labels"].numel() * 160 < matrix and row["input_ids"].numel() * 96 < matrix
    found = {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        with Largest() as largest:
            model(**row).loss.backward()
        found[name] = largest.elements
    assert found["ours"] < matrix <= found["theirs"]


def test_a_pass_without_supervised_tokens_gives_every_row_a_gradient():
    _, ours = make_pair("qwen")
    samples, _ = random_samples(1)
    row = packed(samples, [[-100] * len(samples[0])])
    ours(**row, num_items_in_batch=3).loss.backward()
    assert all(parameter.grad is not None for parameter in trained(ours).values())
