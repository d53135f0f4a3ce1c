"""The parts of run_gptq.py: what is drawn, what fits, the format, and layer-by-layer inference."""

import json
import math

import numpy as np
import pytest
import quantizing
import torch
from tiny import later_model, pack, small_checkpoint, tiny_later_qwen
from transformers import AutoConfig, AutoModelForCausalLM

import qwen_model
from finetune.compare.agreement import Agreement
from finetune.conversations import reading
from finetune.errors import UserError
from finetune.folders import gptq_format
from finetune.folders.shards import Shards
from finetune.gptq import calibration, gptq_checks, gptq_proof, gptq_tensors
from finetune.gptq.settings import Settings
from finetune.gptq.streamed import streamed

CPU = torch.device("cpu")
IDS = torch.arange(1, 41).reshape(2, 20) * 7 % 350


# ---- calibration


@pytest.fixture
def data(tmp_path):
    """100 conversations, each with its number in it."""
    asked = [{"from": "user", "value": f"{i}?" + " 9" * i} for i in range(100)]
    samples = [{"conversations": [turn, {"from": "assistant", "value": str(i)}]} for i, turn in enumerate(asked)]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    return reading.read(tmp_path / "data.json")


def test_the_seed_decides_what_is_drawn(data, tokenizer):
    texts = {}
    for seed in (1, 2):
        drawn = calibration.draw(data, tokenizer, 70, seed, 512)
        again = calibration.draw(data, tokenizer, 70, seed, 512)
        assert [ids.tolist() for ids, _ in drawn.samples] == [ids.tolist() for ids, _ in again.samples]
        answers = [tokenizer.decode(ids[labels != -100]) for ids, labels in drawn.samples]
        texts[seed] = [answer.removesuffix("<|im_end|>") for answer in answers]
        assert texts[seed] == sorted(set(texts[seed]), key=int) and len(drawn) == 70  # in order, none twice
    assert texts[1] != texts[2]


def test_rendered_as_for_training(data, tokenizer):
    from finetune.samples.renderers import renderer_of

    expected = [(ids, labels) for ((ids, labels, _),) in renderer_of(tokenizer).render_batch(list(data))]
    drawn = calibration.draw(data, tokenizer, 1000, 0, 60)
    assert len(drawn) == 100 and drawn.cut == sum(len(ids) > 60 for ids, _ in expected) > 0
    for (ids, labels), (whole, whole_labels) in zip(drawn.samples, expected):
        assert ids.tolist() == whole[:60].tolist() and labels.tolist() == whole_labels[:60].tolist()


def test_what_is_said_of_them(data, tokenizer):
    few = calibration.draw(data, tokenizer, 10, 3, 512)
    lengths = sorted(len(ids) for ids, _ in few.samples)
    sizes = f"{sum(lengths):,} tokens, shortest {lengths[0]}, median {lengths[5]}, longest {lengths[-1]} (limit 512)"
    assert few.describe() == [
        f"calibration: {data.path}: 100 given, 10 taken (seed 3); {sizes}",
        "use 64-512 samples; 10 taken",
    ]
    [line] = calibration.draw(data, tokenizer, 64, 3, 70).describe()
    assert "100 given, 64 taken (seed 3)" in line and "(limit 70, " in line
    assert few.record()["tokens"] == sum(lengths)


# ---- sizes


def published(folder, sizes: dict):
    """config.json of a model of these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    more = {"kv_channels": 128, "vocab_size": 151936, "num_hidden_layers": 2}
    lengths = {"seq_length": 2048, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen"} | more | lengths | sizes))
    return folder


@pytest.mark.parametrize(
    "hidden,width,bits,group,expected",
    [
        (2048, 11008, 4, 128, [1]),  # 5504 = 43 * 128
        (4096, 22016, 4, 128, [1, 2]),  # 11008 = 86 * 128
        (4096, 22016, 8, 64, [1, 2, 4]),
        (4096, 22016, 4, -1, [1, 2, 4, 8, 16, 32]),
        (8192, 49152, 4, 128, [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_tensor_parallel_sizes_of_published_models(tmp_path, hidden, width, bits, group, expected):
    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_attention_heads": hidden // 128}
    settings = Settings(bits=bits, group_size=group)
    assert gptq_checks.tensor_parallel_sizes(published(tmp_path, sizes), settings) == expected
    assert calibration.longest(tmp_path, 8192) == 2048 and calibration.longest(tmp_path, 100) == 100


def test_c_attn_is_shared_out_by_thirds():
    """Query, key and value of 96 rows each: three GPUs get 32 of each, and 288 / 9 rows would part a head's words."""
    settings = Settings(bits=4, group_size=16)
    fits = [size for size in (1, 2, 3, 4, 6, 9, 12) if gptq_checks.shared_out("h.0.attn.c_attn", [288, 96], size, 12, settings)]
    assert fits == [1, 2, 3, 4, 6, 12]


def test_tensor_parallel_sizes_of_a_later_qwen(tmp_path):
    """4 heads on 2 of keys: beyond 2, keys are copied."""
    folder = tiny_later_qwen(tmp_path / "model")
    of = gptq_checks.tensor_parallel_sizes
    assert of(folder, Settings(group_size=16)) == [1, 2]
    assert of(folder, Settings(group_size=-1)) == [1, 2, 4]
    assert of(folder, Settings(group_size=-1, bits=2)) == [1]  # one head of keys is 8 wide, half a word


def test_group_sizes_that_fit_are_named(tmp_path):
    layers = {"a": [64, 64], "b": [64, 176]}
    with pytest.raises(UserError, match=r"widths \(64 and 176\) - give 16 or -1"):
        gptq_checks.check_widths(layers, Settings())
    gptq_checks.check_widths(layers, Settings(group_size=16))
    with pytest.raises(UserError, match="--bits 3: widths of 176 do not fill .* - give --bits 2 or 4 or 8"):
        gptq_checks.check_widths(layers, Settings(group_size=16, bits=3))


# ---- the format


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing(bits):
    numbers = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(0))
    words = gptq_format.pack(numbers, bits)
    assert torch.equal(words, pack(numbers, bits)) and torch.equal(gptq_format.unpack(words, bits).long(), numbers)
    assert torch.equal(quantizing.numbers(words, bits), numbers)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_the_older_format(bits):
    """Less one; a zero point of 0 becomes 1 and its weights one more, so that they mean the same."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2**bits - 1, (64, 32), generator=generator)
    zeros = torch.randint(0, 2**bits, (2, 32), generator=generator)
    zeros[0, :3] = 0
    groups = torch.arange(64, dtype=torch.int32) % 2
    before = numbers - zeros[groups.long()]
    qweight, qzeros = gptq_format.as_v1(pack(numbers, bits), pack(zeros.T, bits).T.contiguous(), groups, bits)
    found = quantizing.numbers(qzeros.T.contiguous(), bits).T + 1
    assert torch.equal(quantizing.numbers(qweight, bits) - found[groups.long()], before)
    assert torch.equal(found, zeros.clamp(min=1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_number_stays_as_it_is_and_within_its_bits(bits):
    """Where it would become one more than the format holds."""
    numbers, zeros = torch.full((64, 32), 2**bits - 1), torch.zeros(1, 32, dtype=torch.int64)
    groups = torch.zeros(64, dtype=torch.int32)
    qweight, _ = gptq_format.as_v1(pack(numbers, bits), pack(zeros.T, bits).T.contiguous(), groups, bits)
    assert torch.equal(quantizing.numbers(qweight, bits), numbers)


def test_values_too_large_for_float16_are_an_error():
    with pytest.raises(UserError, match="lm_head.weight: has values up to 1e.05, which float16 cannot hold - GPTQ folders"):
        gptq_tensors.half("lm_head.weight", torch.tensor([1.0, 1e5]))
    with pytest.raises(UserError, match="wte.weight: holds infinities, or what is no number - the model is broken"):
        gptq_tensors.half("wte.weight", torch.tensor([1.0, torch.nan]))


# ---- layer-by-layer inference, and the proof


@pytest.mark.parametrize("kind", ["qwen", "qwen2, tied", "qwen3"])
def test_streamed_logits_are_the_models(tmp_path, kind):
    qwen_model.register()
    if kind == "qwen":
        folder = small_checkpoint(tmp_path / "model")
    else:
        folder = tiny_later_qwen(tmp_path / "model", kind[:5], tied="tied" in kind)
    with Shards(folder) as shards, torch.no_grad():
        passing = streamed(AutoConfig.from_pretrained(shards.folder), shards.__getitem__)
        found = passing(IDS).logits
        blocks = [parameter for name, parameter in passing.named_parameters() if ".0." in name or ".1." in name]
        assert blocks and all(parameter.device.type == "meta" for parameter in blocks)  # nothing of them stays
        assert torch.equal(passing(IDS).logits, found)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
    assert torch.equal(found, expected)


def test_a_proof_of_equal_and_of_different_models(tmp_path, monkeypatch):
    """What stands in for the quantized one: the same weights, others, none."""
    qwen_model.register()
    folder = tiny_later_qwen(tmp_path / "model")
    ids = np.arange(3, 23, dtype=np.int32)
    samples = [(ids + i, np.where(np.arange(20) < 5, -100, ids + i).astype(np.int32)) for i in range(9)]

    def proof_with(other):
        monkeypatch.setattr(gptq_proof.quant_settings, "of_folder", lambda folder: None)
        monkeypatch.setattr(gptq_proof.quantized_model, "load", lambda *args, **settings: other)
        return gptq_proof.proof(folder, tmp_path, samples, CPU, torch.float32)

    same = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before, after = proof_with(same)
    assert (after.same_greedy, after.tokens, after.perplexity) == (1.0, 3 * 15, before.perplexity)
    _, after = proof_with(later_model(seed=1))
    assert after.same_greedy < 1
    same.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="answers are not numbers - nothing was written"):
        proof_with(same)


def test_samples_of_a_proof():
    """Four from beginning to end; none without an answer, or whose answer is cut off."""
    answered = [(np.full(10, i), np.array([-100] * 9 + [1])) for i in range(10)]
    silent = [(np.arange(2000), np.array([-100] * 1999 + [1])), (np.arange(10), np.full(10, -100))]
    assert [int(ids[0]) for ids, _ in gptq_proof.choose(silent + answered)] == [0, 3, 6, 9]


def test_lines_of_a_proof():
    before = Agreement(tokens=100, nll=100 * math.log(2))
    after = Agreement(tokens=100, nll=100 * math.log(2.1), equal=97)
    assert gptq_proof.lines(before, after) == [
        "perplexity on answers of the calibration: 2 before, 2.1 quantized (+5.0%)",
        "the same likeliest token at 97.0% of 100 places",
    ]
