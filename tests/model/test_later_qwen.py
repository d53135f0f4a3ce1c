"""Later Qwens on packed rows: the numbers of transformers' own models on the samples one by one."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import later_config, later_model, packed, random_samples, tiny_later_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from finetune.folders import adapter_base, hub, shards
from finetune.merge import __main__ as merge
from finetune.model import later_qwen, loading
from finetune.steps import report, saving

KINDS = pytest.mark.parametrize("kind,tied", [("qwen2", False), ("qwen2", True), ("qwen3", False), ("qwen3", True)])
SAMPLES, LABELS = random_samples(5, vocab_size=400)


def one_by_one(plain, samples=SAMPLES, labels=LABELS):
    """(loss per supervised token, gradients) by transformers' own loss, a sample at a time."""
    total, count = 0, 0
    for sample, wanted in zip(samples, labels):
        supervised = sum(label != -100 for label in wanted[1:])
        total += plain(torch.tensor([sample]), labels=torch.tensor([wanted])).loss * supervised
        count += supervised
    (total / count).backward()
    gradients = {name: p.grad.clone() for name, p in plain.named_parameters() if p.requires_grad}
    plain.zero_grad()
    return total.item() / count, gradients


def assert_same(prepared, row, loss, gradients):
    """Loss and all gradients of the row are those of the samples."""
    out = prepared(**row)
    assert out.logits is None or not prepared.training
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, abs=1e-5)
    found = {name: p.grad for name, p in prepared.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_row_is_its_samples_one_by_one(kind, tied, checkpointing):
    plain = later_model(kind, tied)
    expected = one_by_one(plain)
    prepared = later_qwen.prepare(plain).train()
    assert prepared.config._attn_implementation == "packed"
    assert (prepared.lm_head.weight is prepared.model.embed_tokens.weight) is tied
    if checkpointing:
        prepared.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(prepared, packed(SAMPLES, LABELS), *expected)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_norms_and_gates_round_as_transformers_do(kind):
    """In bf16 the same bits forward; what they keep for the backward pass is less."""
    plain = later_model(kind).to(torch.bfloat16)
    x = torch.randn(1, 7, plain.config.hidden_size, dtype=torch.bfloat16)
    layer = plain.model.layers[0]
    parts = [layer.input_layernorm, layer.mlp] + ([layer.self_attn.q_norm] if kind == "qwen3" else [])
    inputs = [x, x, torch.randn(1, 7, 2, plain.config.head_dim, dtype=torch.bfloat16)] if kind == "qwen3" else [x, x]
    expected, kept = zip(*(kept_by(part, given) for part, given in zip(parts, inputs)))
    later_qwen.prepare(plain)
    found, kept_now = zip(*(kept_by(part, given) for part, given in zip(parts, inputs)))
    assert all(map(torch.equal, found, expected))
    assert all(now < before for now, before in zip(kept_now, kept))


def kept_by(module, x):
    """(output, bytes that autograd keeps, without weights)"""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}

    def note(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = module(x.clone().requires_grad_())
    return out.detach(), sum(kept.values())


def test_a_norm_beside_weights_of_another_type_stays_transformers_own():
    """Which returns the wider type: queries in full-parameter training under autocast."""
    prepared = later_qwen.prepare(later_model("qwen3"))
    x = torch.randn(1, 3, 2, prepared.config.head_dim, dtype=torch.bfloat16)
    assert prepared.model.layers[0].self_attn.q_norm(x).dtype == torch.float32


def test_the_loss_counts_over_num_items_and_logits_come_when_asked_for():
    plain = later_model()
    row = packed(SAMPLES, LABELS)
    loss, _ = one_by_one(plain)
    ids = torch.tensor([SAMPLES[0]])
    expected = plain(ids).logits
    prepared = later_qwen.prepare(plain).train()
    count = row["shift_labels"].numel()
    assert prepared(**row, num_items_in_batch=2 * count).loss.item() == pytest.approx(loss / 2, abs=1e-5)
    out = prepared(**row, skip_logits=False)
    kept = row["logits_to_keep"][row["logits_to_keep"] < len(SAMPLES[0])]
    torch.testing.assert_close(out.logits[:, : len(kept)], expected[:, kept], atol=1e-5, rtol=0)
    assert prepared.eval()(**row).logits is not None and prepared(**row, skip_logits=True).logits is None


def test_positions_may_be_given_or_left_out():
    prepared = later_qwen.prepare(later_model())
    row = packed(SAMPLES, LABELS)
    positions = torch.cat([torch.arange(len(sample)) for sample in SAMPLES])[None]
    assert torch.equal(prepared(**row).loss, prepared(**row, position_ids=positions).loss)
    assert not torch.equal(prepared(**row).loss, prepared(**row, position_ids=positions // 2).loss)


def test_in_half_precision_attention_gets_it(monkeypatch):
    """Autocast leaves rotated queries and keys in float32, which would keep them from the fast kernels."""
    seen, plain = set(), later_qwen.packed_attention

    def watched(query, key, value, *rest):
        seen.update(x.dtype for x in (query, key, value))
        return plain(query, key, value, *rest)

    monkeypatch.setattr(later_qwen, "packed_attention", watched)
    prepared, row = later_qwen.prepare(later_model()), packed(SAMPLES, LABELS)
    exact = prepared(**row).loss.item()
    assert seen == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert prepared(**row).loss.item() == pytest.approx(exact, rel=0.01)
    assert seen == {torch.bfloat16}


def test_a_row_that_supervises_nothing_has_gradients_of_zero():
    prepared = later_qwen.prepare(later_model()).train()
    prepared(**packed([[1, 2, 3]], [[-100] * 3]), num_items_in_batch=1).loss.backward()
    assert prepared.model.embed_tokens.weight.grad.abs().max() == 0


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_under_lora(kind):
    """peft calls the inner model's forward, with arguments of its own."""
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    plain = get_peft_model(later_model(kind), settings)
    expected = one_by_one(plain)
    torch.manual_seed(1)
    prepared = get_peft_model(later_qwen.prepare(later_model(kind)), settings).train()
    assert_same(prepared, packed(SAMPLES, LABELS), *expected)
    said = report.attention(prepared, SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False))
    assert said == "sdpa, sample by sample (float32, or no CUDA device)"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_layers_with_a_window(kind):
    """Samples longer than the window are packed, too, under transformers' own mask."""
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    plain = later_model(kind, **window)
    assert plain.config.layer_types == ["full_attention", "sliding_attention"]
    expected = one_by_one(plain)
    assert abs(expected[0] - one_by_one(later_model(kind))[0]) > 1e-4  # else the window would do nothing here
    prepared = later_qwen.prepare(plain).train()
    assert_same(prepared, packed(SAMPLES, LABELS), *expected)
    said = report.attention(prepared, SimpleNamespace(device=torch.device("cuda"), bf16=True, fp16=False))
    assert said == f"sdpa ({later_qwen.SLIDING})"


@KINDS
def test_generation_and_plain_passes_stay_as_they_were(kind, tied):
    plain = later_model(kind, tied)
    ids, mask = torch.tensor([[0, 0, *SAMPLES[0][:4]], SAMPLES[1][:6]]), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(ids, **settings), plain(ids, attention_mask=mask, labels=ids)
    prepared = later_qwen.prepare(later_qwen.prepare(plain))  # twice is once
    assert torch.equal(prepared.generate(ids, **settings), expected[0])
    found = prepared(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(found.logits, expected[1].logits)
    torch.testing.assert_close(found.loss, expected[1].loss)


# ---- checkpoints


@KINDS
def test_what_is_saved_loads_with_plain_transformers(kind, tied, tmp_path):
    folder = tiny_later_qwen(tmp_path / "base", kind, tied)
    loaded = loading.load_weights(folder, torch.float32, half_on_cuda=False)
    assert isinstance(loaded, later_qwen.PackedRows)
    tokenizer = loading.load_tokenizer(folder)
    saving.save_final(loaded, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == json.loads((tmp_path / "out/config.json").read_text())["architectures"][0]
    assert not isinstance(again, later_qwen.PackedRows) and again.config._attn_implementation == "sdpa"
    ids = torch.tensor([SAMPLES[0]])
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits)
    names = set(dict(shards.read_tensors(tmp_path / "out")))
    assert ("lm_head.weight" in names) is not tied
    gathered = {name: parameter.detach().clone() for name, parameter in loaded.named_parameters()}  # as engines.gather
    saving.save_final(loaded, tokenizer, tmp_path / "gathered", state_dict=gathered)
    assert set(dict(shards.read_tensors(tmp_path / "gathered"))) == names


def test_a_base_model_that_is_tuned_stops_after_its_answer(tmp_path):
    folders = [tiny_later_qwen(tmp_path / name, base=name == "base") for name in ("base", "chat")]
    for folder in folders:
        loaded, tokenizer = loading.load_weights(folder, "auto", False), loading.load_tokenizer(folder)
        before = loaded.generation_config.to_dict()
        loading.set_chat_settings(loaded, tokenizer)
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        assert loaded.generation_config.eos_token_id == ends and loaded.generation_config.pad_token_id == ends[1]
        assert (loaded.generation_config.to_dict() == before) is (folder.name == "chat")


def test_a_tokenizer_without_a_template_gets_chatml(tmp_path, capsys):
    folder = tiny_later_qwen(tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    tokenizer = loading.load_tokenizer(folder)
    asked = [{"role": "user", "content": "hi"}]
    prompt = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    said = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert said == prompt + "<|im_start|>assistant\n"
    assert f"{folder}: its tokenizer has no chat template" in capsys.readouterr().err
    tokenizer.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("kind,tied", [("qwen2", True), ("qwen3", False)])
def test_an_adapter_is_merged(kind, tied, tmp_path, capsys):
    base = tiny_later_qwen(tmp_path / "base", kind, tied, base=True)
    tokenizer = loading.load_tokenizer(base)
    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(loading.load_weights(base, torch.float32, False), settings).eval()
    loading.set_chat_settings(lora, tokenizer)
    saving.save_final(lora, tokenizer, tmp_path / "adapter")
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    ids = torch.tensor([SAMPLES[0]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(ids).logits, lora(ids).logits, atol=1e-4, rtol=0)
    with lora.disable_adapter():
        assert (lora(ids).logits - merged(ids).logits).abs().max() > 0.01
    stops = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert stops == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_the_model_to_train_keeps_the_name_that_it_was_given(tmp_path, monkeypatch):
    """peft writes it into the adapter: a hub's id as it is, a folder in full."""
    folder = tiny_later_qwen(tmp_path / "snapshots" / "abc")
    lora = SimpleNamespace(
        use_lora=True, q_lora=False, quant="none", lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_bias="none",
        lora_target_modules=["auto"], lora_weight_path=None, use_dora=False, use_rslora=False, train_tokens=[],
        init_lora_weights="default", train_embeddings="none",
    )  # fmt: skip
    training = SimpleNamespace(bf16=False, fp16=False, deepspeed=None, bf16_weights=False, device=torch.device("cpu"))
    tokenizer = loading.load_tokenizer(folder)
    for given, stored in (("Qwen/Qwen2-0B", "Qwen/Qwen2-0B"), (str(folder), str(folder))):
        tuned = loading.load_model(folder, tokenizer, lora, training, name=given)
        saving.save_final(tuned, tokenizer, tmp_path / "out")
        written = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == stored
        assert len(written["target_modules"]) == 7
        monkeypatch.setattr(hub, "fetch", lambda name, cache_dir: folder if name == "Qwen/Qwen2-0B" else None)
        assert adapter_base.find(tmp_path / "out") == folder


def test_layers_without_a_window_are_known():
    assert not later_qwen.has_sliding_layers(later_config("qwen3"))


# ---- no keyword is passed over


def test_what_belongs_to_a_packed_row_needs_one_and_the_other_way_round():
    prepared, row = later_qwen.prepare(later_model()), packed(SAMPLES, LABELS)
    ids = row["input_ids"]
    for more in ({"skip_logits": True}, {"cu_seq_lens_q": row["cu_seq_lens_q"], "max_length_q": 3}):
        with pytest.raises(ValueError, match="comes with shift_labels"):
            prepared(ids, **more)
    for more in ({"attention_mask": torch.ones_like(ids)}, {"labels": ids}, {"use_cache": True}, {"cache": DynamicCache()}):
        with pytest.raises(ValueError, match="takes no attention_mask, cache, use_cache or labels"):
            prepared(**row, **more)
    with pytest.raises(TypeError, match="a packed row does not know output_hidden_states"):
        prepared(**row, output_hidden_states=True)


def test_a_window_in_packed_attention_is_an_error():
    heads = torch.randn(1, 2, 6, 16)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    packing = {"bounds": [0, 2, 6], "cu_seq_lens_q": bounds, "max_length_q": 4}
    module = SimpleNamespace(num_key_value_groups=1)
    assert later_qwen.attention(module, heads, heads, heads, None, 0.25, **packing)[0].shape == (1, 6, 2, 16)
    with pytest.raises(TypeError, match="attention on packed rows does not know sliding_window"):
        later_qwen.attention(module, heads, heads, heads, None, 0.25, sliding_window=2, **packing)


def test_without_a_packed_row_it_is_transformers_own():
    """num_items_in_batch too, by which gradient accumulation divides."""
    plain = later_model()
    ids = torch.tensor([SAMPLES[0]])
    wanted = [plain(ids, labels=ids, num_items_in_batch=count).loss.item() for count in (None, 100)]
    prepared = later_qwen.prepare(plain)
    found = [prepared(ids, labels=ids, num_items_in_batch=count).loss.item() for count in (None, 100)]
    assert found == pytest.approx(wanted) and wanted[0] != pytest.approx(wanted[1])
