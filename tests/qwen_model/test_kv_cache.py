"""The int8 KV cache: exact enough, finite everywhere, and a Cache as transformers knows it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model

from qwen_model.kv_cache import Int8Cache, dequantize, quantize
from qwen_model.modeling_qwen import QWenLMHeadModel

GOLDEN = Path(__file__).parent.parent / "golden"


def test_error_is_at_most_half_a_step():
    x = torch.randn(2, 3, 50, 64) * torch.logspace(-3, 3, 50)[:, None]
    q, scale, zero = quantize(x)
    assert q.dtype == torch.uint8 and scale.shape == zero.shape == (2, 3, 50, 1)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    assert ((dequantize(q, scale, zero, torch.float32) - x).abs() <= step * 0.5001 + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("value", [0.0, 3.7, -1e4, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_heads_come_back(value, dtype):
    x = torch.full((1, 2, 3, 8), value, dtype=dtype)
    back = dequantize(*quantize(x), dtype)
    assert back.isfinite().all()
    torch.testing.assert_close(back, x)


def test_as_close_to_unquantized_as_the_published_cache():
    golden = load_file(GOLDEN / "nano.safetensors")
    model = QWenLMHeadModel.from_pretrained(GOLDEN / "nano_checkpoint").eval()
    ids = torch.cat([golden["kv8.prompt"], golden["kv8.tokens"]], 1)
    exact = model(ids, use_cache=False).logits
    cache = Int8Cache()
    ours = [model(ids[:, :20], past_key_values=cache).logits]
    ours += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, ids.shape[1] - 1)]
    ours = torch.cat(ours, 1)
    published = torch.cat([golden["kv8.prefill_logits"][:, :-1], golden["kv8.logits"]], 1)
    exact = exact[:, : ours.shape[1]]
    assert (ours - exact).abs().mean() <= (published - exact).abs().mean()
    assert (ours - exact).abs().max() <= (published - exact).abs().max()


def test_holds_what_the_published_cache_holds():
    """Layer 0's keys and values agree within a step of the published grid (one range per head there, truncated)."""
    golden = load_file(GOLDEN / "nano.safetensors")
    model = QWenLMHeadModel.from_pretrained(GOLDEN / "nano_checkpoint").eval()
    cache = Int8Cache()
    model(golden["kv8.prompt"], past_key_values=cache)
    for name, ours in zip(("key", "value"), cache.layers[0].entry):
        q, scale, zero = (golden[f"kv8.layer0.{part}"] for part in (f"q_{name}", f"{name}_scale", f"{name}_zero_point"))
        assert (ours[1] <= scale * 1.001).all()  # a token's range lies inside its head's
        difference = (dequantize(*ours, torch.float32) - scale * (q.float() - zero)).abs()
        assert (difference <= scale + ours[1] / 2 + 1e-6).all()


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3}])
def test_generate_uses_it_when_the_config_says_so(how):
    model = tiny_model(use_cache_quantization=True).eval()
    out = model.generate(
        torch.randint(0, 160, (2, 9)),
        max_new_tokens=6,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        **how,
    )
    assert isinstance(out.past_key_values, Int8Cache)
    assert out.past_key_values.get_seq_length() == 14  # the last token was never fed
    assert out.past_key_values.layers[0].keys.dtype == torch.uint8


def test_cache_operations_act_on_all_three_tensors():
    cache = Int8Cache()
    keys = torch.randn(2, 3, 5, 8)
    cache.update(keys, keys + 1, 0)
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    cache.batch_select_indices(torch.tensor([0, 3]))
    keys, values = cache.update(torch.zeros(2, 3, 1, 8), torch.ones(2, 3, 1, 8), 0)
    assert keys.shape == (2, 3, 4, 8)
    assert (values[:, :, :3] - keys[:, :, :3]).mean().item() == pytest.approx(1, abs=0.02)
    for triple in cache.layers[0].entry:
        assert [x.shape[:3] for x in triple] == [(2, 3, 4)] * 3
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(2)
    cache.reset()
    assert cache.get_seq_length() == 0
