"""The formulas of merging, against float64 by hand, and what they are refused for."""

import json

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import UserError
from finetune.merge.formulas import Adapter

LAYER = "transformer.h.0.attn.c_attn"
USUAL = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_rslora": False, "use_dora": False}


def adapter(folder, tensors: dict, **config) -> Adapter:
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(USUAL | config))
    return Adapter(folder)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


A, B, W, MAGNITUDE = random(3, 8), random(5, 3), random(5, 8), random(5).abs()
HALVES = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}


@pytest.mark.parametrize(
    "config,scale",
    [
        ({}, 2.0),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"r": 7, "rank_pattern": {"c_attn": 3}}, 2.0),  # the rank is that of the tensors
        ({"alpha_pattern": {"h.1.attn.c_attn": 1, "attn.c_attn": 12}}, 4.0),
        ({"alpha_pattern": {"_attn": 12}}, 2.0),  # no whole part of the name
    ],
)
def test_lora(tmp_path, config, scale):
    merged = adapter(tmp_path, HALVES, **config).merged(f"{LAYER}.weight", W.bfloat16())
    expected = W.bfloat16().double() + scale * (B.double() @ A.double())
    torch.testing.assert_close(merged, expected.float(), atol=1e-6, rtol=1e-6)


def test_dora(tmp_path):
    tensors = HALVES | {f"{LAYER}.lora_magnitude_vector": MAGNITUDE}
    merged = adapter(tmp_path, tensors, use_dora=True).merged(f"{LAYER}.weight", W)
    direction = W.double() + 2 * (B.double() @ A.double())
    expected = MAGNITUDE.double()[:, None] * direction / direction.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(merged, expected.float(), atol=1e-6, rtol=1e-6)


def test_what_takes_the_place_of_the_bases(tmp_path):
    tensors = {
        "transformer.wte.token_adapter.trainable_tokens_delta": random(2, 8),
        "lm_head.modules_to_save.weight": random(9, 8),
        f"{LAYER}.base_layer.bias": random(5),
    }
    found = adapter(tmp_path, tensors, trainable_token_indices={"lm_head": [0], "wte": [4, 1]})
    embedding = random(6, 8)
    merged = found.merged("transformer.wte.weight", embedding.bfloat16())
    rows = random(2, 8)
    assert torch.equal(merged[4], rows[0]) and torch.equal(merged[1], rows[1])
    others = [0, 2, 3, 5]
    assert torch.equal(merged[others], embedding.bfloat16().float()[others])
    assert torch.equal(found.merged("lm_head.weight", torch.zeros(9, 8)), random(9, 8))
    assert torch.equal(found.merged(f"{LAYER}.bias", torch.zeros(5)), random(5))
    untouched = random(8).half()
    assert found.merged("transformer.ln_f.weight", untouched) is untouched
    found.check_all_used()


def test_what_the_base_has_no_place_for(tmp_path):
    found = adapter(tmp_path, HALVES | {"lm_head.weight": random(9, 8)})
    found.check_places(tied=False)
    with pytest.raises(UserError, match="the base has no place for lm_head.weight and 2 more - give the base"):
        found.check_all_used()
    found.merged(f"{LAYER}.weight", W)
    found.merged("lm_head.weight", random(9, 8))
    found.check_all_used()


OF_THE_HEAD = {
    "whole": {"lm_head.weight": random(9, 8)},
    "LoRA": {"lm_head.lora_A.weight": random(3, 8), "lm_head.lora_B.weight": random(9, 3)},
    "rows": {"lm_head.token_adapter.trainable_tokens_delta": random(2, 8)},
}


@pytest.mark.parametrize("kind", OF_THE_HEAD)
def test_a_head_of_its_own_has_no_place_in_a_tied_base(tmp_path, kind):
    with pytest.raises(UserError, match="trained the head .lm_head.* apart from the embedding, and in this base both are"):
        adapter(tmp_path, HALVES | OF_THE_HEAD[kind]).check_places(tied=True)
    also = {name.replace("lm_head", "model.embed_tokens"): tensor + 1 for name, tensor in OF_THE_HEAD[kind].items()}
    with pytest.raises(UserError, match="apart from the embedding"):
        adapter(tmp_path, OF_THE_HEAD[kind] | also).check_places(tied=True)


def test_the_copy_that_a_tied_head_is_given_is_left(tmp_path):
    tensors = {"model.embed_tokens.weight": random(9, 8), "lm_head.weight": random(9, 8)}
    found = adapter(tmp_path, tensors)
    found.check_places(tied=True)
    found.merged("model.embed_tokens.weight", torch.zeros(9, 8))
    found.check_all_used()


def test_lora_on_the_embedding_itself_is_for_peft(tmp_path):
    tensors = {"model.embed_tokens.lora_embedding_A": random(3, 9), "model.embed_tokens.lora_embedding_B": random(8, 3)}
    with pytest.raises(UserError, match="model.embed_tokens: LoRA on the embedding itself, which only peft merges - use"):
        adapter(tmp_path, tensors).check_places(tied=False)


@pytest.mark.parametrize(
    "config,line",
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3, not LoRA - merge it with peft"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, which only peft merges - use its merge_and_unload"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is olora, so it belongs to a changed base - save it with"),
    ],
)
def test_other_formulas_are_refused(tmp_path, config, line):
    with pytest.raises(UserError, match=line):
        adapter(tmp_path, HALVES, **config)
