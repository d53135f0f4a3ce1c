"""Unpacks a GPTQ layer's weight with one Triton kernel: imported where a CUDA device is at work.

gptqmodel's own writes the weight in the precision of its scales, float16, looks up each number's word, zero point and scale
by itself, and leaves the cast to bfloat16 to a second pass over the weight. Here a word is read once for all numbers in it,
and what is written is what the matrix product reads.

Shapes: I input and O output features, G groups; the format is described in gptq_format.py. Zero points are as gptqmodel holds
them in memory: format "gptq_v2".
"""

import torch
import triton
import triton.language as tl

from qwen_model.on_triton import on

BITS = 2, 4, 8  # 3-bit numbers cross from word to word
BLOCK_O = 512


@triton.jit
def unpack_kernel(qweight, qzeros, scales, g_idx, out, I, O, ZERO_WORDS, BITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """One row of words, BLOCK_O columns of it: 32 / BITS rows of the weight. ZERO_WORDS: words in a row of qzeros."""
    PER_WORD: tl.constexpr = 32 // BITS
    LARGEST: tl.constexpr = 2**BITS - 1
    word_row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = column < O
    words = tl.load(qweight + word_row * O + column, mask=inside, other=0)
    for place in tl.static_range(PER_WORD):
        row = word_row * PER_WORD + place
        if row < I:
            group = tl.load(g_idx + row).to(tl.int64)
            scale = tl.load(scales + group * O + column, mask=inside, other=0.0)
            zeros = tl.load(qzeros + group * ZERO_WORDS + column // PER_WORD, mask=inside, other=0)
            zero = (zeros >> (column % PER_WORD * BITS)) & LARGEST
            steps = ((words >> (place * BITS)) & LARGEST) - zero
            value = (steps.to(tl.float32) * scale.to(tl.float32)).to(scale.dtype).to(tl.float32)
            tl.store(out + row * O + column, value.to(out.dtype.element_ty), mask=inside)


def unpack(qweight, qzeros, scales, g_idx, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (I, O) in `dtype`, rounded to the precision of its scales before. All tensors contiguous."""
    (I,), O = g_idx.shape, scales.shape[1]
    out = torch.empty(I, O, dtype=dtype, device=qweight.device)
    with on(qweight):
        grid = qweight.shape[0], triton.cdiv(O, BLOCK_O)
        unpack_kernel[grid](qweight, qzeros, scales, g_idx, out, I, O, qzeros.shape[1], BITS=bits, BLOCK_O=BLOCK_O)
    return out
