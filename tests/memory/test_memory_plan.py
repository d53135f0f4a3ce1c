"""What auto decides, for a 7B model on cards of several sizes."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_memory_model import QWEN_7B

from finetune.flags import args as arguments
from finetune.memory import memory_plan, ways_to_fit
from finetune.memory.memory_model import Run, Sizes, estimate
from qwen_model import on_triton


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B), encoding="utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(on_triton, "refusal", lambda device: "")


def decided(folder, *flags, free_gb: float, longest=512, step_tokens=30_000, on_gpu=True):
    """(estimate, max_tokens_per_pass, blocks computed again, transformers' flag)"""
    args = arguments.parse(["--use_lora", "--bf16", *flags])
    if on_gpu:
        args.training.__dict__["_setup_devices"] = torch.device("cuda", 0)  # a cached property
    found = memory_plan.resolve_auto(args, folder, longest, step_tokens, free_gb * 1e9)
    training = args.training
    return found, args.data.max_tokens_per_pass, training.recomputed_blocks, training.gradient_checkpointing


def test_plenty_of_memory_means_large_passes_and_nothing_twice(folder):
    found, tokens, again, flag = decided(folder, free_gb=140)
    assert (tokens, again, flag) == (16384, 0, False) and found.tokens == 16384
    assert decided(folder, free_gb=140, step_tokens=5000)[1] == 5120  # no larger than a step


def test_as_few_blocks_are_computed_again_as_a_useful_pass_needs(folder):
    found, tokens, again, flag = decided(folder, free_gb=32)
    assert 0 < again < 32 and flag is True and found.peak <= 32e9 * ways_to_fit.USED
    sizes, run = Sizes.of(QWEN_7B), Run(rank=64)
    assert estimate(sizes, run, memory_plan.USEFUL, again - 1).peak > 32e9 * ways_to_fit.USED
    assert memory_plan.USEFUL <= tokens == found.tokens


def test_what_the_user_gives_is_kept(folder):
    found, tokens, again, flag = decided(folder, "--max_tokens_per_pass", "700", free_gb=140)
    assert (tokens, again, flag, found.tokens) == (700, 0, False, 700)
    found, tokens, again, flag = decided(folder, "--gradient_checkpointing", "True", free_gb=140)
    assert (tokens, again, flag, found.recomputed) == (16384, None, True, 32)
    found, tokens, again, flag = decided(folder, "--gradient_checkpointing", "False", free_gb=32)
    assert (again, flag, found.recomputed) == (None, False, 0) and 512 <= tokens < 4096 and found.peak < 32e9


def test_a_long_sample_needs_room_whatever_the_limit(folder):
    found, tokens, again, _ = decided(folder, "--max_tokens_per_pass", "700", free_gb=60, longest=20_000)
    assert tokens == 700 and found.tokens == 20_000 and again > 0


def test_too_little_memory_is_said_with_what_would_help(folder, capsys):
    found, tokens, again, flag = decided(folder, free_gb=12)
    assert (tokens, again, flag) == (512, 32, True)
    said = capsys.readouterr().err
    assert said.startswith("warning: this run needs about 18.8 GB") and "12.0 GB are free" in said
    assert said.endswith("it will hardly fit - give --q_lora --quant nf4 (9.3 GB)\n")  # fewer tokens would not do
    _, _, again, _ = decided(folder, "--q_lora", "--quant", "nf4", free_gb=12)
    assert 0 < again <= 32 and capsys.readouterr().err == ""


def test_quantized_weights_take_what_they_take():
    lora = SimpleNamespace(quant="none")
    assert memory_plan.packed_bytes(lora, QWEN_7B) is None
    config = QWEN_7B | {"quantization_config": {"bits": 4, "group_size": 128}}
    assert memory_plan.packed_bytes(lora, config) == 0.5 + 4 / 128
    config["quantization_config"] = {"bits": 8, "group_size": -1}
    assert memory_plan.packed_bytes(lora, config) == 1
    assert memory_plan.packed_bytes(SimpleNamespace(quant="nf4"), QWEN_7B) == pytest.approx(0.516, abs=1e-3)


def test_on_the_cpu_passes_are_as_they_were(folder):
    _, tokens, again, _ = decided(folder, free_gb=200, on_gpu=False)
    assert (tokens, again) == (8192, 0)


def test_a_note_where_the_measured_peak_is_another(capsys):
    found = estimate(Sizes.of(QWEN_7B), Run(rank=64), 4096)
    memory_plan.compare(found, found.peak * 1.1)
    assert capsys.readouterr().err == ""
    memory_plan.compare(found, found.peak * 0.5)
    assert "GB at the peak, where" in capsys.readouterr().err


def test_a_gpu_without_our_kernels_takes_more(folder, monkeypatch):
    fast, *_ = decided(folder, "--max_tokens_per_pass", "2048", free_gb=140)
    monkeypatch.setattr(on_triton, "refusal", lambda device: "they need an Ampere GPU (sm_80) or newer")
    slow, *_ = decided(folder, "--max_tokens_per_pass", "2048", free_gb=140)
    rows = 2**26 // QWEN_7B["vocab_size"]
    assert slow.peak - fast.peak > rows * QWEN_7B["vocab_size"] * 6
