"""Q-LoRA: weights against a hand-made packing, gradients against plain LoRA over the same weights, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import quantized_steps as steps
import torch
from chat_templates import later_tokenizer
from tiny import small_checkpoint, tiny_gptq, wide_checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import qwen_model
from finetune.ask import __main__ as ask
from finetune.errors import UserError
from finetune.flags.definitions import LoraArguments
from finetune.folders import adapter_base, fingerprints, model_folder, quant_settings
from finetune.merge import __main__ as merge
from finetune.model import loading
from finetune.quantized import nf4, quantized_model
from finetune.steps import saving

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20) * 7 % 1000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{bits: (a published-style GPTQ folder, its plain twin in float32)}, {"nf4": (a plain folder, itself)}"""
    qwen_model.register()
    place = tmp_path_factory.mktemp("quantized")
    found = {
        bits: (tiny_gptq(place / f"Tiny-Int{bits}", bits, twin=place / f"twin{bits}"), place / f"twin{bits}")
        for bits in (4, 8)
    }
    plain = wide_checkpoint(place / "Tiny")
    return found | {"nf4": (plain, plain)}


def quant_of(kind) -> str:
    return "nf4" if kind == "nf4" else "none"


def twin_of(folders, kind, tokenizer):
    """Plain LoRA over the dequantized weights, adapters filled alike."""
    training = SimpleNamespace(device=CPU, bf16=False, fp16=False, deepspeed=None, bf16_weights=False)
    plain = loading.load_model(
        folders[kind][1],
        tokenizer,
        LoraArguments(use_lora=True, lora_r=4, lora_dropout=0.0, train_embeddings="none"),
        training,
    )
    if kind == "nf4":
        put_in_dequantized(plain, quantized_model.load(folders[kind][0], quant_settings.NF4, torch.float32, CPU))
    steps.fill(plain)
    return plain


def put_in_dequantized(plain, four_bit) -> None:
    from bitsandbytes.functional import dequantize_4bit

    target = dict(plain.get_base_model().named_parameters())
    for name, module in four_bit.named_modules():
        if module in nf4.layers(four_bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            target[f"{name}.base_layer.weight"].data.copy_(weight)


# ---- loading


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("published_style", [True, False])
def test_gptq_weights_and_biases_are_those_that_were_packed(tmp_path, bits, published_style, capfd):
    qwen_model.register()
    tiny_gptq(tmp_path / "q", bits, published_style=published_style, twin=tmp_path / "plain")
    loaded = quantized_model.load(tmp_path / "q", quant_settings.of_folder(tmp_path / "q"), torch.float32, CPU)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, twin(IDS).logits, atol=1e-5, rtol=1e-4)
    out, err = capfd.readouterr()
    assert out == "" and "UNEXPECTED" not in err and "WARN" not in err


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision(folders, dtype, tolerance):
    loaded = quantized_model.load(folders[4][0], quant_settings.of_folder(folders[4][0]), dtype, CPU)
    twin = AutoModelForCausalLM.from_pretrained(folders[4][1], dtype=torch.float32)
    with torch.no_grad():
        found = loaded(IDS).logits
        torch.testing.assert_close(found.float(), twin(IDS).logits, atol=tolerance, rtol=0)
    assert found.dtype == dtype


def test_an_engines_cast_leaves_the_scales_alone(folders, tokenizer):
    loaded = steps.load(folders[4][0], tokenizer)
    layer = loaded.get_base_model().transformer.h[0].mlp.w1.base_layer
    before = layer.scales.clone()
    loaded.bfloat16()
    assert layer.scales.dtype == before.dtype and torch.equal(layer.scales, before)
    assert layer.bias.dtype == torch.bfloat16 and loaded.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_older_folders_say_it_in_quantize_config(folders, tmp_path):
    folder = shutil.copytree(folders[4][0], tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    found = quant_settings.of_folder(folder)
    assert (found.method, found.bits, found.group_size, found.format) == ("gptq", 4, 32, "gptq")
    twin = AutoModelForCausalLM.from_pretrained(folders[4][1], dtype=torch.float32)
    with torch.no_grad():
        logits = loading.load_weights(folder, torch.float32, False, device=CPU)(IDS).logits
        torch.testing.assert_close(logits, twin(IDS).logits, atol=1e-5, rtol=1e-4)


def test_a_missing_tensor_is_an_error(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders[4][0], tmp_path / "cut")
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    gone = next(name for name in tensors if name.endswith("scales"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, shard, {"format": "pt"})
    with pytest.raises(RuntimeError, match=f"1 tensors are missing, the first is {gone}"):
        quantized_model.load(folder, quant_settings.of_folder(folder), torch.float32, CPU)


def test_gptqmodel_leaves_no_trace(folders):
    """In a process of its own: the package is imported once, and the environment and the log are as before."""
    code = f"""
import logging, os, sys
from finetune.quiet import quiet; quiet()
from finetune.folders import quant_settings; from finetune.quantized import quantized_model; import qwen_model, torch; from pathlib import Path
qwen_model.register(); before, handlers = dict(os.environ), list(logging.getLogger().handlers)
folder = Path({str(folders[4][0])!r})
quantized_model.load(folder, quant_settings.of_folder(folder), torch.float32, torch.device("cpu"))
assert "gptqmodel" in sys.modules and handlers == logging.getLogger().handlers
assert {{k: v for k, v in os.environ.items() if before.get(k) != v}} == {{"GPTQMODEL_CPU_WORKERS": "2"}}, os.environ
"""
    environment = {key: value for key, value in os.environ.items() if key != "GPTQMODEL_CPU_WORKERS"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if "Loading weights" not in line and line.strip()]
    assert (done.returncode, done.stdout, lines) == (0, "", []), done.stderr


def test_nf4_takes_the_blocks_and_nothing_else(folders):
    plain = AutoModelForCausalLM.from_pretrained(folders["nf4"][0], dtype=torch.float32)
    four_bit = quantized_model.load(folders["nf4"][0], quant_settings.NF4, torch.float32, CPU)
    assert len(nf4.layers(four_bit)) == 2 * 4 and four_bit.transformer.h[1].mlp.c_proj.weight.dtype == torch.float32
    assert four_bit.lm_head.weight.dtype == four_bit.transformer.wte.weight.dtype == torch.float32
    weight, wanted = four_bit.transformer.h[0].mlp.w1.weight, plain.transformer.h[0].mlp.w1.weight
    assert weight.dtype == torch.uint8 and weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
    from bitsandbytes.functional import dequantize_4bit

    found = dequantize_4bit(weight.data, weight.quant_state)
    largest = wanted.flatten().unflatten(0, (-1, 64)).abs().amax(1).repeat_interleave(64).reshape(wanted.shape)
    assert not torch.equal(found, wanted)
    # half of the widest gap between NF4's values (-1 and -0.6962), and the scale's own rounding
    assert ((found - wanted).abs() <= (0.152 + 0.02) * largest).all()


def test_nf4_is_refused_where_no_layer_can_be_quantized(tmp_path):
    with pytest.raises(UserError, match="inputs of a multiple of 64 values - train with --use_lora alone"):
        quantized_model.load(small_checkpoint(tmp_path / "narrow"), quant_settings.NF4, torch.float32, CPU)


@pytest.mark.parametrize("tied", [False, True])
def test_later_qwens(tmp_path, tied):
    """transformers' own classes, GPTQ and NF4; tied: the head is the embedding, as in the small ones."""
    folder, plain = later_qwen_gptq(tmp_path, tied)
    loaded = quantized_model.load(folder, quant_settings.of_folder(folder), torch.float32, CPU)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS % 200).logits, plain(IDS % 200).logits, atol=1e-5, rtol=1e-4)
    four_bit = quantized_model.load(tmp_path / "plain", quant_settings.NF4, torch.float32, CPU)
    assert len(nf4.layers(four_bit)) == 2 * 7 and four_bit.lm_head.weight.dtype == torch.float32
    training = SimpleNamespace(device=CPU, bf16=False, fp16=False, deepspeed=None, bf16_weights=False)
    for place, quant in ((folder, "none"), (tmp_path / "plain", "nf4")):
        lora = loading.load_model(place, later_tokenizer(tmp_path / "tokenizer"), flags(quant=quant), training)
        lora(input_ids=IDS % 200, labels=IDS % 200).loss.backward()
        trained = [p for p in lora.parameters() if p.requires_grad]
        assert len(trained) == 2 * 7 * 2 and all(p.grad is not None for p in trained)


def later_qwen_gptq(place: Path, tied: bool):
    """(a GPTQ folder, the plain model of its dequantized weights, also in place/plain)"""
    from safetensors.torch import save_file
    from tiny import GROUP, gptq
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    torch.manual_seed(0)
    plain, tensors = Qwen3ForCausalLM(config).eval(), {}
    for name, tensor in plain.state_dict().items():
        if name.endswith("_proj.weight"):
            parts, dequantized = gptq(tensor, 4, torch.Generator().manual_seed(0))
            tensors |= {name.replace("weight", key): part for key, part in parts.items()}
            tensor.copy_(dequantized)
        elif not (tied and name == "lm_head.weight"):
            tensors[name] = tensor
    plain.save_pretrained(place / "plain")
    (place / "int4").mkdir()
    save_file(tensors, place / "int4" / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    written = json.loads((place / "plain" / "config.json").read_text()) | {"quantization_config": settings}
    (place / "int4" / "config.json").write_text(json.dumps(written))
    return place / "int4", plain


def test_sizes_are_those_of_the_plain_model(folders):
    """For the summary of a run, the disk that it needs, and --lora_target_modules."""
    for kind in (4, 8, "nf4"):
        loaded = quantized_model.load(
            folders[kind][0], quant_settings.of_folder(folders[kind][0]) or quant_settings.NF4, torch.float32, CPU
        )
        plain = AutoModelForCausalLM.from_pretrained(folders[kind][1], dtype=torch.float32)
        biases = sum(p.numel() for name, p in plain.named_parameters() if name.endswith("bias")) if kind != "nf4" else 0
        counted = sum(p.numel() for p in loaded.parameters()) + quantized_model.packed_away(loaded)
        assert counted == plain.num_parameters() - biases  # GPTQ's are not counted
    found, wanted = model_folder.shapes(folders[8][0]), model_folder.shapes(folders[8][1])
    assert {name: found.get(name) for name in wanted} == wanted


# ---- training


@pytest.mark.parametrize("kind", [4, 8, "nf4"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_are_those_of_lora_over_the_dequantized_weights(folders, tokenizer, kind, gradient_checkpointing):
    loaded = steps.load(folders[kind][0], tokenizer, quant_of(kind))
    if gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for each in (loaded, twin_of(folders, kind, tokenizer)):
        each.train()
        each(**steps.row(0, 0, 1)).loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    found, wanted = gradients
    assert found.keys() == wanted.keys() and len(found) == 2 * 5 * 2
    for name, gradient in wanted.items():
        difference = (found[name] - gradient).norm() / gradient.norm()
        assert gradient.norm() > 0 and difference < 1e-4, name


def test_what_a_layer_returns_for_rows_may_be_added_to_in_its_place(folders):
    """No view, which LoRA's product would copy."""
    loaded = quantized_model.load(folders[4][0], quant_settings.of_folder(folders[4][0]), torch.float32, CPU)
    for layer in (loaded.transformer.h[0].attn.c_attn, loaded.transformer.h[0].mlp.w1):
        x = torch.randn(6, layer.in_features, requires_grad=True)
        out = layer(x)
        assert not out._is_view()
        for shape in ((2, 3), (6, 1), (1, 2, 3)):
            assert torch.equal(layer(x.reshape(*shape, -1)), out.reshape(*shape, -1))
        assert torch.equal(layer(x[0]), layer(x[:1])[0])


def test_no_pass_keeps_an_unpacked_weight(folders, tokenizer):
    """Over all layers they would be the 16-bit model."""
    loaded, kept = steps.load(folders[4][0], tokenizer), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.add(tuple(tensor.shape)) or tensor, lambda x: x):
        loaded.train()(**steps.row(0, 0, 1)).loss.backward()
    assert {(4, 32), (32, 4)} & kept  # LoRA's A, or its transpose
    assert not {(32, 96), (96, 32)} & kept  # unpacked c_attn, w1, w2, c_proj and what they are transposed


@pytest.mark.parametrize("kind", [4, "nf4"])
def test_transformers_trainer_takes_it(folders, tokenizer, kind, tmp_path):
    loaded = steps.load(folders[kind][0], tokenizer, quant_of(kind))
    trainer = Trainer(loaded, TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    assert trainer.accelerator.prepare_model(loaded) is not None


# ---- saving


@pytest.fixture(scope="module")
def saved(folders, tokenizer, tmp_path_factory):
    """{kind: (the model after four steps, its folder)}"""
    found = {}
    for kind in (4, 8, "nf4"):
        base, out = folders[kind][0], tmp_path_factory.mktemp("saved")
        trained = steps.load(base, tokenizer, quant_of(kind))
        steps.one_process(trained)
        wish = SimpleNamespace(q_lora=True, quant=quant_of(kind))
        record = {
            "base": {"name": str(base), "fingerprint": fingerprints.of_model(base)},
            "method": {"quantization": quant_settings.as_record(quantized_model.of_run(base, wish))},
        }
        saving.save_final(trained, tokenizer, out, record=record)
        found[kind] = (trained.eval(), out)
    return found


@pytest.mark.parametrize("kind", [4, "nf4"])
def test_an_adapter_loads_again_over_what_it_was_trained_over(folders, saved, kind):
    trained, out = saved[kind]
    again = loading.load_tuned(adapter_base.find(out), out, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, trained(IDS).logits, atol=0, rtol=0)
        with trained.disable_adapter():
            assert (again(IDS).logits - trained(IDS).logits).abs().max() > 0.01


def test_ask_answers_from_a_gptq_folder_and_an_adapter_on_it(folders, saved, capsys):
    for folder in (folders[4][0], saved[4][1]):
        ask.main([str(folder), "Who are you?", "--max_new_tokens", "3"])
        out, err = capsys.readouterr()
        assert out.startswith("Q: Who are you?\nA: ") and "error" not in err


@pytest.mark.parametrize("kind", [4, 8, "nf4"])
def test_an_adapter_merges_into_what_it_was_trained_over(saved, tmp_path, kind, capsys):
    """Dequantized: the very weights that training saw, with the biases that only published GPTQ folders have."""
    trained, adapter = saved[kind]
    assert merge.merge(adapter, tmp_path / "out", to="float32") < 1e-4
    assert ", dequantized from " + ("NF4" if kind == "nf4" else f"GPTQ Int{kind}") in capsys.readouterr().err
    assert quant_settings.of_folder(tmp_path / "out") is None and not (tmp_path / "out" / "quantize_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, trained(IDS).logits, atol=1e-4, rtol=0)


def test_an_adapter_merges_into_the_16_bit_sibling(folders, saved, tmp_path, capsys):
    merge.main([str(saved[4][1]), str(tmp_path / "out"), "--base", str(folders[4][1])])
    assert "taken for its 16-bit sibling" in capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():  # the twin holds what the quantized base stands for
        torch.testing.assert_close(merged(IDS).logits, saved[4][0](IDS).logits, atol=1e-4, rtol=0)


def test_an_nf4_adapter_merges_into_the_weights_as_they_are_stored(folders, saved, tmp_path):
    """Which is not what training saw: NF4 has rounded them."""
    merge.merge(saved["nf4"][1], tmp_path / "out", base=str(folders["nf4"][0]))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert 1e-4 < (merged(IDS).logits - saved["nf4"][0](IDS).logits).abs().max() < 0.5


def test_an_adapter_of_a_plain_base_does_not_go_onto_another(folders, tmp_path):
    made_for = fingerprints.of_model(folders["nf4"][0])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "training.json").write_text(json.dumps({"base": {"fingerprint": made_for}}))
    for other in (folders[4][0], folders[4][1]):
        with pytest.raises(UserError, match="made for another base"):
            adapter_base.check(adapter, other)


# ---- what is refused


def flags(**values) -> LoraArguments:
    return LoraArguments(**({"use_lora": True, "q_lora": True, "train_embeddings": "none"} | values))


def test_q_lora_needs_quantized_weights(folders, tmp_path):
    plain, four = folders["nf4"][0], folders[4][0]
    assert quantized_model.run_problems(plain, flags()) == [
        f"{plain} is not quantized - add --quant nf4, or give a GPTQ model: a published ...-Int4, or what run_gptq.py makes of this one"
    ]
    assert quantized_model.run_problems(plain, flags(quant="nf4")) == quantized_model.run_problems(four, flags()) == []
    assert quantized_model.run_problems(four, flags(quant="nf4")) == [
        f"--quant nf4: {four} is quantized already (GPTQ Int4) - leave out --quant"
    ]
    later = tmp_path / "Qwen2.5-7B-Instruct"
    later.mkdir()
    (later / "config.json").write_text('{"model_type": "qwen2"}')
    assert ": Qwen2.5-7B-Instruct-GPTQ-Int4, or what" in quantized_model.run_problems(later, flags())[0]


def test_a_hubs_model_is_called_by_its_name(folders, tmp_path):
    """Its folder in the hub's cache is called by a hash."""
    names = ("Qwen-7B-Chat", "Qwen-7B-Chat-Int4")
    places = [tmp_path / f"models--Qwen--{name}" / "snapshots" / "8f3a1b" for name in names]
    plain, four = (shutil.copytree(folders[which][0], place) for which, place in zip(("nf4", 4), places))
    assert ": Qwen-7B-Chat-Int4, or what" in quantized_model.run_problems(plain, flags())[0]
    assert quant_settings.needs_q_lora(four).endswith("or give the 16-bit checkpoint (Qwen-7B-Chat)")


def test_quant_needs_q_lora():
    assert quantized_model.flag_problems(flags(quant="nf4")) == quantized_model.flag_problems(flags()) == []
    (line,) = quantized_model.flag_problems(flags(q_lora=False, quant="nf4"))
    assert line == "--quant nf4: quantized weights are trained over with LoRA only - add --q_lora"


def test_a_quantized_folder_needs_q_lora(folders):
    four = folders[4][0]
    line = f"{four} is GPTQ-quantized: use finetune_qlora_*.sh (--q_lora), or give the 16-bit checkpoint (Tiny)"
    assert model_folder.problems(four) == [line]
    assert model_folder.problems(four, may_be_quantized=True) == []


@pytest.mark.parametrize(
    "settings,line",
    [
        ({"quant_method": "awq", "bits": 4}, " is quantized (awq) - give another checkpoint: "),
        ({"quant_method": "fp8"}, " is quantized (fp8) - give another checkpoint: "),
        ({"quant_method": "gptq", "bits": 5}, " is quantized (GPTQ, 5 bits, format gptq) - give another checkpoint: "),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, " (GPTQ, 4 bits, format marlin) - "),
        ({"quant_method": "gptq", "bits": "four"}, '/config.json: bits is "four", not a whole number - take the file '),
        ({"quant_method": "gptq", "bits": 4, "group_size": None}, "/config.json: group_size is null, not a whole number"),
        ("gptq", "/config.json: quantization_config is 'gptq', not an object - take the file of the published"),
    ],
)  # fmt: skip
def test_other_quantizations(folders, tmp_path, settings, line):
    folder = shutil.copytree(folders["nf4"][0], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for may_be_quantized in (False, True):
        (found,) = model_folder.problems(folder, may_be_quantized)
        assert found.startswith(f"{folder}") and line in found


def test_missing_packages(folders, monkeypatch):
    monkeypatch.setattr(quantized_model, "installed", lambda name: name == "optimum")
    line = "GPTQ Int4 needs gptqmodel, not installed here - pip install gptqmodel"
    assert quantized_model.run_problems(folders[4][0], flags()) == [line]
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantized_model.load(folders["nf4"][0], quant_settings.NF4, torch.float32, CPU)
