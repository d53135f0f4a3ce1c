"""A model that passes through memory: a block's weights are read when the pass comes to it, and dropped after it."""

import contextlib
import ctypes
import gc

import torch
from torch import nn

from .shards import Shards


def streamed(shards: Shards, dtype: torch.dtype, device: torch.device):
    """The model of shards.folder, for passes without gradients; `shards` must stay open as long as it is used.

    Memory: one block, and what lies outside of them, embedding and head, which stays once it was read.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(shards.folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, part, stays in parts(model):
        stored = {own: f"{name}.{own}" for own, _ in part.named_parameters()}
        stored = {own: full if full in shards else tied[full] for own, full in stored.items()}
        let_through(part, stored, stays, shards, dtype, device)
    move_buffers(model, device)
    return model


def parts(model) -> list[tuple[str, nn.Module, bool]]:
    """Blocks, and what holds parameters outside of them, by name; the latter stay."""
    blocks = [name for name, module in model.named_modules() if name.rpartition(".")[2].isdigit()]
    blocks = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    outside = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and not any(name.startswith(f"{block}.") for block in blocks)
    ]
    return [(name, model.get_submodule(name), name in outside) for name in (*blocks, *outside)]


def let_through(part: nn.Module, stored: dict[str, str], stays: bool, shards: Shards, dtype, device) -> None:
    """Hooks that bring the part's parameters before its pass, and drop them after it. stored: {own name: in shards}.

    stays: they are brought once and not dropped.
    """
    from accelerate.utils import set_module_tensor_to_device

    def bring(*_):
        for own, name in stored.items():
            set_module_tensor_to_device(part, own, device, value=shards[name], dtype=dtype)
        if stays:
            bringing.remove()

    def drop(*_):
        for own in stored:
            set_module_tensor_to_device(part, own, "meta")

    bringing = part.register_forward_pre_hook(bring)
    if not stays:
        part.register_forward_hook(drop)


def move_buffers(model, device) -> None:
    """The few values that are no parameters, such as rotary frequencies, stay."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def give_back() -> None:
    """Memory that was freed, to the system: large tensors among it, which malloc would keep."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries than glibc have no such call
        ctypes.CDLL(None).malloc_trim(0)
