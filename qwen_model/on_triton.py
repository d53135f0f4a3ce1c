"""Triton, where it is installed. Files with kernels travel with every saved model, and must import without it, too."""

import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(kernel):
    """triton.jit, or nothing where triton is missing."""
    return triton.jit(kernel) if triton else kernel


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why kernels cannot run on tensors of this device, "" if they can."""
    if device.type != "cuda":
        return "no CUDA device"
    if triton is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "they need an Ampere GPU (sm_80) or newer"
    return ""
