"""GPTQ's checkpoint format (AutoGPTQ's, as published Int4 and Int8 folders have it), in plain torch.

A layer's weight (O, I) is stored as whole numbers q below 2^bits, with a scale and a zero point for each group of input rows:

    weight[o, i] = scales[g, o] * (q[i, o] - zeros[g, o])      with g = g_idx[i]

Shapes: I input and O output features, G groups. qweight (I * bits / 32, O) int32: down each column, one stream of bits, the
lowest first. qzeros (G, O * bits / 32) int32: the same along each row; format "gptq" (v1) stores zeros - 1, "gptq_v2" zeros.
scales (G, O), g_idx (I,).
"""

import torch

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(W, M) int32 -> (W * 32 / bits, M) int32, the numbers that stand in each column's stream of bits."""
    begin = torch.arange(words.shape[0] * 32 // bits) * bits
    word, offset = begin // 32, begin % 32
    here = torch.clamp(32 - offset, max=bits)  # with 3 bits, some numbers go over into the next word
    low = words[word] >> offset[:, None] & ((1 << here) - 1)[:, None]
    over = (here < bits).nonzero().flatten()
    if len(over):
        rest = words[word[over] + 1] & ((1 << bits - here[over]) - 1)[:, None]
        low[over] |= rest << here[over][:, None]
    return low.to(torch.int32)


def dequantize(qweight, qzeros, scales, g_idx, bits: int, checkpoint_format: str = "gptq") -> torch.Tensor:
    """The weight (O, I) in float32."""
    zeros_GO = unpack(qzeros.T.contiguous(), bits).T + (checkpoint_format == "gptq")
    groups_I = g_idx.long()
    weight_IO = unpack(qweight, bits).float()
    weight_IO -= zeros_GO.float()[groups_I]
    weight_IO *= scales.float()[groups_I]
    return weight_IO.T.contiguous()


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """(N, M) numbers below 2^bits -> (N * bits / 32, M) int32: the reverse of unpack()."""
    begin = torch.arange(numbers.shape[0]) * bits
    word, offset, numbers = begin // 32, begin % 32, numbers.long()
    words = torch.zeros(numbers.shape[0] * bits // 32, numbers.shape[1], dtype=torch.int64)
    words.index_add_(0, word, numbers << offset[:, None] & 0xFFFFFFFF)
    over = (offset + bits > 32).nonzero().flatten()
    if len(over):
        words.index_add_(0, word[over] + 1, numbers[over] >> (32 - offset[over])[:, None])
    return words.to(torch.int32)  # bit 31 becomes the sign


def as_v1(qweight, qzeros, g_idx, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(qweight, qzeros) of format "gptq" from those of "gptq_v2".

    v1 stores zero points less one, so there is none of 0 (of a group without negative weights, if not symmetric): it
    becomes 1, and the group's numbers one more, the largest as they are.
    """
    zeros_OG = unpack(qzeros.T.contiguous(), bits)
    none_OG = zeros_OG == 0
    if none_OG.any():
        numbers = unpack(qweight, bits) + none_OG.T.int()[g_idx.long()]
        qweight = pack(numbers.clamp(max=2**bits - 1), bits)
    return qweight, pack(torch.where(none_OG, 0, zeros_OG - 1), bits).T.contiguous()
