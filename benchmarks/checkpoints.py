"""Checkpoints of a published size with random weights: what a benchmark needs of a model, without a download."""

import json
import shutil
from pathlib import Path

import torch
from cells import SIZES
from safetensors.torch import save_file

from finetune.folders.gptq_format import PARTS
from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.new_checkpoint import AUTO_MAP, GENERATION, TOKENIZER
from qwen_model.vocabulary import find_vocabulary

STD = 0.02
BITS = 4


def config_of(size: str) -> QWenConfig:
    layers, hidden, intermediate, vocabulary = SIZES[size]
    head = 32 if size == "tiny" else 128
    return QWenConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // head,
        kv_channels=head, intermediate_size=intermediate, seq_length=8192, max_position_embeddings=8192, bf16=True,
        emb_dropout_prob=0.0, attn_dropout_prob=0.0, architectures=["QWenLMHeadModel"], auto_map=AUTO_MAP,
    )  # fmt: skip


def random_checkpoint(out: Path, size: str, stored: str) -> Path:
    """Writes a checkpoint, a shard a block, unless it is there. stored: "plain" (bf16), or "gptq" (Int4, format v1)."""
    done = out / "config.json"
    if done.is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    config = config_of(size)
    group = 16 if size == "tiny" else 128
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in QWenLMHeadModel(config).named_parameters()}
    generator, index = torch.Generator(device()).manual_seed(0), {}
    for number, (_, names) in enumerate(sorted(by_block(shapes).items())):
        tensors = {}
        for name in names:
            tensors |= tensors_of(name, shapes[name], stored, group, generator)
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (out / "generation_config.json").write_text(json.dumps(GENERATION))
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    shutil.copyfile(find_vocabulary(), out / "qwen.tiktoken")
    settings = json.loads(config.to_json_string())
    if stored == "gptq":
        settings["quantization_config"] = {
            "quant_method": "gptq", "bits": BITS, "group_size": group, "sym": True, "desc_act": False, "damp_percent": 0.01,
        }  # fmt: skip
    done.write_text(json.dumps(settings))  # last: the folder is whole from here on
    return out


def device() -> str:
    """Where random numbers are drawn fastest."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def by_block(names) -> dict[str, list[str]]:
    """The names of each block, and of what stands outside of the blocks."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        found.setdefault(parts[2].zfill(4) if parts[1] == "h" else "", []).append(name)
    return found


def tensors_of(name: str, shape, stored: str, group: int, generator) -> dict[str, torch.Tensor]:
    """A parameter's tensors as they are stored."""
    if stored == "gptq" and len(shape) == 2 and ".h." in name:
        parts = packed(*shape, group, generator)
        return {name.removesuffix("weight") + part: tensor.cpu() for part, tensor in zip(PARTS, parts)}
    if "ln_" in name:
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16) * STD
    return {name: values.cpu()}


def packed(out: int, inner: int, group: int, generator):
    """qweight, qzeros, scales, g_idx of an Int4 layer whose weights have the usual spread: zero points of 8, stored as 7."""
    place = {"device": generator.device}
    words = torch.randint(-(2**31), 2**31, (inner * BITS // 32, out), generator=generator, dtype=torch.int32, **place)
    zeros = torch.full((inner // group, out * BITS // 32), 0x77777777, dtype=torch.int32, **place)
    scales = torch.full((inner // group, out), STD / 4.6, dtype=torch.float16, **place)  # 4.6: the spread of 0 to 15
    return words, zeros, scales, torch.arange(inner, dtype=torch.int32, **place) // group
