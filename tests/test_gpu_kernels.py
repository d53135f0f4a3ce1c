"""The int8 cache's kernels on a real GPU: the same as torch there, in 16 bit, with long contexts, in a whole model."""

import pytest
import torch
from tiny import tiny_model

from qwen_model import kv_cache, kv_cache_kernels
from qwen_model.kv_cache import Int8Cache, Int8Layer, dequantize, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONSTANTS = (kv_cache.STEP, kv_cache.RELATIVE_FLOOR, kv_cache.ABSOLUTE_FLOOR)


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_writes_and_dequantizes_bit_for_bit(D, dtype):
    fast, plain = Int8Layer(), Int8Layer()
    key = random(3, 4, 1000, D, dtype=dtype) * torch.logspace(-3, 3, 1000, device="cuda")[:, None].to(dtype)
    key[0, 0, 0], key[0, 0, 1], key[0, 1, 1] = 0, -3.7, torch.arange(D).to("cuda", dtype) / 2
    value = random(3, 1000, 4, D, dtype=dtype, seed=1).transpose(1, 2)
    entry, want = fast.update(key, value, kernel=True), plain.update(key, value)
    for triple, x in zip(entry, (key, value)):
        for got, expected in zip(triple, quantize(x)):
            assert torch.equal(got, expected)
    for got, expected in zip(kv_cache_kernels.dequantize_int8(*entry, dtype), want):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("B, T, K", [(1, 1, 8192), (1, 1, 777), (5, 1, 513), (2, 7, 300), (2, 33, 130), (40, 1, 100)])
def test_attends_as_float64_does(B, T, K, D, dtype, atol):
    layer = Int8Layer()
    keys, values = layer.update(random(B, 4, K, D, dtype=dtype), random(B, 4, K, D, dtype=dtype, seed=1), kernel=True)
    query = random(B, T, 4, D, dtype=dtype, seed=2).transpose(1, 2)
    key, value = (dequantize(*triple, dtype).double() for triple in (keys, values))
    sees = torch.ones(T, K, dtype=torch.bool, device="cuda").tril(K - T).expand(B, 1, T, K).clone()
    for mask in (None, sees):
        if mask is not None:
            mask[0, :, :, : K - T] = False  # the first row is padded up to its queries
        scores = (query.double() @ key.transpose(2, 3) * D**-0.5).masked_fill(~sees, -torch.inf)
        expected = (scores.softmax(-1) @ value).transpose(1, 2)
        got = kv_cache_kernels.attend_int8(query, keys, values, mask, D**-0.5)
        torch.testing.assert_close(got.double(), expected, atol=atol, rtol=0)


def test_offsets_beyond_32_bits():
    """3 GB of keys: the last head's begin past what a 32-bit offset reaches."""
    B, N, K, D = 4, 64, 90_000, 128
    if torch.cuda.mem_get_info()[0] < 10e9:
        pytest.skip("needs 10 GB of free GPU memory")
    keys, values = (
        (torch.full((B, N, K, D), fill, dtype=torch.uint8, device="cuda"), *torch.ones(2, B, N, K, 1, device="cuda"))
        for fill in (1, 3)
    )
    values[0][-1, -1] = 6  # the last head's values: 1 * (6 - 1)
    out = kv_cache_kernels.attend_int8(random(B, N, 1, D), keys, values, None, 1.0)
    assert (out[-1, 0, -1] == 5).all() and (out[0] == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_generation_with_and_without(dtype):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "kv_channels": 64, "seq_length": 32}
    model = tiny_model(**sizes, use_cache_quantization=True, use_cache_kernel=True).eval().to("cuda", dtype)
    ids = torch.randint(1, 159, (3, 80), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    outputs = []
    for kernel in (True, False):
        model.config.use_cache_kernel = kernel
        outputs.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )
        )  # fmt: skip
    fast, plain = outputs
    if dtype == torch.float32:
        assert torch.equal(fast.sequences, plain.sequences)
    else:  # a tie may fall on either side, and everything after it differs
        torch.testing.assert_close(fast.logits[0].float(), plain.logits[0].float(), atol=0.1, rtol=0.02)
        torch.testing.assert_close(fast.logits[1].float(), plain.logits[1].float(), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("kernel", [True, False])
def test_an_offloaded_cache_gives_the_same(kernel):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "kv_channels": 64, "num_hidden_layers": 4}
    model = tiny_model(**sizes, use_cache_quantization=True, use_cache_kernel=kernel).eval().cuda()
    ids = torch.randint(1, 159, (2, 70), device="cuda")
    outputs = [
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        for cache in (Int8Cache(), Int8Cache(offloading=True))
    ]
    assert torch.equal(*outputs)
