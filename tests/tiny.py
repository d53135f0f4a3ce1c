"""Tiny models for the tests, made from a seed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.new_checkpoint import new_checkpoint

# what goes along with a model of first-generation Qwen, whoever writes it
SAVED_CODE = {
    "attention.py", "chatml.py", "compat.py", "configuration_qwen.py", "forward_checks.py", "fused.py", "fused_kernels.py", "generation_qwen.py",
    "head_loss.py", "head_loss_kernels.py", "kv_cache.py", "kv_cache_kernels.py", "modeling_qwen.py", "on_triton.py", "positions.py",
    "react.py", "react_text.py", "tokenization_qwen.py", "versions.py",
}  # fmt: skip


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


def wide_checkpoint(folder: Path, seed: int = 0) -> Path:
    """As small_checkpoint, with hidden size 64, of which NF4 can quantize all layers but the MLP's last (80 MB)."""
    new_checkpoint(folder, hidden_size=64, heads=2, layers=2, seed=seed)
    return folder


# ---- quantized checkpoints, packed here by hand: an independent derivation of the format


GPTQ_LAYERS = ("c_attn", "c_proj", "w1", "w2")
GROUP = 32  # input rows that share a scale


def tiny_gptq(
    folder: Path, bits: int = 4, *, published_style: bool = True, twin: Path | None = None, seed: int = 0
) -> Path:
    """A whole GPTQ checkpoint (v1 format, rounded to nearest): two layers, hidden size 32, the real vocabulary.

    published_style: two shards, fp16, a bias on every quantized layer (not zero, so that losing one shows), and a
    quantize_config.json beside config.json. Else one file, and biases where the model has them.
    twin: also writes there, in float32, the plain checkpoint whose weights are the dequantized ones.
    """
    new_checkpoint(folder, hidden_size=32, heads=2, layers=2, seed=seed)
    plain = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    quantized, dequantized = {}, {}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(GPTQ_LAYERS) and layer != name:
            tensors, dequantized[name] = gptq(tensor.float(), bits, generator)
            quantized |= {f"{layer}.{key}": value for key, value in tensors.items()}
            if published_style:
                bias = (torch.randn(len(tensor), generator=generator) * 0.1).half()
                quantized[f"{layer}.bias"] = dequantized[f"{layer}.bias"] = bias
        elif not (published_style and layer.removesuffix(".bias").endswith(GPTQ_LAYERS)):
            quantized[name] = dequantized[name] = tensor
    settings = {"bits": bits, "group_size": GROUP, "desc_act": False, "sym": True, "damp_percent": 0.01}
    settings |= {
        "true_sequential": True,
        "static_groups": False,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    config = json.loads((folder / "config.json").read_text()) | {"fp16": True, "fp32": False, "torch_dtype": "float16"}
    config.pop("dtype", None)
    if twin:
        shutil.copytree(folder, twin)
        save_file(
            {name: tensor.float() for name, tensor in dequantized.items()}, twin / "model.safetensors", {"format": "pt"}
        )
        (twin / "config.json").write_text(
            json.dumps(config | {"no_bias": not published_style, "torch_dtype": "float32"})
        )
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"} | settings})
    )
    if published_style:
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    save_shards(quantized, folder, 2 if published_style else 1)
    return folder


def gptq(weight: torch.Tensor, bits: int, generator) -> tuple[dict, torch.Tensor]:
    """({qweight, qzeros, scales, g_idx} of a (out, in) matrix, in GPTQ's v1 format; the matrix that they stand for)."""
    rows = weight.T.unflatten(0, (-1, GROUP))  # (groups, GROUP, out)
    half = 2 ** (bits - 1)
    zeros = half + torch.randint(
        -(half // 4), half // 4 + 1, rows.shape[::2], generator=generator
    )  # off centre: a lost zero point shows
    scales = (rows.abs().amax(1) / (half * 0.75)).half()
    codes = ((rows / scales[:, None].float()).round() + zeros[:, None]).clamp(0, 2**bits - 1).long()
    tensors = {
        "qweight": pack(codes.flatten(0, 1), bits),
        "qzeros": pack((zeros - 1).T, bits).T.contiguous(),  # v1 stores the zero point less one
        "scales": scales,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, ((codes - zeros[:, None]) * scales[:, None].float()).flatten(0, 1).T.contiguous()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(N, M) numbers below 2^bits -> (N * bits / 32, M) int32: down each column, one stream of bits, lowest first."""
    stream = codes[:, None] >> torch.arange(bits)[:, None] & 1
    words = stream.reshape(-1, 32, codes.shape[1]) << torch.arange(32)[:, None]
    return words.sum(1).to(torch.int32)


def save_shards(tensors: dict, folder: Path, count: int) -> None:
    """model.safetensors, or `count` shards with their index."""
    if count == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        shard = {name: tensors[name] for name in names[i::count]}
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- later Qwens


def later_config(kind: str = "qwen2", tied: bool = False, **changes):
    """The config of a later Qwen ("qwen2" or "qwen3"): two layers, hidden size 32, 4 heads on 2 of keys, vocabulary 400."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 512, "tie_word_embeddings": tied,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **(sizes | changes))


def later_model(kind: str = "qwen2", tied: bool = False, seed: int = 0, **changes):
    """transformers' own model as it made it, in float32; biases and norms are not at their neutral values."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(later_config(kind, tied, **changes), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tiny_later_qwen(folder: Path, kind: str = "qwen2", tied: bool = False, base: bool = False, seed: int = 0) -> Path:
    """A whole checkpoint of a later Qwen: weights, config, tokenizer, and a generation_config of a chat or a base model."""
    from chat_templates import later_tokenizer
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    later_model(kind, tied, seed).save_pretrained(folder)
    tokenizer = later_tokenizer(folder, kind, base)
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    settings = {"eos_token_id": text_end} if base else {"eos_token_id": [end, text_end], "pad_token_id": text_end}
    GenerationConfig(**settings).save_pretrained(folder)
    return folder


def tiny_qwen2(tied: bool = True):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)
