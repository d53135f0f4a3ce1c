"""A model that passes through memory: each part's weights are read when the pass comes to it, and dropped after it."""

from pathlib import Path

import torch
from torch import nn

from .shards import Shards


def streamed(shards: Shards, dtype: torch.dtype, device: torch.device):
    """The model of shards.folder, for passes without gradients; `shards` must stay open as long as it is used.

    Memory: one block, or the embedding, or the head.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(shards.folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, part in parts(model):
        stored = {own: f"{name}.{own}" for own, _ in part.named_parameters()}
        stored = {own: full if full in shards else tied[full] for own, full in stored.items()}
        let_through(part, stored, shards, dtype, device)
    move_buffers(model, device)
    return model


def parts(model) -> list[tuple[str, nn.Module]]:
    """Blocks, and what holds parameters outside of them."""
    blocks = [name for name, module in model.named_modules() if name.rpartition(".")[2].isdigit()]
    blocks = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    outside = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and not any(name.startswith(f"{block}.") for block in blocks)
    ]
    return [(name, model.get_submodule(name)) for name in (*blocks, *outside)]


def let_through(part: nn.Module, stored: dict[str, str], shards: Shards, dtype, device) -> None:
    """Hooks that bring the part's parameters before its pass, and drop them after it. stored: {own name: in shards}."""
    from accelerate.utils import set_module_tensor_to_device

    def bring(*_):
        for own, name in stored.items():
            set_module_tensor_to_device(part, own, device, value=shards[name], dtype=dtype)

    def drop(*_):
        for own in stored:
            set_module_tensor_to_device(part, own, "meta")

    part.register_forward_pre_hook(bring)
    part.register_forward_hook(drop)


def move_buffers(model, device) -> None:
    """The few values that are no parameters, such as rotary frequencies, stay."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
