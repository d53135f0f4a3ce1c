"""The whole job on a GPU, each way once: finetune.py as users start it, a smaller loss after it, and what is done with the result."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_gptq, tiny_later_qwen

from qwen_model.new_checkpoint import new_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parent.parent
LORA = ("--use_lora", "--lora_r", 16, "--learning_rate", "2e-3")


def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


def python(*words, code: int = 0) -> str:
    """What a program prints, which must end with the exit code."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    printed = done.stdout + done.stderr
    assert done.returncode == code, printed[-6000:]
    return printed


def finetune(model: Path, out: Path, *flags, steps: int = 30) -> tuple[str, list[float]]:
    """(what was printed, the losses)"""
    usual = ["--model_name_or_path", model, "--data_path", ROOT / "data" / "example.json", "--output_dir", out]
    usual += ["--model_max_length", 512, "--per_device_train_batch_size", 8, "--max_steps", steps, "--logging_steps", 1]
    printed = python(ROOT / "finetune.py", *usual, "--save_strategy", "no", *flags)
    lines = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return printed, [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Four blocks with heads of 64 channels."""
    folder = tmp_path_factory.mktemp("base") / "base"
    new_checkpoint(folder, hidden_size=256, heads=4, layers=4)
    return folder


def test_lora_from_data_to_a_merged_model_that_answers(base, tmp_path):
    printed, losses = finetune(base, tmp_path / "adapter", *LORA, "--bf16", "--gradient_checkpointing", "True", steps=60)
    assert losses[-1] < 0.8 * losses[0], losses
    assert "torch's variable-length attention" in printed or "flash-attn 2" in printed, printed
    assert "Triton" in printed, printed
    python("-m", "finetune.merge", tmp_path / "adapter", tmp_path / "merged")
    for folder in ("adapter", "merged"):
        answer = python("-m", "finetune.ask", tmp_path / folder, "Who are you?", "--max_new_tokens", 20)
        assert "A: " in answer, answer


def test_a_run_goes_on_from_a_checkpoint(base, tmp_path):
    """Bit for bit it is on the CPU; on a GPU, attention adds up its gradients in no fixed order."""
    saving = (*LORA, "--bf16", "--save_strategy", "steps", "--save_steps", 10)
    _, whole = finetune(base, tmp_path / "whole", *saving, steps=20)
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / "again" / "checkpoint-10")
    printed, again = finetune(base, tmp_path / "again", *saving, "--resume_from_checkpoint", "auto", steps=20)
    assert len(whole) == 20 and again[-10:] == pytest.approx(whole[10:], rel=0.02), (whole, again)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again")]
    apart = max((x - adapters[1][name]).abs().max().item() for name, x in adapters[0].items())
    print(f"largest difference of a weight after resuming: {apart:.1e}")
    assert apart < 2e-3


def test_a_gradient_that_is_no_number_stops_the_run_before_a_save(base, tmp_path):
    """The norm is looked at a step late, but before a checkpoint is written."""
    words = ["--model_name_or_path", base, "--data_path", ROOT / "data" / "example.json", "--output_dir", tmp_path, "--bf16"]
    words += ["--model_max_length", 512, "--max_steps", 30, "--save_steps", 1, "--save_total_limit", 1, "--logging_steps", 100]
    printed = python(ROOT / "finetune.py", *words, "--learning_rate", "1e25", code=1)
    line = next(line for line in printed.splitlines() if "error: " in line)
    assert "is nan" in line or "is inf" in line or "not finite" in line, line
    assert "Traceback" not in printed
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_asked_to_stop_and_gone_on(base, tmp_path):
    words = ["--model_name_or_path", base, "--data_path", ROOT / "data" / "example.json", "--output_dir", tmp_path, "--bf16", *LORA]
    words += ["--model_max_length", 512, "--max_steps", 400, "--save_strategy", "no"]
    command = [sys.executable, str(ROOT / "finetune.py"), *map(str, words)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 200
    while not (tmp_path / "training_log.jsonl").is_file() and time.monotonic() < until:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    printed = run.communicate(timeout=100)[0]
    assert run.returncode == 75 and "self-tests passed" in printed, printed
    [checkpoint] = tmp_path.glob("checkpoint-*")
    printed = python(*command[1:], "--learning_rate", "1e-3", "--max_steps", 410, "--resume_from_checkpoint", "auto")
    assert f"continuing from {checkpoint}" in printed and "--learning_rate: 0.002, now 0.001" in printed, printed


@pytest.mark.parametrize(
    "flags",
    [
        ("--bf16", "--learning_rate", "1e-3"),
        ("--fp16", *LORA),
        ("--bf16", *LORA, "--train_embeddings", "all"),
        ("--bf16", *LORA, "--use_dora"),
        ("--learning_rate", "1e-3"),  # float32
        pytest.param(("--bf16", *LORA, "--q_lora", "--quant", "nf4"), marks=needs("bitsandbytes")),
        pytest.param(
            ("--bf16", "--bf16_weights", "--optim", "adamw_torch_8bit", "--learning_rate", "1e-3"), marks=needs("torchao")
        ),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_methods(base, tmp_path, flags):
    printed, losses = finetune(base, tmp_path / "out", *flags)
    assert losses[-1] < 0.9 * losses[0], losses
    assert "Triton" in printed, printed


@needs("gptqmodel", "optimum")
@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_lora_over_gptq(tmp_path, precision):
    tiny_gptq(tmp_path / "base")
    printed, losses = finetune(tmp_path / "base", tmp_path / "out", precision, *LORA, "--q_lora", "--learning_rate", "1e-2")
    assert losses[-1] < losses[0] - 0.3, losses


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_later_qwens(tmp_path, kind):
    tiny_later_qwen(tmp_path / "base", kind)
    printed, losses = finetune(tmp_path / "base", tmp_path / "out", "--bf16", *LORA, "--learning_rate", "1e-2")
    assert losses[-1] < losses[0] - 0.3, losses
    assert "torch's variable-length attention" in printed or "flash-attn 2" in printed, printed
    python("-m", "finetune.merge", tmp_path / "out", tmp_path / "merged")
