"""Dropout that stores no mask: the backward pass draws it again from its seed.

torch's own keeps a byte an element, and under LoRA that is as much for the adapters as for half of the activations. A mask
here is 16 random bits an element: dropped where they fall below p, to 1/65536; the scale goes by the share that really is
kept, so that the expectation holds exactly. Triton's kernel draws and applies it in one go on CUDA; elsewhere torch's
generator draws. Masks of the same seed are the same on the same device, and of the two ways not.
"""

import torch

from qwen_model.on_triton import why_no_triton

STEPS = 1 << 16


def draw_seed() -> int:
    """A seed from torch's CPU generator, which gradient checkpointing rewinds: recomputing draws the same one."""
    return int(torch.randint(1 << 31, ()))


def threshold(p: float) -> int:
    """Of 65536 equally likely values, how many drop; at least one is left to keep."""
    return min(round(p * STEPS), STEPS - 1)


def scale_of(p: float) -> float:
    """The factor on the elements that are kept, so that the expectation stays the same."""
    return STEPS / (STEPS - threshold(p))


def drop(x: torch.Tensor, p: float, seed: int, out: torch.Tensor | None = None, add: bool = False) -> torch.Tensor:
    """x with a share p of its elements at 0, the others as they are: scale_of(p) is the caller's, on a smaller tensor.

    out: a tensor to write to, x itself possibly; with `add`, to add to.
    """
    if has_kernel(x):
        from .dropout_kernel import drop_on_gpu

        assert out is None or out.is_contiguous()

        return drop_on_gpu(x, threshold(p), seed, torch.empty_like(x) if out is None else out, add)
    kept = keep_mask(x.shape, p, seed, x.device)
    if add:
        return out.add_(torch.where(kept, x, x.new_zeros(())))
    return torch.where(kept, x, x.new_zeros(()), **({} if out is None else {"out": out}))


def has_kernel(x: torch.Tensor) -> bool:
    """Whether Triton's kernel does it."""
    return x.is_contiguous() and not why_no_triton(x.device, "dropout")


def keep_mask(shape, p: float, seed: int, device) -> torch.Tensor:
    """bool: True where an element is kept."""
    count = 1
    for size in shape:
        count *= size
    # four masks a draw: drawing is what costs
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    bits.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    return (bits.view(torch.int16)[:count] >= threshold(p) - STEPS // 2).view(shape)
