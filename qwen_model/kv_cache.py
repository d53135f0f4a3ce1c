"""The int8 KV cache (`use_cache_quantization`): keys and values as uint8 behind transformers' Cache.

Each head of each token has its own scale and zero point (float32), so an outlier token costs the others nothing:

    scale = (max - min) / 255      zero = -min / scale      q = clamp(round(x / scale + zero), 0, 255)
    back:  scale * (q - zero)

Memory for a head of 128 in bf16: 128 + 8 bytes a token instead of 256.

In plain torch the whole cache is dequantized for each attention. With `use_cache_kernel` Triton kernels write it and attend
over it as it lies there (kv_cache_kernels.py); `kernel_obstacle` is the one place that decides, once a forward pass, and
gives its reason. Both ways attend over the dequantized keys and values, at the prefill too.

Shapes: B batch, N heads, T new tokens, K tokens held, C tokens there is room for, D head size.
"""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .compat import overrides, refuse_unknown
from .on_triton import triton, why_no_triton

# Multiplied, not divided by 255: torch divides by a number exactly on a CPU and by its reciprocal on CUDA.
STEP = 1 / 255
# The scale of a constant head is no range at all. This share of its value keeps the division finite, and the way back
# (scale * (0 - zero) = min) exact; the tiny absolute floor is for heads of zeros.
RELATIVE_FLOOR = 1e-7
ABSOLUTE_FLOOR = 1e-20

# The cache grows by 1/16, or by this many tokens: what is copied then is at most 1/32 of what attention reads meanwhile,
# and what stands empty is at most 64 tokens or 1/16. Joining a token with torch.cat copies all of the cache each time: on one
# CPU core, one layer of 7B, 1.15 ms a token at 1024 tokens and 16.9 ms at 4096, against less than 0.15 ms this way.
LEAST_GROWTH = 64


def quantize(x_BNTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys or values -> (q uint8 (B, N, T, D), scale float32 (B, N, T, 1), zero point float32 (B, N, T, 1))."""
    x = x_BNTD.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    floor = torch.maximum(low.abs(), high.abs()) * RELATIVE_FLOOR + ABSOLUTE_FLOOR
    scale = torch.maximum((high - low) * STEP, floor)
    zero = -low / scale
    return (x / scale + zero).round_().clamp_(0, 255).to(torch.uint8), scale, zero


def dequantize(q_BNTD: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The way back, in `dtype`: scale * (q - zero)."""
    return (scale * (q_BNTD.float() - zero)).to(dtype)


# ---- the cache


def no_room(empty_BN0D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The triple of no tokens."""
    column = empty_BN0D[..., :1].float()
    return empty_BN0D.to(torch.uint8), column, column.clone()


def larger(x_BNC: torch.Tensor, tokens: int, capacity: int) -> torch.Tensor:
    """A tensor (B, N, capacity, .) that begins with the first `tokens` of (B, N, C, .)."""
    new = x_BNC.new_empty((*x_BNC.shape[:2], capacity, x_BNC.shape[3]))
    new[:, :, :tokens] = x_BNC[:, :, :tokens]
    return new


class Int8Layer(DynamicLayer):
    """One layer's cache: `keys` and `values` hold uint8, `key_range` and `value_range` their (scale, zero point).

    They are the beginnings of larger tensors, `key_room` and `value_room`, in which later tokens are written in place.
    """

    @overrides(DynamicLayer, "key_states", "value_states")
    def lazy_initialization(self, key_states, value_states=None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = key_states.detach()[:, :, :0]
        self.key_room, self.value_room = no_room(empty), no_room(empty)
        self.is_initialized = True
        self._show(0)

    @overrides(DynamicLayer, "key_states", "value_states")
    @torch.no_grad()
    def update(self, key_states, value_states, *args, kernel: bool = False, **kwargs):
        """Appends (B, N, T, D) keys and values; returns all of them, dequantized to the states' type.

        kernel: Triton writes, and what is returned is `entry`, not dequantized.
        """
        # what transformers' models hand on for caches of other kinds
        refuse_unknown("Int8Layer.update", kwargs, ("kwargs", "cache_kwargs"))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        past = self.get_seq_length()
        total = past + key_states.shape[2]
        if total > self.key_room[0].shape[2]:
            capacity = total + max(LEAST_GROWTH, total // 16)
            self.key_room = tuple(larger(x, past, capacity) for x in self.key_room)
            self.value_room = tuple(larger(x, past, capacity) for x in self.value_room)
        if kernel:
            from .kv_cache_kernels import write_int8

            floors = (RELATIVE_FLOOR, ABSOLUTE_FLOOR)
            write_int8(key_states, value_states, self.key_room, self.value_room, past, STEP, *floors)
        else:
            for room, states in ((self.key_room, key_states), (self.value_room, value_states)):
                for x, new in zip(room, quantize(states)):
                    x[:, :, past:total] = new
        self._show(total)
        if kernel:
            return self.entry
        return (
            dequantize(self.keys, *self.key_range, key_states.dtype),
            dequantize(self.values, *self.value_range, value_states.dtype),
        )

    @property
    def entry(self):
        """((q_key, key_scale, key_zero_point), (q_value, value_scale, value_zero_point)), as the format is published."""
        return (self.keys, *self.key_range), (self.values, *self.value_range)

    def _show(self, tokens: int) -> None:
        """Lets keys, values and their ranges be the first `tokens` of what there is room for."""
        self.keys, *self.key_range = (x[:, :, :tokens] for x in self.key_room)
        self.values, *self.value_range = (x[:, :, :tokens] for x in self.value_room)

    def _change(self, change) -> None:
        """Applies one function to every tensor held, so that the three of a triple cannot drift apart."""
        if self.is_initialized:
            tokens = self.get_seq_length()
            self.key_room = tuple(change(x).contiguous() for x in self.key_room)
            self.value_room = tuple(change(x).contiguous() for x in self.value_room)
            self._show(tokens)

    @overrides(DynamicLayer, "beam_idx")
    def reorder_cache(self, beam_idx) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    @overrides(DynamicLayer, "repeats")
    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    @overrides(DynamicLayer, "indices")
    def batch_select_indices(self, indices) -> None:
        self._change(lambda x: x[indices])

    @overrides(DynamicLayer)
    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last |tokens_to_remove| tokens (a negative number, as transformers passes it)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, found {tokens_to_remove}")
        if self.is_initialized:
            self._show(max(0, self.get_seq_length() + tokens_to_remove))

    @overrides(DynamicLayer)
    def reset(self) -> None:
        """Forgets everything."""
        self.keys = self.values = self.key_range = self.value_range = self.key_room = self.value_room = None
        self.is_initialized = False

    @overrides(DynamicLayer)
    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    @overrides(DynamicLayer)
    def prefetch(self) -> None:
        if self.is_initialized and self.keys.device != self.device:
            self._change(lambda x: x.to(self.device, non_blocking=True))


class Int8Cache(Cache):
    """transformers' Cache with `Int8Layer`s. `model.generate` makes one when the config has use_cache_quantization."""

    def __init__(self, config=None, **offloading):
        super().__init__(layer_class_to_replicate=Int8Layer, **offloading)


# ---- whether the kernels read it


def machine_obstacle(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """What keeps the kernels from running on this device, "" for nothing."""
    from .kv_cache_kernels import HEAD_SIZES, INTERPRETED

    if triton is None:
        return "triton is not installed"
    if head_size not in HEAD_SIZES:
        return f"its heads have {head_size} channels, the kernels are for {' and '.join(map(str, HEAD_SIZES))}"
    if INTERPRETED:
        return "Triton's interpreter (TRITON_INTERPRET=1) cannot multiply bfloat16" if dtype == torch.bfloat16 else ""
    if device.type != "cuda":
        return f"the model is on {device.type}, not on CUDA (and TRITON_INTERPRET=1 is not set)"
    return why_no_triton(device)


def kernel_obstacle(config, cache, x_BTH: torch.Tensor, mask=None, training: bool = False) -> str:
    """Why the kernels do not read the cache in this forward pass, "" if they do.

    x_BTH: what the blocks are given; mask: the attention mask as attention gets it.
    """
    if not config.use_cache_quantization:
        return "use_cache_quantization is false in config.json"
    if not isinstance(cache, Int8Cache):
        return f"the cache is a {type(cache).__name__}, not an Int8Cache"
    if config._attn_implementation != "sdpa":
        return f"attn_implementation is {config._attn_implementation}, the kernels stand in for sdpa"
    if x_BTH.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the model is in {x_BTH.dtype}"
    if training and config.attn_dropout_prob > 0:
        return "attention dropout is on"
    if torch.is_grad_enabled():
        return "gradients are on, and the kernels have no backward pass (use torch.no_grad())"
    if mask is not None and mask.dtype != torch.bool:
        return "the attention mask is not boolean"
    return machine_obstacle(x_BTH.device, x_BTH.dtype, config.head_dim)
