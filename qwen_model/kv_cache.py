"""The int8 KV cache (`use_cache_quantization`): keys and values as uint8 behind transformers' Cache, in plain torch.

Each head of each token has its own scale and zero point (float32), so an outlier token costs the others nothing:

    scale = (max - min) / 255      zero = -min / scale      q = clamp(round(x / scale + zero), 0, 255)
    back:  scale * (q - zero)

Memory for a head of 128 in bf16: 128 + 8 bytes a token instead of 256.

Shapes: B batch, N heads, T tokens, D head size.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer

# The scale of a constant head is no range at all. This share of its value keeps the division finite, and the way back
# (scale * (0 - zero) = min) exact; the tiny absolute floor is for heads of zeros.
RELATIVE_FLOOR = 1e-7
ABSOLUTE_FLOOR = 1e-20


def quantize(x_BNTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys or values -> (q uint8 (B, N, T, D), scale float32 (B, N, T, 1), zero point float32 (B, N, T, 1))."""
    x = x_BNTD.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    floor = torch.maximum(low.abs(), high.abs()) * RELATIVE_FLOOR + ABSOLUTE_FLOOR
    scale = torch.maximum((high - low) / 255, floor)
    zero = -low / scale
    return (x / scale + zero).round_().clamp_(0, 255).to(torch.uint8), scale, zero


def dequantize(q_BNTD: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The way back, in `dtype`: scale * (q - zero)."""
    return (scale * (q_BNTD.float() - zero)).to(dtype)


class Int8Layer(DynamicLayer):
    """One layer's cache: `keys` and `values` hold uint8, `key_range` and `value_range` their (scale, zero point)."""

    def lazy_initialization(self, key_states, value_states=None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = key_states[:, :, :0]
        (self.keys, *self.key_range), (self.values, *self.value_range) = quantize_empty(empty), quantize_empty(empty)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends (B, N, T, D) keys and values; returns all of them, dequantized to the states' type."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, *self.key_range = append((self.keys, *self.key_range), quantize(key_states))
        self.values, *self.value_range = append((self.values, *self.value_range), quantize(value_states))
        return (
            dequantize(self.keys, *self.key_range, key_states.dtype),
            dequantize(self.values, *self.value_range, value_states.dtype),
        )

    @property
    def entry(self):
        """((q_key, key_scale, key_zero_point), (q_value, value_scale, value_zero_point)), as the format is published."""
        return (self.keys, *self.key_range), (self.values, *self.value_range)

    def _change(self, change) -> None:
        """Applies one function to every tensor held, so that the three of a triple cannot drift apart."""
        if self.is_initialized:
            self.keys, *self.key_range = map(change, (self.keys, *self.key_range))
            self.values, *self.value_range = map(change, (self.values, *self.value_range))

    def reorder_cache(self, beam_idx) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices) -> None:
        self._change(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last |tokens_to_remove| tokens (a negative number, as transformers passes it)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, found {tokens_to_remove}")
        if tokens_to_remove < 0:
            self._change(lambda x: x[:, :, :tokens_to_remove])

    def reset(self) -> None:
        """Forgets everything."""
        self.keys = self.values = None
        self.is_initialized = False

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda x: x.to(self.device, non_blocking=True))


def quantize_empty(empty_BN0D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The triple of no tokens."""
    column = empty_BN0D[..., :1].float()
    return empty_BN0D.to(torch.uint8), column, column


def append(triple, more) -> list[torch.Tensor]:
    """Joins two (q, scale, zero point) triples along the tokens."""
    return [torch.cat((old, new), dim=-2) for old, new in zip(triple, more)]


class Int8Cache(Cache):
    """transformers' Cache with `Int8Layer`s. `model.generate` makes one when the config has use_cache_quantization."""

    def __init__(self, config=None):
        super().__init__(layer_class_to_replicate=Int8Layer)
