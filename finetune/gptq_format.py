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
