"""The programs behind the README's figures run, and the figures hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_cpu_step_is_six_times_as_fast_in_a_fifth_of_the_memory(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "cpu_step.py"),
        "--steps",
        "3",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "times as fast, in" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["plain"]["loss"] == pytest.approx(figures["ours"]["loss"], rel=1e-5)  # the same work was done
    assert figures["speed_ratio"] >= 6
    assert figures["memory_ratio"] <= 0.2


def test_memory_counts_the_bundled_model():
    """The arithmetic against the model itself, without weights; the README shows the program's own table."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import memory

    from qwen_model import QWenConfig, QWenLMHeadModel

    layers, hidden, intermediate, vocabulary = memory.SIZES["7B"]
    config = QWenConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=hidden // 128, kv_channels=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = QWenLMHeadModel(config)
    blocks, embeddings, adapters = memory.count("7B")
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    assert sum(matrices.values()) == blocks + embeddings
    assert sum(size for name, size in matrices.items() if "wte" in name or "lm_head" in name) == embeddings
    from peft import LoraConfig, get_peft_model

    from finetune.quiet import unquantized

    with torch.device("meta"), unquantized():
        adapted = get_peft_model(model, LoraConfig(r=64, target_modules=["c_attn", "c_proj", "w1", "w2"]))
    assert adapted.get_nb_trainable_parameters()[0] == adapters
    done = subprocess.run([sys.executable, "benchmarks/memory.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout in (ROOT / "README.md").read_text(encoding="utf-8")
