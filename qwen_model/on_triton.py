"""Triton, where it is installed. Files with kernels travel with every saved model, and must import without it, too."""

import contextlib
import functools

import torch
from transformers.utils import logging

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

logger = logging.get_logger(__name__)


def jit(kernel=None, **settings):
    """triton.jit, with or without settings, or nothing where triton is missing."""
    if triton:
        return triton.jit(kernel, **settings)
    return kernel or (lambda kernel: kernel)


def on(x: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's: a model may be spread over several."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@jit
def trial_kernel(out):
    """One number, for `why_no_triton`."""
    tl.store(out, 1.0)


def failure(device: torch.device) -> str:
    """Why a kernel cannot be built or launched on this device, "" if it can."""
    try:
        out = torch.zeros(1, device=device)
        with on(out):
            trial_kernel[(1,)](out)
        return "" if out.item() == 1.0 else "a kernel's result is wrong"
    except Exception as error:  # no C compiler, no Python headers, a GPU that this triton does not know
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def refusal(device: torch.device) -> str:
    """Why kernels cannot run there, from what can be read; "" if nothing speaks against it."""
    if device.type != "cuda":
        return "no CUDA device"
    if triton is None:
        return "triton is not installed"
    return "" if torch.cuda.get_device_capability(device)[0] >= 8 else "they need an Ampere GPU (sm_80) or newer"


@functools.cache
def obstacle_found(device: torch.device) -> str:
    """As why_no_triton(). Triton compiles with what the machine has: one kernel is tried."""
    if why := refusal(device):
        return why
    if why := failure(device):
        logger.warning(f"plain torch instead of the kernels: triton does not work here ({why})")
        return f"triton does not work here: {why}"
    return ""


# kernels that plain torch stands in for in this process, and why: the one switch, which every facade asks through why_no_triton()
switched_off: dict[str, str] = {}


@contextlib.contextmanager
def without(kernel: str):
    """A context in which plain torch stands in for one kernel."""
    before = switched_off.get(kernel)
    switched_off[kernel] = "plain torch is asked for"
    try:
        yield
    finally:
        del switched_off[kernel]
        if before is not None:
            switched_off[kernel] = before


def why_no_triton(device: torch.device, kernel: str = "") -> str:
    """Why kernels, or the one of that name, cannot run on tensors of this device, "" if they can."""
    if kernel in switched_off:
        return switched_off[kernel]
    if torch.compiler.is_compiling():  # which has a compiler, and must trace neither the trial nor a cache
        return refusal(device)
    return obstacle_found(device)
