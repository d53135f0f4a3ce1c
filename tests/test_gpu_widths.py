"""On a GPU at a 7B model's widths, forward and backward in half precision: a block, the head with its loss, a LoRA layer."""

import pytest
import torch
from tiny import packed, random_samples, tiny_model
from torch import nn

from finetune.lora import dropout, low_rank
from qwen_model import attention, fused, head_loss
from qwen_model.head_loss import LMHead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
WIDTHS = {
    "hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128, "intermediate_size": 22016, "num_hidden_layers": 1,
}  # fmt: skip
ROUNDING = {torch.bfloat16: 0.03, torch.float16: 0.005}


def apart(got, want) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def on_gpu(row: dict) -> dict:
    return {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in row.items()}


@HALF
def test_a_block_is_as_near_to_float32_as_plain_torch_is(dtype, monkeypatch):
    """Norms, rotary embedding, gate, attention and loss by kernels, against none of them in the same precision."""
    model = tiny_model(**WIDTHS, initializer_range=0.01).train().cuda()
    row = on_gpu(packed(*random_samples(12, longest=200)))

    def loss_and_gradients(dtype):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(**row, num_items_in_batch=100).loss
        (loss * 64).backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    fast_loss, fast = loss_and_gradients(dtype)
    for module in (fused, head_loss):
        monkeypatch.setattr(module, "why_no_triton", lambda device, kernel="": "not this time")
    monkeypatch.setattr(attention, "torch_has_varlen", lambda: False)
    plain_loss, plain = loss_and_gradients(dtype)
    exact_loss, exact = loss_and_gradients(torch.float32)
    assert fast_loss == pytest.approx(exact_loss, rel=0.01) and plain_loss == pytest.approx(exact_loss, rel=0.01)
    far = {name: (apart(fast[name], exact[name]), apart(plain[name], exact[name])) for name in exact}
    assert all(kernels < 1.2 * torchs for kernels, torchs in far.values()), far


@HALF
def test_the_head_and_its_loss(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(700, 4096, device="cuda", requires_grad=True)
    head = LMHead(4096, 151936, bias=False, device="cuda")
    labels = torch.randint(0, 151936, (700,), device="cuda")
    with torch.autocast("cuda", dtype):
        loss = head_loss.summed_loss(head, hidden, labels)
    loss.backward()
    grads = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    exact = nn.functional.cross_entropy(nn.functional.linear(hidden, head.weight), labels, reduction="sum")
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for got, want in zip(grads, (hidden.grad, head.weight.grad)):
        assert apart(got, want) < ROUNDING[dtype]


@HALF
def test_a_lora_layer_with_dropout(dtype, monkeypatch):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4096, 11008, bias=False, device="cuda", dtype=dtype))
    model = get_peft_model(base, LoraConfig(r=64, lora_alpha=16, lora_dropout=0.05, target_modules=["0"])).train()
    low_rank.install(model)
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    monkeypatch.setattr(low_rank, "draw_seed", lambda: 7)
    x = torch.randn(1000, 4096, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 11008, device="cuda")
    with torch.autocast("cuda", dtype):
        (model(x).float() * weight).sum().backward()
    A, B = (one["default"].weight for one in (layer.lora_A, layer.lora_B))
    kept = dropout.drop(torch.ones(1000, 4096, device="cuda", dtype=dtype), 0.05, 7).double()
    assert 0.94 < kept.mean().item() < 0.96
    exact = [one.detach().double().requires_grad_() for one in (x, A, B)]
    dropped = exact[0] * kept * dropout.scale_of(0.05)
    out = exact[0] @ layer.base_layer.weight.double().T + 0.25 * dropped @ exact[1].T @ exact[2].T
    (out * weight.double()).sum().backward()
    for got, want in zip((x, A, B), exact):
        assert apart(got.grad, want.grad) < ROUNDING[dtype]


def test_a_pass_waits_for_nothing():
    """Forward and backward: whatever asks the GPU for a number, or copies one to it, waits until all before it is done."""
    model = tiny_model(hidden_size=128, num_attention_heads=2, kv_channels=64).train().cuda()
    batch = packed(*random_samples(8))
    bounds = batch["cu_seq_lens_q"].tolist()
    batch = on_gpu(batch)
    for mode in ("default", "error"):  # the first pass compiles kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                model(**batch, bounds=bounds, num_items_in_batch=10).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
