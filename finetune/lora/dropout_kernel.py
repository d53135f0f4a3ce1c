"""Dropout's Triton kernel: imported where a CUDA device is at work.

One call of Philox (Salmon et al., 2011) gives 128 bits, thus the masks of eight elements: a program takes eight stretches of
BLOCK elements, so that reads and writes stay in one piece. With one call for each element, drawing would cost more than memory.
"""

import torch
import triton
import triton.language as tl

from qwen_model.on_triton import on

BLOCK = 512


@triton.jit
def apply(x, out, at, bits, count, dropped, ADD: tl.constexpr):
    """One stretch of elements, with 16 random bits each; drop_kernel calls it eight times."""
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0)  # dropped ones too: a mask of its own would break up the reads
    value = tl.where(bits >= dropped, value, 0.0)
    if ADD:
        value = value.to(tl.float32) + tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, value, mask=inside)


@triton.jit(do_not_specialize=["dropped", "seed"])  # see fused_kernels.py
def drop_kernel(x, out, count, dropped, seed, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """out = x where its 16 bits are at least `dropped`, else 0; with ADD that is added to out. count: elements."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    counter = program * BLOCK + lane
    first = program * (8 * BLOCK) + lane
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, high, low * 0, low * 0)
    apply(x, out, first, r0 & 0xFFFF, count, dropped, ADD)
    apply(x, out, first + BLOCK, r0 >> 16, count, dropped, ADD)
    apply(x, out, first + 2 * BLOCK, r1 & 0xFFFF, count, dropped, ADD)
    apply(x, out, first + 3 * BLOCK, r1 >> 16, count, dropped, ADD)
    apply(x, out, first + 4 * BLOCK, r2 & 0xFFFF, count, dropped, ADD)
    apply(x, out, first + 5 * BLOCK, r2 >> 16, count, dropped, ADD)
    apply(x, out, first + 6 * BLOCK, r3 & 0xFFFF, count, dropped, ADD)
    apply(x, out, first + 7 * BLOCK, r3 >> 16, count, dropped, ADD)


def drop_on_gpu(x: torch.Tensor, dropped: int, seed: int, out: torch.Tensor, add: bool = False) -> torch.Tensor:
    """See dropout.drop. x, out: contiguous, of the same shape; dropped: of 65536 values, how many drop."""
    programs = triton.cdiv(x.numel(), 8 * BLOCK)
    if programs:
        with on(x):
            drop_kernel[(programs,)](x, out, x.numel(), dropped, seed, BLOCK=BLOCK, ADD=add)
    return out
