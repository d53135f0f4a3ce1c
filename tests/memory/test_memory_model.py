"""The memory model against autograd's own account, and against sizes counted by hand."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import packed

from finetune.compat.on_peft import unquantized
from finetune.distributed.engines import ZERO2
from finetune.lora import low_rank
from finetune.memory.memory_model import Estimate, Run, Sizes, estimate, kept_by_block, standing
from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel

QWEN_7B = {
    "model_type": "qwen", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128,
    "intermediate_size": 22016, "vocab_size": 151936,
}  # fmt: skip
QWEN2_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def test_parameters_are_those_of_the_published_models():
    """7.72 billion for Qwen-7B (its safetensors add up to 7,721,324,544), 7.62 for Qwen2-7B; less norms and biases here."""
    sizes = Sizes.of(QWEN_7B)
    biases, norms = 32 * 3 * 4096, (2 * 32 + 1) * 4096
    assert sizes.blocks + sizes.embeddings + biases + norms == 7_721_324_544
    sizes = Sizes.of(QWEN2_7B)
    biases, norms = 28 * (3584 + 2 * 512), (2 * 28 + 1) * 3584
    assert sizes.blocks + sizes.embeddings + biases + norms == 7_615_616_512
    assert Sizes.of(QWEN_7B).adapters(64) == 143_130_624  # 32 x 64 x (16384 + 8192 + 3 x 15104)


def test_what_stands_all_the_time():
    sizes = Sizes.of(QWEN_7B)
    all_of_it = sizes.blocks + sizes.embeddings
    copies = 2 * (all_of_it - sizes.vocabulary * sizes.hidden)  # autocast's; the embedding is looked up as it is
    assert standing(sizes, Run(rank=0)) == (4 * all_of_it + copies, 4 * all_of_it, 8 * all_of_it)
    assert standing(sizes, Run(rank=0, half_weights=True, state=2)) == (2 * all_of_it,) * 3
    assert sum(standing(sizes, Run(rank=0, engine="ZeRO-3", ranks=8))) == 18 * all_of_it / 8
    weights, gradients, state = standing(sizes, Run(rank=64))
    assert (weights, gradients, state) == (2 * all_of_it + 4 * 143_130_624, 4 * 143_130_624, 8 * 143_130_624)
    packed_weights, _, _ = standing(sizes, Run(rank=64, packed=0.5))
    assert weights - packed_weights == 1.5 * sizes.blocks


@pytest.mark.parametrize("on_gpu", [False, True])
def test_recomputing_more_never_takes_more(on_gpu):
    sizes, run = Sizes.of(QWEN_7B), Run(rank=64, on_gpu=on_gpu)
    peaks = [estimate(sizes, run, 4096, again).peak for again in range(33)]
    assert peaks[:32] == sorted(peaks[:32], reverse=True) and peaks[32] == pytest.approx(peaks[31], rel=0.01)
    assert peaks[32] < 0.6 * peaks[0]


# ---- against autograd


def model_of(rank: int, dtype, layers: int):
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=160, hidden_size=256, num_hidden_layers=layers, num_attention_heads=4, kv_channels=64,
        intermediate_size=1376, seq_length=512, emb_dropout_prob=0.0, attn_dropout_prob=0.0,
    )  # fmt: skip
    model = QWenLMHeadModel._from_config(config, attn_implementation="sdpa").to(dtype)
    if rank:
        targets = ["c_attn", "c_proj", "w1", "w2"]
        with unquantized():
            model = get_peft_model(model, LoraConfig(r=rank, lora_dropout=0.05, target_modules=targets))
        low_rank.install(model)
    return model.train(), config


def kept_bytes(model, tokens: int, autocast: bool) -> int:
    """Of all tensors that a forward pass leaves for the backward pass, each storage once; weights and their casts not."""
    largest_weight = 4 * max(p.numel() for p in model.parameters())
    ids = torch.arange(tokens) % 150
    half = tokens // 2
    row = packed([ids[:half].tolist(), ids[half:].tolist()], [[-100] * half, [-100] * (half - 1) + [3]])
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # a whole storage is kept alive by a slice of it; what is no larger than weights here may be a cast of one
        if storage.data_ptr() not in weights and tokens in storage_rows(storage.nbytes(), tokens):
            kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    def storage_rows(size, tokens):
        return [tokens] if size % tokens == 0 or size % half == 0 else []

    assert largest_weight
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**row).loss
    total = sum(size for _, size in kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("half", [False, True])
def test_a_block_keeps_what_the_model_says(rank, half):
    """The difference of a model of three and one of two blocks is one block; 1031 tokens, a prime, tell tokens from weights."""
    tokens = 2 * 1031
    found = []
    for layers in (2, 3):
        model, config = model_of(rank, torch.bfloat16 if half and rank else torch.float32, layers)
        found.append(kept_bytes(model, tokens, autocast=half))
    sizes = Sizes.of(json.loads(config.to_json_string(use_diff=False)))
    computed = kept_by_block(sizes, Run(rank=rank, half=half, on_gpu=False))
    assert (found[1] - found[0]) / tokens == pytest.approx(computed, rel=0.03)


def test_an_estimate_in_words():
    found = Estimate(15e9, 0.6e9, 1.1e9, 4e9, tokens=4096, recomputed=0, layers=32)
    said = "about 20.7 GB (weights 15.0, gradients 0.6, optimizer 1.1, a pass of 4,096 tokens 4.0; no block computed again)"
    assert found.describe() == said


def test_gradients_of_a_step_of_one_pass_come_as_activations_go():
    """tests/fake_cuda counts what lives at true sizes; here: of what, and when."""
    sizes, whole = Sizes.of(QWEN_7B), Run(0, step_tokens=4096)
    one, several = estimate(sizes, whole, 4096), estimate(sizes, dataclasses.replace(whole, step_tokens=8192), 4096)
    head = 4 * sizes.vocabulary * sizes.hidden
    assert 0 < one.overlap <= one.gradients - head
    assert several.overlap == 0 and several.peak > one.peak
    assert f"{one.overlap / 1e9:.1f} of them not at the same time" in one.describe() and "same time" not in several.describe()
    for other in ({"engine": ZERO2, "ranks": 2}, {"on_gpu": False}, {"offload": "all"}):
        assert estimate(sizes, dataclasses.replace(whole, **other), 4096).overlap == 0
    assert estimate(sizes, whole, 64).overlap < one.overlap  # few activations: all gradients are there at the end
