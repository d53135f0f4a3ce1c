"""The bundled model against the published one's golden numbers, and against itself where two ways must agree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import packed, random_samples, tiny_model

from qwen_model import modeling_qwen
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.positions import ntk_alpha

GOLDEN = Path(__file__).parent.parent / "golden"
LOGITS = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "nano.safetensors")


@pytest.fixture(params=["sdpa", "eager"])
def nano(request):
    return QWenLMHeadModel.from_pretrained(GOLDEN / "nano_checkpoint", attn_implementation=request.param).eval()


# ---- golden numbers


@pytest.mark.parametrize("case", ["short", "leftpad", "rightpad"])
def test_logits(nano, golden, case):
    mask = golden.get(f"{case}.attention_mask")
    logits = nano(golden[f"{case}.input_ids"], attention_mask=mask).logits
    if mask is not None:
        logits = logits * mask[..., None]
    torch.testing.assert_close(logits, golden[f"{case}.logits"], **LOGITS)


@pytest.mark.parametrize("case", ["long", "longer"])
def test_logits_beyond_the_trained_length(nano, golden, case):
    logits = nano(golden[f"{case}.input_ids"]).logits
    torch.testing.assert_close(logits[:, :8], golden[f"{case}.logits_first8"], **LOGITS)
    torch.testing.assert_close(logits[:, -8:], golden[f"{case}.logits_last8"], **LOGITS)


@pytest.mark.parametrize("case", ["decode", "decode_long"])
def test_greedy_decoding(nano, golden, case):
    out = nano.generate(
        golden[f"{case}.prompt"], max_new_tokens=12, do_sample=False, repetition_penalty=1.0, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences[:, -12:].tolist() == golden[f"{case}.tokens"].tolist()
    torch.testing.assert_close(torch.stack(out.logits, 1), golden[f"{case}.logits"], **LOGITS)


def test_training_loss_logits_and_gradient_norms(nano, golden):
    nano.train()
    out = nano(golden["train.input_ids"], labels=golden["train.labels"], skip_logits=False)
    torch.testing.assert_close(out.loss, golden["train.loss"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.logits[:, -8:], golden["train.logits_last8"], **LOGITS)
    out.loss.backward()
    norms = {name: parameter.grad.norm() for name, parameter in nano.named_parameters()}
    expected = {key.removeprefix("train.grad_norm."): norm for key, norm in golden.items() if "grad_norm" in key}
    assert norms.keys() == expected.keys()
    for name in norms:
        torch.testing.assert_close(norms[name], expected[name].reshape(()), rtol=1e-3, atol=1e-7)


def test_ntk_alpha():
    # by hand from alpha = max(1, 2^ceil(log2(L / S) + 1) - 1) with S = 64
    for length, alpha in [(10, 1), (33, 1), (64, 1), (65, 3), (128, 3), (129, 7), (256, 7), (257, 15)]:
        assert ntk_alpha(length, 64).item() == alpha


# ---- cached, chunked and padded ways against one full forward


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("quantized", [False, True])
def test_chunked_prefill_and_decoding_equal_a_full_forward(attn, quantized):
    model = tiny_model(attn_implementation=attn, use_cache_quantization=quantized).eval()
    ids = torch.randint(0, 160, (2, 50))
    full = model(ids, use_cache=False).logits
    cache, pieces = None, []
    for chunk in ids.split([20, 13, 1, 1, 15], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache, pieces = out.past_key_values, pieces + [out.logits]
    tolerance = 0.03 if quantized else 1e-5
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=tolerance, rtol=0)


def test_decoding_keeps_the_alpha_of_its_prefill(monkeypatch):
    model = tiny_model().eval()
    ids = torch.randint(0, 160, (1, 140))
    cache = model(ids[:, :100], use_cache=True).past_key_values  # alpha 3; a prefill of 140 would take 7
    decoded = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(100, 140)], 1)

    monkeypatch.setattr(modeling_qwen, "alpha_of_pass", lambda *_: torch.full((1, 1), 3.0))
    torch.testing.assert_close(decoded, model(ids, use_cache=False).logits[:, 100:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("long", [False, True])
def test_left_padding_changes_nothing_but_logn(long):
    # LogN counts positions with the padding, as published, so it is off here; NTK goes by each row's own tokens
    model = tiny_model(use_logn_attn=False).eval()
    short, full = (70, 100) if long else (7, 20)
    rows = [torch.randint(0, 160, (short,)), torch.randint(0, 160, (full,))]
    ids, mask = torch.zeros(2, full, dtype=torch.long), torch.zeros(2, full, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, -len(row) :], model(row[None]).logits[0], atol=2e-5, rtol=0)


def test_training_mode_knows_neither_ntk_nor_logn():
    model, plain = tiny_model().train(), tiny_model(use_dynamic_ntk=False, use_logn_attn=False).eval()
    ids = torch.randint(0, 160, (1, 150))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=0)


# ---- causality


@pytest.mark.parametrize("way", ["sdpa", "eager", "packed", "leftpad", "rightpad", "cached", "int8"])
def test_a_later_token_moves_no_earlier_logit(way):
    model = tiny_model(attn_implementation="eager" if way == "eager" else "sdpa").eval()
    model.config.use_cache_quantization = way == "int8"
    ids = torch.randint(1, 159, (1, 30))
    changed = ids.clone()
    changed[0, 20] += 1

    def logits(ids):
        if way == "packed":
            bounds = torch.tensor([0, 12, 30], dtype=torch.int32)
            return model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=18, max_length_k=18).logits
        if way == "leftpad":
            return model(ids, attention_mask=(torch.arange(30) >= 4).long()[None]).logits[:, 4:]
        if way == "rightpad":
            return model(ids, attention_mask=(torch.arange(30) < 26).long()[None]).logits[:, :26]
        if way in ("cached", "int8"):
            first = model(ids[:, :15], use_cache=True)
            return torch.cat([first.logits, model(ids[:, 15:], past_key_values=first.past_key_values).logits], 1)
        return model(ids, use_cache=False).logits

    before, after = logits(ids), logits(changed)
    at = 16 if way == "leftpad" else 20
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at], after[:, at])


# ---- packed samples


def one_by_one(model, samples, labels):
    """The loss over all supervised tokens and every gradient, sample by sample, plain logits and cross-entropy in float64."""
    model.zero_grad()
    count = sum(label != -100 for row in labels for label in row[1:])
    total = 0.0
    for ids, row in zip(samples, labels):
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
        loss = (
            torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), ignore_index=-100, reduction="sum") / count
        )
        loss.backward()
        total += loss.item()
    return total, count, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_lora(model):
    """Adapters on the published target modules, with weights that do something."""
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn", "c_proj", "w1", "w2"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def assert_gradients(model, expected):
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert error < 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_packed_equals_one_by_one(method, checkpointing):
    model = tiny_model().train()
    if method == "lora":
        model = with_lora(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    samples, labels = random_samples(6)
    loss, count, gradients = one_by_one(model, samples, labels)
    model.zero_grad()
    got = model(**packed(samples, labels), num_items_in_batch=count).loss
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert_gradients(model, gradients)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_regrouping_a_step_changes_nothing(method):
    model = with_lora(tiny_model().train()) if method == "lora" else tiny_model().train()
    samples, labels = random_samples(6)
    loss, count, gradients = one_by_one(model, samples, labels)
    for groups in ([[0, 1, 2, 3, 4, 5]], [[5, 0], [3], [1, 4, 2]], [[i] for i in range(6)]):
        model.zero_grad()
        total = 0.0
        for group in groups:
            batch = packed([samples[i] for i in group], [labels[i] for i in group])
            part = model(**batch, num_items_in_batch=count).loss
            part.backward()
            total += part.item()
        assert total == pytest.approx(loss, rel=1e-5)
        assert_gradients(model, gradients)


def test_packed_evaluation_beyond_the_trained_length():
    """NTK and LogN go by each sample's own length, not by the row's."""
    model = tiny_model().eval()
    samples = [torch.randint(0, 160, (length,)).tolist() for length in (30, 100, 60, 150)]
    batch = packed(samples, samples)
    del batch["shift_labels"], batch["logits_to_keep"]
    logits = model(**batch).logits[0].split([len(sample) for sample in samples])
    for sample, got in zip(samples, logits):
        torch.testing.assert_close(got, model(torch.tensor([sample])).logits[0], atol=2e-5, rtol=0)


def test_attention_dropout_acts_in_packed_training():
    model = tiny_model(attn_dropout_prob=0.5).train()
    samples, labels = random_samples(3)
    losses = {model(**packed(samples, labels)).loss.item() for _ in range(3)}
    assert len(losses) == 3
    model.eval()
    assert len({model(**packed(samples, labels)).loss.item() for _ in range(2)}) == 1


# ---- outputs


def test_hidden_states_and_attentions():
    model = tiny_model(attn_implementation="eager").eval()
    out = model(torch.randint(0, 160, (2, 9)), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 32)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 2, 9, 9)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 2, 9))


def test_labels_without_num_items_take_the_mean():
    model = tiny_model().eval()
    ids = torch.randint(0, 160, (2, 12))
    labels = ids.clone()
    labels[0, :7] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 160), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    assert model(ids, labels=labels, skip_logits=True).logits is None


def test_attention_choice_says_why(monkeypatch):
    from qwen_model import attention

    assert attention.choose_attention(False) == ("sdpa", "use_flash_attn is false in config.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention.choose_attention("auto") == ("sdpa", "no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    assert "sm_80" in attention.choose_attention("auto")[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    assert attention.choose_attention("auto") == ("sdpa", "flash-attn 2 is not installed")
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert attention.choose_attention("auto")[0] == "flash_attention_2"


@pytest.mark.parametrize("distribution, version, want", [("flash-attn", "2.8.3", True), ("flash-attn-4", "4.0.0", False)])
def test_flash_attn_4_has_the_name_of_flash_attn_2(tmp_path, distribution, version, want):
    """In a process of its own, with a package that says no more than who it is."""
    info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("flash_attn\n")
    (info / "RECORD").write_text("flash_attn/__init__.py,,\n")
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    code = (
        "import transformers.utils.import_utils as known; known.is_torch_cuda_available = lambda: True;"
        "import torch; from qwen_model.attention import choose_attention;"  # whose imports would use the GPU that there is not
        "torch.cuda.is_available = lambda: True; torch.cuda.get_device_capability = lambda: (9, 0); print(choose_attention()[0])"
    )
    root = str(Path(__file__).parents[2])
    own = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert done.stdout.split() == ["flash_attention_2" if want else "sdpa"], done.stderr


def test_the_rotary_base_is_no_copy_from_the_host(monkeypatch):
    """To copy a number to a GPU is to wait for it, in every pass."""
    rotary, positions, alpha = tiny_model().transformer.rotary, torch.arange(9)[None], torch.full((1, 1), 3.0)
    want = [rotary(positions, None), rotary(positions, alpha)]

    def copied(*args, **kwargs):
        raise AssertionError("torch.tensor in a pass")

    monkeypatch.setattr(torch, "tensor", copied)
    for (cos, sin), given in zip(want, (None, alpha)):
        assert all(map(torch.equal, rotary(positions, given), (cos, sin)))


def test_torchs_variable_length_attention_where_it_takes_what_we_give(monkeypatch):
    """Not before Ampere, where it raises, and not torch 2.10's, which has neither scale nor window."""
    import types

    from qwen_model import attention

    x = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 7))
    for capability, fits in (((8, 0), True), ((9, 0), True), ((7, 5), False)):
        attention.is_ampere.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)  # noqa: B023
        assert attention.is_half_on_cuda(x) is fits
    attention.is_ampere.cache_clear()
    assert attention.torch_has_varlen.__wrapped__()
    old = types.SimpleNamespace(varlen_attn=lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: 0)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name)
    assert not attention.torch_has_varlen.__wrapped__()
