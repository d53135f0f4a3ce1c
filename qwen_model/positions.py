"""Where a token stands: positions, the rotary embedding of them, and what stretches both beyond the trained length.

Beyond the trained length S, outside training, two things happen (both per row, or per sample of a packed row): dynamic NTK
stretches the rotary base at a prefill, and LogN scales the queries.

Shapes: B batch, T tokens, D head size.
"""

import math

import torch
from torch import nn

from .configuration_qwen import QWenConfig


def ntk_alpha(length, seq_length: int):
    """Dynamic NTK's alpha for a prefill of `length` tokens (a number or a tensor): max(1, 2^ceil(log2(L / S) + 1) - 1)."""
    length = torch.as_tensor(length, dtype=torch.float32)
    return (2 ** torch.ceil(torch.log2(length / seq_length) + 1) - 1).clamp_min(1.0)


class QWenRotaryEmbedding(nn.Module):
    """Rotary embedding over the whole head ("rotate half"), in float32, with a base that NTK may stretch per token."""

    def __init__(self, config: QWenConfig):
        super().__init__()
        self.base, self.dim = config.rotary_emb_base, config.head_dim

    def forward(self, position_ids_BT, alpha_BT):
        """cos, sin (B, 1, T, D) of the positions, float32; alpha None, or (B, T) or (B, 1), stretches the base."""
        exponent = torch.arange(0, self.dim, 2, device=position_ids_BT.device, dtype=torch.float32) / self.dim
        # filled on the device: a number that is copied to a GPU is waited for
        base = torch.full((), float(self.base), dtype=torch.float32, device=position_ids_BT.device)
        if alpha_BT is not None:
            base = (base * alpha_BT.to(base.device) ** (self.dim / (self.dim - 2)))[..., None]
        angles = position_ids_BT[..., None].float() * base**-exponent
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos(), angles.sin()


def count_on(x_BTH, past: int, cu_seq_lens):
    """Positions (1, T): counting on from the cache, or from 0 in each sample of a packed row."""
    positions = torch.arange(past, past + x_BTH.shape[1], device=x_BTH.device)
    if cu_seq_lens is not None:
        starts, lengths = cu_seq_lens[:-1], cu_seq_lens.diff()
        positions = positions - starts.repeat_interleave(lengths, output_size=x_BTH.shape[1])
    return positions[None]


def alpha_of_pass(config: QWenConfig, x_BTH, attention_mask, past: int, cache, cu_seq_lens=None, longest: int = 0):
    """Dynamic NTK's alpha: None where the base stays, else (B, 1), or (1, T) for a packed row.

    It is fixed at the prefill and kept in the cache: keys that were rotated with one base cannot meet queries of another.
    """
    if not config.use_dynamic_ntk:
        return None
    if past > 0:
        return getattr(cache, "ntk_alpha", None)
    seq_length, length, alpha = config.seq_length, x_BTH.shape[1], None
    if cu_seq_lens is not None:
        if longest > seq_length:
            lengths = cu_seq_lens.diff()
            alpha = ntk_alpha(lengths, seq_length).repeat_interleave(lengths, output_size=length)[None]
    elif length > seq_length:
        lengths = length if attention_mask is None else tokens_of_rows(attention_mask)
        alpha = ntk_alpha(lengths, seq_length).reshape(-1, 1).to(x_BTH.device)
    if cache is not None:
        cache.ntk_alpha = alpha
    return alpha


def tokens_of_rows(attention_mask):
    """(B,): the tokens of each row without its padding, from a mask (B, keys), or (B, 1, T, keys) as generate makes for static caches."""
    if attention_mask.ndim == 2:
        return attention_mask.sum(-1)
    last_query = attention_mask[:, 0, -1]  # of a prefill, which sees all of its row
    return (last_query if last_query.dtype == torch.bool else last_query == 0).sum(-1)


def logn_factor(config: QWenConfig, position_ids_BT, key_length: int):
    """LogN's factor on the queries, (B, 1, T, 1): log(p) / log(S) for position p (from 1) past the trained length S."""
    if not config.use_logn_attn or key_length <= config.seq_length:
        return None
    factor = (position_ids_BT + 1).float().log() / math.log(config.seq_length)
    return factor.clamp_min(1.0)[:, None, :, None]
