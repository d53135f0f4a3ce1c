"""For the tests of run_gptq.py: models to quantize, and GPTQ's format read by hand."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny import GPTQ_LAYERS

from finetune.folders import shards
from qwen_model.new_checkpoint import new_checkpoint

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data" / "conversations.json"
LAYERS = (*GPTQ_LAYERS, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_to_quantize(folder: Path, seed: int = 0) -> Path:
    """As tiny.small_checkpoint, widths 32 and 96, with blocks that weigh enough for quantizing to show.

    Its code leaves a file was_run when it is run.
    """
    new_checkpoint(folder, hidden_size=32, heads=2, layers=2, seed=seed)
    torch.manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".h." in name:
            tensor.add_(torch.randn_like(tensor) * (0.2 if tensor.ndim == 2 else 0.05))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen"):
        (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'was_run')!r}).touch()\n")
    return folder


def as_bin(folder: Path) -> Path:
    """Its weights as older folders have them: of a tied pair, both names."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    path.unlink()
    return folder


def arguments(source: Path, out: Path, *more, samples: int = 64) -> list[str]:
    """A command line for widths that 32 divides."""
    usual = ["--model_name_or_path", source, "--data_path", DATA, "--out_path", out, "--group-size", 32]
    return [str(word) for word in [*usual, "--samples", samples, *more]]


def numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(W, M) int32 -> (W * 32 / bits, M): each column's bits in their order, numpy's way."""
    columns = words.T.contiguous().numpy().view(np.uint8)
    stream = np.unpackbits(columns, axis=1, bitorder="little").reshape(len(columns), -1, bits)
    return torch.from_numpy((stream * 2 ** np.arange(bits)).sum(-1)).T


def dequantized(tensors: dict, bits: int) -> dict[str, torch.Tensor]:
    """The plain float32 tensors that a v1 folder's stand for."""
    plain = {name: tensor.float() for name, tensor in tensors.items() if tensor.dtype == torch.float16}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        groups, scales = tensors[f"{name}.g_idx"].long(), plain.pop(f"{name}.scales")
        zeros = numbers(tensors[f"{name}.qzeros"].T.contiguous(), bits).T + 1
        weight = (numbers(tensors[f"{name}.qweight"], bits) - zeros[groups]) * scales[groups]
        plain[f"{name}.weight"] = weight.T.float().contiguous()
    return plain


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return dict(shards.read_tensors(folder))


def twin(folder: Path):
    """The quantized folder's model with plain weights, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    bits = config.quantization_config["bits"]
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = model.load_state_dict(dequantized(stored(folder), bits), strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= set(model.all_tied_weights_keys)
    return model.eval()


def rounded(model, bits: int, group: int):
    """The model with each block's matrices rounded to nearest, symmetric, in place; returns it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight").endswith(LAYERS) and parameter.ndim == 2:
                rows = parameter.unflatten(1, (-1, group))
                scale = rows.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)
                half = 2 ** (bits - 1)
                parameter.copy_(((rows / scale).round().clamp(-half, half - 1) * scale).flatten(1))
    return model


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
