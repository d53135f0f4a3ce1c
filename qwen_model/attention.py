"""Attention: `attend` is the one call, whatever reads the keys.

Packed samples (several conversations in one row, none of which sees another) have three ways, equal in their results:

- flash-attn 2, where it is installed and asked for: transformers' own function reads the same `cu_seq_lens`;
- torch's variable-length attention, on CUDA (sm_80 or newer) in half precision;
- a loop over the samples with scaled_dot_product_attention, everywhere else. No T x T mask is made in any of them.

The int8 KV cache is read by its kernels where kv_cache.kernel_obstacle found none; all else is transformers' attention.

Shapes: B batch, N heads, T tokens of the row, D head size.
"""

import functools
import importlib.util
import inspect

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available


def choose_attention(use_flash_attn: bool | str = "auto") -> tuple[str, str]:
    """The attention implementation for this machine and why: (transformers' name, reason for people)."""
    if use_flash_attn is False:
        return "sdpa", "use_flash_attn is false in config.json"
    if not torch.cuda.is_available():
        return "sdpa", "no CUDA device"
    if torch.cuda.get_device_capability()[0] < 8:
        return "sdpa", "flash-attn 2 needs an Ampere GPU (sm_80) or newer"
    if not is_flash_attn_2_available():  # flash-attn 4 is a package of the same name
        return "sdpa", "flash-attn 2 is not installed"
    return "flash_attention_2", "flash-attn 2 is installed"


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention spelt out, the one way that returns its weights: -> (B, T, N, D), (B, N, T, keys)."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    dropped = drop(weights, dropout, training=module.training)
    return (dropped @ value).transpose(1, 2), weights


def attend(
    module, query, key, value, attention_mask, scaling, dropout=0.0, bounds=None, cache_kernel=False, **kwargs
):  # fmt: skip
    """(B, T, N, D), and the weights (B, N, T, keys) or None.

    query, key, value (B, N, T, D). bounds: those of a packed row's samples. cache_kernel: key and value are an int8 cache's
    (q, scale, zero point), which the kernels read as they are; a long prefill reads them dequantized.
    """
    if bounds is not None:
        cu_seq_lens, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        return packed_attention(query, key, value, cu_seq_lens, longest, bounds, scaling, dropout), None
    if cache_kernel:
        from .kv_cache_kernels import MAX_QUERIES, attend_int8, dequantize_int8

        if query.shape[2] <= MAX_QUERIES:
            return attend_int8(query, key, value, attention_mask, scaling), None
        key, value = dequantize_int8(key, value, query.dtype)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    return interface(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


@functools.cache
def torch_has_varlen() -> bool:
    """Variable-length attention came with torch 2.10, and takes a scale and a window since 2.11."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


@functools.cache
def is_ampere(device: torch.device) -> bool:
    """Whether a GPU is of Ampere (sm_80) or newer, as flash attention asks for."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def is_half_on_cuda(x: torch.Tensor) -> bool:
    """What the fast kernels, flash-attn's and torch's, take."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and is_ampere(x.device)


def packed_attention(query, key, value, cu_seq_lens, max_length: int, bounds: list[int], scaling: float, dropout=0.0):
    """Causal attention within each sample of one packed row.

    query, key, value (1, N, T, D); cu_seq_lens int32 (samples + 1,): where each sample begins, and the end of the last;
    bounds: the same as a list; max_length: tokens of the longest. Returns (1, T, N, D).
    """
    # torch's variable-length kernel has no dropout; the loop below has
    if dropout == 0.0 and is_half_on_cuda(query) and torch_has_varlen():
        return varlen_attention(query, key, value, cu_seq_lens, max_length, scaling)
    lengths = [end - start for start, end in zip(bounds, bounds[1:])]
    # split, not slices: each slice's backward pass would fill a row of zeros around its gradient
    samples = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    pieces = [scaled_dot_product_attention(*one, dropout_p=dropout, is_causal=True, scale=scaling) for one in samples]
    return torch.cat(pieces, dim=2).transpose(1, 2)


def varlen_attention(query, key, value, cu_seq_lens, max_length: int, scaling: float):
    """The same through torch's variable-length kernel. A window of (-1, 0) is "all before, none behind": causal."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, N, D)
    out = varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, scale=scaling, window_size=(-1, 0)
    )
    return out.unsqueeze(0)
