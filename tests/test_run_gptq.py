"""run_gptq.py: the folder's format read by hand, its logits against plain weights, refusals, and what a kill leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import quantized_steps
import quantizing
import torch
import warm
from quantizing import ROOT, arguments, model_to_quantize, stored
from tiny import SAVED_CODE, tiny_gptq, tiny_later_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen_model
import run_gptq
from finetune.conversations import reading
from finetune.flags.definitions import LoraArguments
from finetune.folders import fingerprints, model_folder, quant_settings, shards
from finetune.gptq import calibration, pipeline
from finetune.gptq.settings import Settings
from finetune.model import loading
from finetune.quantized import quantized_model
from finetune.writing.new_folder import hide_config_until_done, new_folder

CPU = torch.device("cpu")
IDS = torch.arange(1, 41).reshape(2, 20) * 7 % 350
JSONS = {"config.json", "generation_config.json", "quantize_config.json", "tokenizer_config.json", "training.json"}
FILES = SAVED_CODE | JSONS | {"README.md", "chat_template.jinja", "model.safetensors", "qwen.tiktoken"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    qwen_model.register()
    return model_to_quantize(tmp_path_factory.mktemp("source") / "Tiny")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """{bits: the folder that run_gptq.py made}"""
    place = tmp_path_factory.mktemp("made")
    for bits in (4, 8):
        run_gptq.main(arguments(source, place / f"Tiny-Int{bits}", "--bits", bits))
    return {bits: place / f"Tiny-Int{bits}" for bits in (4, 8)}


def logits(some_model):
    with torch.no_grad():
        return some_model(IDS).logits.float()


def same_logits_as_plain_weights(folder):
    """As Q-LoRA loads it. And as it lies there: with 4 bits, whose kernel for CPUs computes in half precision, and for
    whose others torch compiles for half a minute.
    """
    expected = logits(quantizing.twin(folder))
    for_training = loading.load_weights(folder, torch.float32, half_on_cuda=False, device=CPU)
    torch.testing.assert_close(logits(for_training), expected, atol=2e-5, rtol=1e-4)
    if quant_settings.of_folder(folder).bits == 4:
        as_it_lies = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.testing.assert_close(logits(as_it_lies), expected, atol=0.03 * expected.abs().max().item(), rtol=0)


# ---- the folder


def test_the_folder_holds_what_published_ones_do(made, source):
    for bits, folder in made.items():
        assert {path.name for path in folder.iterdir()} == FILES
        settings = json.loads((folder / "quantize_config.json").read_text())
        config = quantizing.config_of(folder)
        assert config["quantization_config"] == settings
        expected = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": True}
        expected |= {"damp_percent": 0.01, "true_sequential": True, "static_groups": False, "checkpoint_format": "gptq"}
        assert expected.items() <= settings.items()
        assert (config["dtype"], config["fp16"], config["bf16"], config["fp32"]) == ("float16", True, False, False)
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_qwen.QWenLMHeadModel"
        assert quant_settings.of_folder(folder) == quant_settings.Quantization("gptq", bits, 32, True, False, "gptq")
        assert "was_run" not in (folder / "modeling_qwen.py").read_text()


def test_tensors(made, source):
    """Types, shapes, zero points, and that the unquantized ones are the source's."""
    plain = stored(source)
    for bits, folder in made.items():
        tensors, layers = stored(folder), 2 * 5
        assert sum(name.endswith(".qweight") for name in tensors) == layers
        whole = ("qweight", "qzeros", "g_idx")
        assert {tensors[name].dtype for name in tensors if name.endswith(whole)} == {torch.int32}
        assert tensors["transformer.h.0.mlp.c_proj.qweight"].shape == (96 * bits // 32, 32)
        assert tensors["transformer.h.0.mlp.c_proj.scales"].shape == (3, 32)
        zeros = torch.cat([tensors[name].flatten() for name in tensors if name.endswith("qzeros")])
        word = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]  # v1: half of the range, less one
        assert zeros.unique().tolist() == [word]
        rest = {name for name in plain if not name.removesuffix(".weight").endswith(quantizing.LAYERS)}
        assert rest == {name for name in tensors if name.rsplit(".", 1)[-1] in ("weight", "bias")}
        assert all(torch.equal(tensors[name], plain[name].half()) for name in rest)


def test_code_in_the_source_is_never_run(made, source):
    assert not (source / "was_run").exists()


def test_record_and_card(made, source):
    record = json.loads((made[4] / "training.json").read_text())["quantized"]
    assert record["from"] == {"folder": str(source), "fingerprint": fingerprints.of_model(source)}
    assert record["calibration"]["taken"] == 64 and record["calibration"]["given"] == 136
    assert record["settings"]["bits"] == 4 and record["versions"]["gptqmodel"]
    assert "# Tiny, GPTQ Int4" in (made[4] / "README.md").read_text()


@pytest.mark.parametrize("bits", [4, 8])
def test_it_loads_with_the_logits_of_its_weights(made, bits):
    same_logits_as_plain_weights(made[bits])


def test_eight_bits_are_closer_than_four_and_gptq_than_rounding(made, source, tokenizer):
    """On the calibration data, in logits."""
    drawn = calibration.draw(reading.read(quantizing.DATA), tokenizer, 64, 42, 2048)

    def error(some_model) -> float:
        with torch.no_grad():
            pairs = [(some_model(row).logits, plain(row).logits) for row in rows]
        return sum((a - b).square().mean().item() for a, b in pairs) / len(pairs)

    rows = [torch.from_numpy(ids).long()[None] for ids, _ in drawn.samples[::4]]
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    nearest = quantizing.rounded(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), 4, 32)
    four, eight, rounding = error(quantizing.twin(made[4])), error(quantizing.twin(made[8])), error(nearest)
    assert eight < four / 50
    assert four < 0.8 * rounding, (four, rounding)


def test_the_same_command_makes_the_same_weights(made, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is left where it is started
    run_gptq.main(arguments(source, tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made[4] / "model.safetensors").read_bytes()
    err = capsys.readouterr().err
    assert "note: calibration: " in err and "136 given, 64 taken (seed 42)" in err
    for line in ("perplexity on answers of the calibration: ", "the same likeliest token at ", " loads by itself"):
        assert line in err
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_q_lora_trains_over_it(made, tokenizer):
    assert model_folder.problems(made[4], may_be_quantized=True) == []
    assert quantized_model.run_problems(made[4], LoraArguments(use_lora=True, q_lora=True)) == []
    losses = quantized_steps.one_process(quantized_steps.load(made[4], tokenizer))
    assert losses[-1] < losses[0]


# ---- other models and settings


VARIANTS = {
    "qwen2, tied": (["--sym", "false"], 1),
    "qwen3": (["--desc_act"], 1),
    "3 bits, shards": (["--bits", "3", "--sym", "false", "--group_size", "16", "--max_shard_size", "5MB"], 3),
    "2 bits, .bin": (["--bits", "2", "--group_size", "-1"], 1),
    "qwen2, tied, .bin": (["--bits", "8"], 1),
    "8 bits, one group": (["--bits", "8", "--group_size", "-1", "--desc_act"], 1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tmp_path, variant, capsys):
    qwen_model.register()
    flags, files = VARIANTS[variant]
    if variant.startswith("qwen"):
        folder = tiny_later_qwen(tmp_path / "model", variant[:5], tied="tied" in variant)
    else:
        folder = model_to_quantize(tmp_path / "model")
    if "bin" in variant:
        quantizing.as_bin(folder)
    run_gptq.main(arguments(folder, tmp_path / "out", *flags, samples=8))
    assert "use 64-512 samples; 8 taken" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == files
    same_logits_as_plain_weights(tmp_path / "out")
    assert not list((tmp_path / "model").glob("was_run")) and not (tmp_path / "out" / "source").exists()


def test_a_merge_may_quantize_what_it_has_just_written(source, tmp_path):
    """The 16-bit model lies in the same folder, and loads only as long as this process lives."""
    drawn = calibration.draw(reading.read(quantizing.DATA), loading.load_tokenizer(source), 4, 0, 64)
    with new_folder(tmp_path / "out") as staging:
        shutil.copytree(source, staging / "merged")
        hide_config_until_done(staging / "merged")
        before, after = pipeline.quantize(
            staging / "merged", staging, drawn, Settings(bits=8, group_size=32), made_from={"merged": "x"}
        )
        shutil.rmtree(staging / "merged")
    assert 0 < after.same_greedy <= 1 and after.perplexity == pytest.approx(before.perplexity, rel=0.05)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["quantized"]["from"] == {"merged": "x"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


# ---- refusals


def refused(words, capsys) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        run_gptq.main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    "flags,lines",
    [
        (["--bits", "5"], ["--bits 5: the format holds 2, 3, 4 or 8 bits - give one of these"]),
        (
            ["--group-size", "128"],
            ["--group-size 128: does not divide the layers' input widths (32 and 96) - give 16 or 32 or -1 (one"],
        ),
        (["--group-size", "48"], ["--group-size 48: gptqmodel knows 16, 32, 64, 128, 256, 512, 1024, and -1 for"]),
        (["--samples", "0"], ["--samples 0: nothing to calibrate on - give 64 to 512"]),
        (["--max_len", "8"], ["--max_len 8: no room for a conversation - give at least 16 tokens"]),
        (["--damp_percent", "1"], ["--damp_percent 1.0: out of range - give a value between 0 and 1"]),
        (["--max_shard_size", "2"], ['--max_shard_size: "2" is no size - give for example 2GB, 500MB, 4GiB']),
        (["--max_shard_size", "2", "--bits", "5", "-d", "no.json"], ["--max_shard_size: ", "--bits 5: ", "--data_path no.json"]),
        (["--data_path", "nowhere.json"], ["--data_path nowhere.json: no such file. Give an existing one with --data_path."]),
        (["--bits", "7", "--samples", "-1"], ["--bits 7: ", "--samples -1: "]),
    ],
)
def test_numbers_and_files_are_refused(source, tmp_path, capsys, flags, lines):
    found = refused(arguments(source, tmp_path / "out", *flags), capsys)
    assert len(found) == len(lines), found
    assert all(line.startswith(f"error: {start}") for line, start in zip(found, lines)), found
    assert not list(tmp_path.iterdir())


def test_a_stripped_folder_opens_only_while_the_process_lives(source, tmp_path, monkeypatch):
    """Its config is held back before anything lies there that it would open."""
    from finetune.gptq import gptq_run

    seen = []

    def look(place):
        seen.append(sorted(path.name for path in place.iterdir()))
        hide_config_until_done(place)

    monkeypatch.setattr(gptq_run, "hide_config_until_done", look)
    gptq_run.stripped(source, tmp_path / "source", {})
    assert seen == [["config.json"]] and (tmp_path / "source" / "config.json").is_symlink()
    assert "auto_map" not in json.loads((tmp_path / "source" / "config.json").read_text())


def test_models_are_refused(source, made, tmp_path, capsys, monkeypatch):
    (tmp_path / "my adapter").mkdir()
    (tmp_path / "my adapter" / "adapter_config.json").write_text("{}")
    [line] = refused(arguments(tmp_path / "my adapter", tmp_path / "out"), capsys)
    way_out = f"merge first: python -m finetune.merge '{tmp_path}/my adapter' MERGED"
    assert line == f"error: {tmp_path}/my adapter: holds a LoRA adapter - {way_out}"
    [line] = refused(arguments(made[4], tmp_path / "out"), capsys)
    assert line.endswith("is already quantized (GPTQ Int4) - give the 16-bit model that it was made from (Tiny)")
    [line] = refused(arguments(tiny_gptq(tmp_path / "other", 8), tmp_path / "out"), capsys)
    assert line.endswith("is already quantized (GPTQ Int8) - give the 16-bit model that it was made from")
    [line] = refused(arguments(source, source / "out"), capsys)
    assert line.endswith("which is read - give a new folder for the quantized model")
    [line] = refused(arguments(source, made[4]), capsys)
    assert line.endswith("exists and is not empty - give a new folder for the quantized model")
    monkeypatch.setattr(quantized_model, "installed", lambda package: False)
    [line] = refused(arguments(source, tmp_path / "out"), capsys)
    assert line == "error: GPTQ Int4 needs gptqmodel and optimum, not installed here - pip install gptqmodel optimum"
    assert not (tmp_path / "out").exists()


def test_a_later_qwen_too_narrow_for_three_bits_is_refused(tmp_path, capsys):
    folder = tiny_later_qwen(tmp_path / "model")
    capsys.readouterr()  # transformers' bar
    [line] = refused(arguments(folder, tmp_path / "out", "--bits", 3), capsys)
    assert line == "error: --bits 3: widths of 16 do not fill whole 32-bit words - give --bits 2 or 4 or 8"


def test_what_was_not_written_as_made_is_no_folder(source, tmp_path, monkeypatch):
    add = shards.ShardWriter.add

    def spoil(self, name, tensor):
        add(self, name, tensor + 1 if name.endswith("mlp.w1.scales") else tensor)

    monkeypatch.setattr(shards.ShardWriter, "add", spoil)
    with pytest.raises(SystemExit):
        run_gptq.main(arguments(source, tmp_path / "out", samples=4))
    assert not list(tmp_path.iterdir())


# ---- other processes


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_fresh_python_loads_it_with_its_own_code(made, tmp_path, bits):
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder, out = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "assert not {'finetune', 'qwen_model'} & set(sys.modules)\n"
        "ids = torch.tensor([tokenizer('Who are you?').input_ids])\n"
        "torch.save(model(ids).logits.detach(), out)\n"
    )
    words = [warm.python(), "-c", program, made[bits], tmp_path / "logits"]
    subprocess.run([str(word) for word in words], cwd=tmp_path, env=environment(), check=True, capture_output=True)
    ids = torch.tensor([AutoTokenizer.from_pretrained(made[bits])("Who are you?").input_ids])
    with torch.no_grad():
        expected = quantizing.twin(made[bits])(ids).logits
    tolerance = 0.03 if bits == 4 else 0.005
    torch.testing.assert_close(
        torch.load(tmp_path / "logits"), expected, atol=tolerance * expected.abs().max().item(), rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["source/config.json", "layers/*", "part-0.safetensors", "model-*.safetensors"])
def test_killed_it_leaves_nothing_that_loads(source, tmp_path, stage):
    """Each time some moments after a stage has begun."""
    flags = arguments(source, tmp_path / "out", "--max_shard_size", "500KB")
    words = [warm.python(), str(ROOT / "run_gptq.py"), *flags]
    running = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    staging, moments = tmp_path / "out.unfinished", random.Random(stage)
    deadline = time.monotonic() + 240
    while not list(staging.glob(stage)):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(moments.random() * (0.02 if "part" in stage else 0.5))
    running.send_signal(signal.SIGKILL)
    running.communicate()  # until nobody holds its output any more
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and staging.exists()
    for folder in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
