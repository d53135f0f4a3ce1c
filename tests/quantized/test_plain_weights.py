"""Whatever weights are stored as, they are read as the numbers that a model computes with."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import gptq, pack, tiny_gptq, wide_checkpoint

import qwen_model
from finetune.folders import quant_settings
from finetune.folders.gptq_format import dequantize, unpack
from finetune.quantized import nf4, quantized_model
from finetune.quantized.plain_weights import PlainWeights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqs_format(bits):
    """Against what tests/tiny.py packs by hand; both ways to store zero points, and groups in any order."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (96, 5), generator=generator)
    assert torch.equal(unpack(pack(codes, bits), bits), codes.int())
    tensors, expected = gptq(torch.randn(64, 96, generator=generator), bits, generator)
    assert torch.equal(dequantize(**tensors, bits=bits), expected)
    as_they_are = pack(unpack(tensors["qzeros"].T.contiguous(), bits).long() + 1, bits).T.contiguous()
    assert torch.equal(
        dequantize(**tensors | {"qzeros": as_they_are}, bits=bits, checkpoint_format="gptq_v2"), expected
    )
    order = torch.randperm(96, generator=generator)
    packed = pack(unpack(tensors["qweight"], bits).long()[order], bits)
    shuffled = tensors | {"qweight": packed, "g_idx": tensors["g_idx"][order]}
    assert torch.equal(dequantize(**shuffled, bits=bits), expected[:, order])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_folder(tmp_path, bits):
    """Its shards, published style, against the twin whose weights were unpacked by hand."""
    tiny_gptq(tmp_path / "q", bits, twin=tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    with PlainWeights(tmp_path / "q") as weights:
        assert all(torch.equal(weights[name].float(), tensor) for name, tensor in expected.items())
        assert weights.dtype == torch.float16
        there = {name: list(tensor.shape) for name, tensor in expected.items() if "c_attn" in name}
        more = weights.more_biases(there)  # of what the 16-bit model has no bias for, and which is not zero
        assert sorted(more)[:2] == ["transformer.h.0.attn.c_proj.bias", "transformer.h.0.mlp.c_proj.bias"]
        assert weights.more_biases(expected) == []


def test_nf4(tmp_path):
    """As bitsandbytes' layers unpack them."""
    qwen_model.register()
    folder = wide_checkpoint(tmp_path / "wide")
    model = quantized_model.load(folder, quant_settings.NF4, torch.float32, torch.device("cpu"))
    from bitsandbytes.functional import dequantize_4bit

    layers = {name: module for name, module in model.named_modules() if module in nf4.layers(model)}
    assert layers
    with PlainWeights(folder, quant_settings.NF4) as weights, PlainWeights(folder) as stored:
        for name, layer in layers.items():
            assert torch.equal(weights[f"{name}.weight"], dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        for name in stored.shards:
            same = torch.equal(weights[name], stored[name])
            assert same == (name.removesuffix(".weight") not in layers), name
