"""Tiny models for the tests, made from a seed."""

from pathlib import Path

import torch

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.new_checkpoint import new_checkpoint


def tiny_config(**changes) -> QWenConfig:
    """Two layers, hidden size 32, two heads, vocabulary 160, trained length 64, NTK and LogN on."""
    sizes = {
        "vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 16,
        "intermediate_size": 96, "seq_length": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    return QWenConfig(**(sizes | changes))


def tiny_model(seed: int = 0, attn_implementation: str = "sdpa", **changes) -> QWenLMHeadModel:
    """A float32 model whose biases and norms are not at their neutral values, so that forgetting one shows."""
    torch.manual_seed(seed)
    model = QWenLMHeadModel._from_config(tiny_config(**changes), attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def packed(samples: list[list[int]], labels: list[list[int]]) -> dict:
    """One packed row in the trainer's form, derived here by hand: positions that are kept are those before a label."""
    keep, shift_labels, at = [], [], 0
    for sample_labels in labels:
        for i, label in enumerate(sample_labels[1:]):
            if label != -100:
                keep.append(at + i)
                shift_labels.append(label)
        at += len(sample_labels)
    bounds = torch.tensor([0] + [len(sample) for sample in samples]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.tensor([sum(samples, [])]),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(map(len, samples)),
        "max_length_k": max(map(len, samples)),
        "logits_to_keep": torch.tensor(keep, dtype=torch.long),
        "shift_labels": torch.tensor([shift_labels], dtype=torch.long),
    }


def random_samples(count: int, vocab_size: int = 160, seed: int = 0, longest: int = 40) -> tuple[list, list]:
    """(ids, labels) of random samples; about half of the labels are -100, at least one is not."""
    generator = torch.Generator().manual_seed(seed)
    samples, labels = [], []
    for _ in range(count):
        length = int(torch.randint(5, longest, (), generator=generator))
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        mask = torch.rand(length, generator=generator) < 0.5
        mask[-1] = True
        samples.append(ids)
        labels.append([label if keep else -100 for label, keep in zip(ids, mask)])
    return samples, labels


def small_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A base checkpoint on disk in the published format: two layers, hidden size 16, the real vocabulary (20 MB)."""
    new_checkpoint(folder, hidden_size=16, heads=2, layers=2, seed=seed)
    return folder
