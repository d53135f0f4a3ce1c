"""What the int8 cache's kernels give, in Triton's interpreter: test_kv_cache_kernels.py runs this file with TRITON_INTERPRET=1.

The interpreter is chosen when triton is imported, so these checks have a process of their own.

Shapes: B batch, N heads, T queries, K keys, C capacity, D head size.
"""

import pytest
import torch
from tiny import tiny_model

from qwen_model import kv_cache, kv_cache_kernels
from qwen_model.kv_cache import Int8Cache, Int8Layer, dequantize, kernel_obstacle, quantize
from qwen_model.kv_cache_kernels import MAX_QUERIES, attend_int8, dequantize_int8, write_int8

CONSTANTS = (kv_cache.STEP, kv_cache.RELATIVE_FLOOR, kv_cache.ABSOLUTE_FLOOR)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def room(B, N, C, D, fill=7):
    """A cache's (q, scale, zero point) with room for C tokens, all of one value, so that a stray write shows."""
    columns = ((D, torch.uint8), (1, torch.float32), (1, torch.float32))
    return tuple(torch.full((B, N, C, count), fill, dtype=dtype) for count, dtype in columns)


def filled(B, N, K, C, D, dtype=torch.float32, seed=0):
    """The first K of C tokens of a cache, written by torch: (q, scale, zero point)."""
    triple = room(B, N, C, D)
    for x, new in zip(triple, quantize(random(B, N, K, D, dtype=dtype, seed=seed))):
        x[:, :, :K] = new
    return tuple(x[:, :, :K] for x in triple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_writes_what_torch_writes(D, dtype):
    B, N, T, at, C = 2, 3, 7, 5, 20
    key = random(B, N, T, D, dtype=dtype)
    key[0, 0, 0], key[0, 0, 1], key[0, 0, 2] = 0, -3.7, 1e-7  # heads of one value
    key[0, 1, 0, 5], key[0, 1, 1] = 3e4, torch.arange(D).to(dtype) / 2  # an outlier; many a half to be rounded
    value = random(B, T, N, D, dtype=dtype, seed=1).transpose(1, 2)  # as c_attn's output is laid out
    keys, values = room(B, N, C, D), room(B, N, C, D)
    write_int8(key, value, keys, values, at, *CONSTANTS)
    for triple, x in ((keys, key), (values, value)):
        for got, want in zip(triple, quantize(x)):
            assert torch.equal(got[:, :, at : at + T], want)
            assert (got[:, :, :at] == 7).all() and (got[:, :, at + T :] == 7).all()


@pytest.mark.parametrize("D", [64, 128])
def test_dequantizes_what_torch_dequantizes(D):
    keys, values = filled(2, 3, 37, 50, D), filled(2, 3, 37, 50, D, seed=1)
    for dtype in (torch.float32, torch.float16):
        for got, triple in zip(dequantize_int8(keys, values, dtype), (keys, values)):
            assert torch.equal(got, dequantize(*triple, dtype))


def exact_attention(query, keys, values, mask, scaling):
    """In float64 on the dequantized cache, spelt out: (B, T, N, D)."""
    key, value = (dequantize(*triple, query.dtype).double() for triple in (keys, values))
    T, K = query.shape[2], key.shape[2]
    sees = torch.ones(T, K, dtype=torch.bool).tril(K - T) if mask is None else mask
    scores = (query.double() @ key.transpose(2, 3) * scaling).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0) @ value).transpose(1, 2)


def left_padded(B, T, K, padding):
    """(B, 1, T, K): causal, the first row's first keys hidden."""
    mask = torch.ones(T, K, dtype=torch.bool).tril(K - T).expand(B, 1, T, K).clone()
    mask[0, :, :, :padding] = False
    return mask


CASES = [
    # D, N, T, K, padding (None: no mask), parts
    (64, 1, 1, 1, None, 1),
    (64, 1, 1, 64, None, 1),
    (64, 1, 1, 65, None, 2),
    (64, 1, 1, 150, None, None),
    (64, 2, 1, 150, 70, 3),  # the first part of the first row sees nothing
    (128, 1, 1, 150, 70, 3),
    (64, 1, 5, 133, None, 2),
    (128, 2, 5, 133, 3, 1),
    (64, 2, 17, 90, 64, 2),  # two tiles of queries
    (128, 1, 20, 20, 0, 1),  # a prefill
]


@pytest.mark.parametrize("D, N, T, K, padding, parts", CASES)
def test_attends_as_float64_does(D, N, T, K, padding, parts):
    B = 2
    keys, values = filled(B, N, K, K + 6, D), filled(B, N, K, K + 6, D, seed=1)
    query = random(B, T, N, D, seed=2).transpose(1, 2) * 2
    mask = None if padding is None else left_padded(B, T, K, padding)
    got = attend_int8(query, keys, values, mask, D**-0.5, parts)
    assert got.shape == (B, T, N, D) and got.is_contiguous()
    torch.testing.assert_close(got.double(), exact_attention(query, keys, values, mask, D**-0.5), atol=3e-6, rtol=1e-5)


def test_attends_in_half_precision():
    keys, values = (filled(1, 2, 100, 100, 64, torch.float16, seed) for seed in (0, 1))
    query = random(1, 2, 3, 64, dtype=torch.float16, seed=2)
    got = attend_int8(query, keys, values, None, 0.125)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), exact_attention(query, keys, values, None, 0.125), atol=2e-3, rtol=0)


def test_a_query_that_sees_no_key_gets_zeros():
    keys, values = filled(2, 1, 70, 70, 64), filled(2, 1, 70, 70, 64, seed=1)
    query, mask = random(2, 1, 1, 64), left_padded(2, 1, 70, 70)
    for parts in (1, 2):
        out = attend_int8(query, keys, values, mask, 0.125, parts)
        assert (out[0] == 0).all() and (out[1] != 0).any()


def test_a_mask_of_its_own_for_each_head():
    keys, values = filled(1, 2, 40, 40, 64), filled(1, 2, 40, 40, 64, seed=1)
    query, mask = random(1, 2, 2, 64), torch.rand(1, 2, 2, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = exact_attention(query, keys, values, mask, 0.125)
    torch.testing.assert_close(attend_int8(query, keys, values, mask, 0.125).double(), expected, atol=3e-6, rtol=1e-5)


def test_the_layer_holds_the_same_whoever_writes():
    """A prefill, single tokens past the room that it left, and what transformers does to a cache in between."""
    fast, plain = Int8Layer(), Int8Layer()
    lengths, at = [5, 1, 70, 1, 2], 0
    states = [random(2, 2, sum(lengths), 64, seed=seed) for seed in (0, 1)]
    for step, length in enumerate(lengths):
        key, value = (x[:, :, at : at + length] for x in states)
        entry = fast.update(key, value, kernel=True)
        dequantized = plain.update(key, value)
        at += length
        for triple, want in zip(entry, dequantized):
            assert torch.equal(dequantize(*triple, torch.float32), want)
        if step == 3:
            for layer in (fast, plain):
                layer.crop(-10)
                layer.reorder_cache(torch.tensor([1, 0]))
    assert fast.get_seq_length() == sum(lengths) - 10


def generate(model, batch, kernel, **settings):
    model.config.use_cache_kernel = kernel
    return model.generate(
        **batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """Counts what goes through the kernels."""
    counts = dict.fromkeys(("attend_int8", "dequantize_int8", "write_int8"), 0)
    for name in counts:

        def counting(*args, name=name, function=getattr(kv_cache_kernels, name)):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(kv_cache_kernels, name, counting)
    return counts


def wide_model(D, **changes):
    return tiny_model(
        hidden_size=128, num_attention_heads=128 // D, kv_channels=D, use_cache_quantization=True, **changes
    ).eval()


@pytest.mark.parametrize("D", [64, 128])
def test_greedy_generation_is_the_same_with_and_without(D, calls):
    """Two rows, one padded on the left; beyond the trained length of 16, where LogN scales queries and NTK is on."""
    model = wide_model(D, seq_length=16, use_cache_kernel=True)
    ids = torch.randint(1, 159, (2, 19), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    plain = generate(model, batch, kernel=False)
    assert sum(calls.values()) == 0
    fast = generate(model, batch, kernel=True)
    assert calls == {"attend_int8": 8, "dequantize_int8": 0, "write_int8": 8}  # 4 passes, 2 layers
    assert torch.equal(fast.sequences, plain.sequences)
    for got, want in zip(fast.logits, plain.logits):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for got, want in zip(fast.past_key_values.layers, plain.past_key_values.layers):
        assert got.get_seq_length() == want.get_seq_length() == 22
        for a, b in zip(sum(got.entry, ()), sum(want.entry, ())):  # a number between two steps may fall on either
            torch.testing.assert_close(a.float(), b.float(), atol=1.0 if a.dtype == torch.uint8 else 1e-3, rtol=1e-4)


def test_a_long_prefill_several_queries_and_one(calls):
    model = wide_model(128, seq_length=32, use_cache_kernel=True)
    ids = torch.randint(1, 159, (2, MAX_QUERIES + 12), generator=torch.Generator().manual_seed(1))
    pieces, logits = [MAX_QUERIES + 6, 5, 1], {}
    with torch.no_grad():
        for kernel in (False, True):
            model.config.use_cache_kernel = kernel
            cache = Int8Cache()
            passes = [model(piece, past_key_values=cache, attention_mask=mask) for piece, mask in split(ids, pieces)]
            logits[kernel] = torch.cat([out.logits for out in passes], 1)
    assert calls == {"attend_int8": 4, "dequantize_int8": 2, "write_int8": 6}
    torch.testing.assert_close(logits[True][:, 3:], logits[False][:, 3:], atol=1e-4, rtol=1e-4)


def split(ids, lengths):
    """(ids, mask of all so far) of pieces of given lengths; three tokens of padding in the second row."""
    mask, at = torch.ones_like(ids), 0
    mask[1, :3] = 0
    for length in lengths:
        yield ids[:, at : at + length], mask[:, : at + length]
        at += length


def test_beam_search_is_the_same_with_and_without(calls):
    model = wide_model(128, use_cache_kernel=True)
    batch = {"input_ids": torch.randint(1, 159, (1, 5), generator=torch.Generator().manual_seed(2))}
    plain, fast = (generate(model, batch, kernel, num_beams=2) for kernel in (False, True))
    assert calls["attend_int8"] == 8
    assert torch.equal(plain.sequences, fast.sequences)


def test_obstacles_of_the_interpreter():
    config = wide_model(64, use_cache_kernel=True).config
    with torch.no_grad():
        assert kernel_obstacle(config, Int8Cache(), torch.zeros(1)) == ""
        assert "bfloat16" in kernel_obstacle(config, Int8Cache(), torch.zeros(1, dtype=torch.bfloat16))
        config.kv_channels = 32
        assert "32 channels, the kernels are for 64 and 128" in kernel_obstacle(config, Int8Cache(), torch.zeros(1))
