"""Triton kernels for the int8 KV cache (`use_cache_kernel`): one writes it, one attends over it as it lies there.

`write_int8` quantizes keys and values into the cache, `attend_int8` reads uint8 and dequantizes in registers (the cache never
stands in memory in 16 bit), `dequantize_int8` is for long prefills, whose attention torch's own kernel does best. All give
what kv_cache.py gives in plain torch: the same uint8, scales and zero points bit for bit, and attention over the same
dequantized numbers, rounded to the query's type.

Attention is flash attention's online softmax (Dao et al., 2022) with the keys split over programs (flash decoding, Dao et al.,
2023), so that one row with a long context uses the whole GPU. With s = log2(e) * scaling * q.k and a running maximum m,

    m' = max(m, max s)      p = 2^(s - m')      l' = l * 2^(m - m') + sum p      acc' = acc * 2^(m - m') + p @ v

each part leaves (m, l, acc), and the parts join as out = sum acc * 2^(m - M) / sum l * 2^(m - M), M = max m.

Shapes: B batch, N heads, T queries (new tokens), K keys, C capacity of the cache (K <= C), D head size, S parts of the keys,
R rows: tokens of all heads one after another.
"""

from __future__ import annotations

import math
import os

import torch

from .on_triton import jit, on, tl, triton

# Whether triton runs the kernels in Python, on any tensor: it decides when they are defined, that is, now.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

HEAD_SIZES = (64, 128)
MAX_QUERIES = (
    64  # of a row: more are a prefill, for which torch's attention over the dequantized cache is the better tool
)
BLOCK_Q, BLOCK_R = 16, 16  # a tile's queries (the least that tl.dot takes), rows
# a tile's keys, and the warps that share it, by the bytes of a number: in float32 more of either spill registers
TILES = {2: (64, 4), 4: (16, 8)}
MAX_SPLITS, LEAST_PART = 32, 64  # of the keys; the keys in one
PROGRAMS_PER_PROCESSOR = 4  # how many parts a GPU's multiprocessor should find


@jit
def quantize_rows(
    x_ptr, q_ptr, scale_ptr, zero_ptr, rows, N, T, C, at, stride_b, stride_n, stride_t,
    STEP: tl.constexpr, RELATIVE: tl.constexpr, ABSOLUTE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """kv_cache.quantize for BLOCK_R tokens, into the cache from token `at` on; operation for operation, so bit for bit."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < rows
    head, t = row // T, row % T  # the head counts through the batch
    d = tl.arange(0, D)[None, :]
    begin = (head // N) * stride_b + (head % N) * stride_n + t * stride_t
    x = tl.load(x_ptr + begin[:, None] + d, mask=real[:, None], other=0.0).to(tl.float32)

    low, high = tl.min(x, 1), tl.max(x, 1)
    floor = tl.maximum(tl.abs(low), tl.abs(high)) * RELATIVE + ABSOLUTE
    scale = tl.maximum((high - low) * STEP, floor)
    zero = tl.div_rn(-low, scale)
    q = tl.div_rn(x, scale[:, None]) + zero[:, None]
    # Clamped first: between 0 and 255, adding and subtracting 1.5 * 2^23 rounds to the nearest, to even at a half, as torch
    # does (a float32 that large has no bits below 1). Triton's interpreter has no rint.
    q = (tl.minimum(tl.maximum(q, 0.0), 255.0) + 12582912.0) - 12582912.0

    to = head * C + at + t
    tl.store(q_ptr + (to * D)[:, None] + d, q.to(tl.uint8), mask=real[:, None])
    tl.store(scale_ptr + to, scale, mask=real)
    tl.store(zero_ptr + to, zero, mask=real)


@jit(do_not_specialize=["rows", "T", "C", "at"])
def write_kernel(
    k_ptr, kq_ptr, ks_ptr, kz_ptr, v_ptr, vq_ptr, vs_ptr, vz_ptr, rows, N, T, C, at, k_b, k_n, k_t, v_b, v_n, v_t,
    STEP: tl.constexpr, RELATIVE: tl.constexpr, ABSOLUTE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Keys and values in one launch."""
    quantize_rows(
        k_ptr, kq_ptr, ks_ptr, kz_ptr, rows, N, T, C, at, k_b, k_n, k_t, STEP, RELATIVE, ABSOLUTE, D, BLOCK_R
    )  # fmt: skip
    quantize_rows(
        v_ptr, vq_ptr, vs_ptr, vz_ptr, rows, N, T, C, at, v_b, v_n, v_t, STEP, RELATIVE, ABSOLUTE, D, BLOCK_R
    )  # fmt: skip


@jit
def load_rows(q_ptr, scale_ptr, zero_ptr, row, real, D: tl.constexpr):
    """scale * (q - zero) of rows of the cache in float32, (rows, D)."""
    q = tl.load(q_ptr + (row * D)[:, None] + tl.arange(0, D)[None, :], mask=real[:, None], other=0).to(tl.float32)
    scale = tl.load(scale_ptr + row, mask=real, other=0.0)
    zero = tl.load(zero_ptr + row, mask=real, other=0.0)
    return scale[:, None] * (q - zero[:, None])


@jit(do_not_specialize=["rows", "K", "C"])
def dequantize_kernel(
    kq_ptr, ks_ptr, kz_ptr, k_ptr, vq_ptr, vs_ptr, vz_ptr, v_ptr, rows, K, C, D: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The first K of C tokens of every head, keys and values, in the type of k_ptr."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < rows
    source = (row // K) * C + row % K
    to = (row * D)[:, None] + tl.arange(0, D)[None, :]
    k = load_rows(kq_ptr, ks_ptr, kz_ptr, source, real, D)
    tl.store(k_ptr + to, k.to(k_ptr.dtype.element_ty), mask=real[:, None])
    v = load_rows(vq_ptr, vs_ptr, vz_ptr, source, real, D)
    tl.store(v_ptr + to, v.to(v_ptr.dtype.element_ty), mask=real[:, None])


@jit(do_not_specialize=["T", "K", "C", "part_keys", "splits", "mask_b", "mask_n", "mask_t"])
def attend_kernel(
    q_ptr, kq_ptr, ks_ptr, kz_ptr, vq_ptr, vs_ptr, vz_ptr, mask_ptr, out_ptr, stats_ptr,
    scaling_log2, N, T, K, C, part_keys, splits, q_b, q_n, q_t, mask_b, mask_n, mask_t,
    HAS_MASK: tl.constexpr, IS_PART: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head over one part of its keys.

    mask (B, N, T, K), nonzero where a query sees a key, or none: query t of T sees the keys up to K - T + t.
    out (B, T, N, D), or for a part float32 (B, N, T, S, D) with stats (B, N, T, S, 2): its maximum (base 2) and its sum.
    """
    head = tl.program_id(0).to(tl.int64)
    b, n = head // N, head % N
    t = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    part = tl.program_id(2)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + b * q_b + n * q_n + t[:, None] * q_t + d[None, :], mask=(t < T)[:, None], other=0.0)

    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    end = tl.minimum(part * part_keys + part_keys, K)
    for begin in range(part * part_keys, end, BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        real = key < end
        k = load_rows(kq_ptr, ks_ptr, kz_ptr, head * C + key, real, D).to(q.dtype)
        # "ieee": float32 models in float32, not in TF32; of no effect on 16 bit
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling_log2
        sees = (t < T)[:, None] & real[None, :]
        if HAS_MASK:
            at = mask_ptr + b * mask_b + n * mask_n + t[:, None] * mask_t + key[None, :]
            sees = sees & (tl.load(at, mask=sees, other=0) != 0)
        else:
            sees = sees & (key[None, :] <= K - T + t[:, None])
        scores = tl.where(sees, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen no key yet: 2^(-inf - 0) = 0, not NaN
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(p, 1)
        v = load_rows(vq_ptr, vs_ptr, vz_ptr, head * C + key, real, D).to(q.dtype)
        acc = acc * fade[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
        highest = new

    if IS_PART:
        at = (head * T + t) * splits + part
        tl.store(stats_ptr + at * 2, highest, mask=t < T)
        tl.store(stats_ptr + at * 2 + 1, total, mask=t < T)
    else:
        at = (b * T + t) * N + n
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a query that sees no key gets zeros
    tl.store(out_ptr + (at * D)[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None])


@jit(do_not_specialize=["T", "splits"])
def join_kernel(parts_ptr, stats_ptr, out_ptr, N, T, splits, D: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """The parts of one query of one head -> out (B, T, N, D)."""
    row = tl.program_id(0).to(tl.int64)  # through (B, N, T)
    head, t = row // T, row % T
    part, d = tl.arange(0, MAX_SPLITS), tl.arange(0, D)
    real = part < splits
    at = row * splits + part
    highest = tl.load(stats_ptr + at * 2, mask=real, other=float("-inf"))
    total = tl.load(stats_ptr + at * 2 + 1, mask=real, other=0.0)
    acc = tl.load(parts_ptr + (at * D)[:, None] + d[None, :], mask=real[:, None], other=0.0)
    base = tl.max(highest, 0)
    weight = tl.exp2(highest - tl.where(base == float("-inf"), 0.0, base))
    total = tl.sum(total * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    to = ((head // N) * T + t) * N + head % N
    tl.store(out_ptr + to * D + d, out.to(out_ptr.dtype.element_ty))


# ---- what kv_cache.py and attention.py call


def capacity(triple) -> int:
    """C of a cache's (q, scale, zero point), each (B, N, K, .) and the beginning of a (B, N, C, .)."""
    q, scale, zero = triple
    tokens = q.stride(1) // q.shape[3]
    for x, columns in ((q, q.shape[3]), (scale, 1), (zero, 1)):
        strides = (q.shape[1] * tokens * columns, tokens * columns, columns, 1)
        # the stride of a dimension of one entry says nothing
        assert all(size == 1 or x.stride(i) == strides[i] for i, size in enumerate(x.shape)), (x.shape, x.stride())
    return tokens


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension's entries side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def write_int8(key, value, keys, values, at: int, step: float, relative: float, absolute: float) -> None:
    """Quantizes new keys and values (B, N, T, D) into the cache `keys`, `values`: (q, scale, zero) of capacity C, from `at`."""
    B, N, T, D = key.shape
    key, value, rows = unit_stride(key), unit_stride(value), B * N * T
    with on(key):
        # Without fused multiply-adds: they round once where torch rounds twice.
        write_kernel[(triton.cdiv(rows, BLOCK_R),)](
            key, *keys, value, *values, rows, N, T, capacity(keys), at, *key.stride()[:3], *value.stride()[:3],
            STEP=step, RELATIVE=relative, ABSOLUTE=absolute, D=D, BLOCK_R=BLOCK_R, enable_fp_fusion=False,
        )  # fmt: skip


def dequantize_int8(keys, values, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, N, K, D) of the cache, in `dtype`."""
    B, N, K, D = keys[0].shape
    key, value = (torch.empty((B, N, K, D), dtype=dtype, device=keys[0].device) for _ in range(2))
    rows, block = B * N * K, 2 * BLOCK_R
    with on(key):
        dequantize_kernel[(triton.cdiv(rows, block),)](
            *keys, key, *values, value, rows, K, capacity(keys), D=D, BLOCK_R=block
        )  # fmt: skip
    return key, value


def count_splits(programs: int, K: int, device: torch.device) -> int:
    """Into how many parts the keys go: enough programs for all of the GPU's processors, and none with a few keys only."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = PROGRAMS_PER_PROCESSOR * processors // programs
    return max(1, min(wanted, MAX_SPLITS, triton.cdiv(K, LEAST_PART)))


def attend_int8(query, keys, values, mask, scaling: float, splits: int | None = None) -> torch.Tensor:
    """Attention of queries (B, N, T, D) over the cache, -> (B, T, N, D).

    keys, values: (q, scale, zero point) with K tokens, the T queries' own among them. mask: None (causal), or bool, true
    where a query sees a key, and of a shape that broadcasts to (B, N, T, K). splits: for tests.
    """
    (B, N, T, D), K, C = query.shape, keys[0].shape[2], capacity(keys)
    query, out = unit_stride(query), torch.empty((B, T, N, D), dtype=query.dtype, device=query.device)
    seen, mask_strides = query, (0, 0, 0)  # without a mask the pointer is not read
    if mask is not None:
        seen = unit_stride(mask.expand(B, N, T, K)).view(torch.uint8)
        mask_strides = seen.stride()[:3]
    q_blocks = triton.cdiv(T, BLOCK_Q)
    block, warps = TILES[query.element_size()]
    splits = splits or count_splits(B * N * q_blocks, K, query.device)
    part_keys = triton.cdiv(triton.cdiv(K, splits), block) * block
    splits = triton.cdiv(K, part_keys)  # parts of whole blocks may be fewer
    parts, stats = out, out
    if splits > 1:
        parts = torch.empty((B, N, T, splits, D), dtype=torch.float32, device=query.device)
        stats = torch.empty((B, N, T, splits, 2), dtype=torch.float32, device=query.device)
    with on(query):
        attend_kernel[(B * N, q_blocks, splits)](
            query, *keys, *values, seen, parts, stats, scaling * math.log2(math.e), N, T, K, C, part_keys, splits,
            *query.stride()[:3], *mask_strides,
            HAS_MASK=mask is not None, IS_PART=splits > 1, D=D, BLOCK_Q=BLOCK_Q, BLOCK_K=block, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            join_kernel[(B * N * T,)](parts, stats, out, N, T, splits, D=D, MAX_SPLITS=MAX_SPLITS)
    return out
