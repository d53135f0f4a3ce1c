"""Checkpoints for the tests of finetune.export."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_gptq

from finetune.export import __main__ as export
from qwen_model.new_checkpoint import new_checkpoint

TRAINED = 48  # tokens: the trained length


def lively_checkpoint(folder: Path, seed: int = 0, **config) -> Path:
    """A base model (20 MB) with the real vocabulary, no tensor of which is neutral. config: more of config.json."""
    new_checkpoint(folder, hidden_size=16, heads=2, layers=2, seed=seed, seq_length=TRAINED)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", **config)
    return folder


def published_gptq(folder: Path, bits: int, twin: Path | None = None) -> Path:
    """tiny_gptq in the published style, with biases of zero where the model has none, as in published folders."""
    tiny_gptq(folder, bits, twin=twin)
    for place in (folder, twin) if twin else (folder,):
        for file in place.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if name.endswith(".bias") and "c_attn" not in name:
                    tensor.zero_()
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def some_ids(length: int, seed: int = 0) -> torch.Tensor:
    """(1, length)"""
    return torch.randint(0, 151851, (1, length), generator=torch.Generator().manual_seed(seed))


def refused(capsys, *words) -> str:
    """The one error line of a command that is refused."""
    with pytest.raises(SystemExit) as stopped:
        export.main([str(word) for word in words])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]
