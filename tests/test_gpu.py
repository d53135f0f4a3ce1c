"""What only a GPU can show: the variable-length kernels against the loop, and a training step in bf16."""

import importlib.util

import pytest
import torch
from tiny import packed, random_samples, tiny_model

from qwen_model import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def heads(dtype, lengths, requires_grad=False):
    torch.manual_seed(0)
    shape = (1, 4, sum(lengths), 64)
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def test_variable_length_kernel_equals_the_loop():
    lengths = [5, 130, 64, 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    query, key, value = heads(torch.bfloat16, lengths, requires_grad=True)
    assert attention.is_half_on_cuda(query) and attention.torch_has_varlen()
    fast = attention.packed_attention(query, key, value, bounds, max(lengths), bounds.tolist(), 0.125)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    slow = attention.packed_attention(*exact, bounds, max(lengths), bounds.tolist(), 0.125)
    torch.testing.assert_close(fast.double(), slow, atol=2e-2, rtol=0)
    weight = torch.randn_like(fast)
    (fast * weight).sum().backward()
    (slow * weight.double()).sum().backward()
    for got, want in zip((query, key, value), exact):
        assert (got.grad.double() - want.grad).norm() / want.grad.norm() < 0.02


@pytest.mark.parametrize("attn", ["sdpa", "flash_attention_2"])
def test_a_packed_step_on_the_gpu_follows_float32_on_the_cpu(attn):
    if attn == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "kv_channels": 64}
    samples, labels = random_samples(8)
    exact, fast = tiny_model(**sizes).train(), tiny_model(**sizes, attn_implementation="sdpa").train().cuda()
    fast.set_attn_implementation(attn)
    expected = exact(**packed(samples, labels)).loss
    expected.backward()
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in packed(samples, labels).items()
    }
    with torch.autocast("cuda", torch.bfloat16):
        loss = fast(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for (name, a), b in zip(fast.named_parameters(), exact.parameters()):
        assert (a.grad.cpu() - b.grad).norm() / b.grad.norm() < 0.05, name


@pytest.mark.parametrize("attn", ["sdpa", "flash_attention_2"])
def test_a_later_token_moves_no_earlier_logit_on_the_gpu(attn):
    if attn == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    model = tiny_model(hidden_size=128, num_attention_heads=2, kv_channels=64).eval().cuda().bfloat16()
    model.set_attn_implementation(attn)
    ids = torch.randint(1, 159, (1, 30), device="cuda")
    changed = ids.clone()
    changed[0, 20] += 1
    bounds = torch.tensor([0, 12, 30], dtype=torch.int32, device="cuda")
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 18, "max_length_k": 18}
    for settings in ({}, packing, {"attention_mask": (torch.arange(30, device="cuda") >= 4).long()[None]}):
        before, after = (model(x, use_cache=False, **settings).logits[:, 4:] for x in (ids, changed))
        assert torch.equal(before[:, :16], after[:, :16])
        assert not torch.equal(before[:, 16], after[:, 16])
