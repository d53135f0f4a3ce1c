"""Layer-by-layer inference: a block's weights are loaded from disk for its forward pass, and dropped after it."""

import contextlib
import ctypes
import gc
from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import AutoModelForCausalLM


def streamed(config, weights: Callable, dtype=torch.float32, device="cpu", block_done: Callable = lambda: None):
    """The model of a config, for passes without gradients. weights(name): the tensor of a parameter, while it is used.

    Memory: one block, and what lies outside of them, embedding and head, which stays once it was read. block_done() is
    called after each block of each pass.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, part, stays in parts(model):
        names = {own: f"{name}.{own}" for own, _ in part.named_parameters()}
        names = {own: tied.get(full, full) for own, full in names.items()}
        done = None if stays else block_done
        attach_offload_hooks(part, lambda own, names=names: weights(names[own]), list(names), dtype, device, done)
    move_buffers(model, device)
    return model


def parts(model) -> list[tuple[str, nn.Module, bool]]:
    """(name, module, stays) of the blocks and of the other modules that hold parameters; the latter stay loaded."""
    blocks = [name for name, module in model.named_modules() if name.rpartition(".")[2].isdigit()]
    blocks = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    outside = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and not any(name.startswith(f"{block}.") for block in blocks)
    ]
    return [(name, model.get_submodule(name), name in outside) for name in (*blocks, *outside)]


def attach_offload_hooks(part: nn.Module, weight: Callable, own: list[str], dtype, device, done: Callable | None) -> None:
    """Adds hooks that load the module's own parameters before its forward pass and drop them after it, then call done().

    weight(name): the tensor of one of them. done: None for a part that is brought once and not dropped.
    """
    def bring(*_):
        for name in own:
            set_module_tensor_to_device(part, name, device, value=weight(name), dtype=dtype)
        if done is None:
            bringing.remove()

    def drop(*_):
        for name in own:
            set_module_tensor_to_device(part, name, "meta")
        done()

    bringing = part.register_forward_pre_hook(bring)
    if done is not None:
        part.register_forward_hook(drop)


def move_buffers(model, device) -> None:
    """Buffers, such as rotary frequencies, are few and stay loaded."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def release_memory() -> None:
    """Returns freed memory to the operating system: malloc would keep what large tensors took."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries than glibc have no such call
        ctypes.CDLL(None).malloc_trim(0)
