"""The softmax of head_loss.py as a Triton kernel: imported where a CUDA device is at work.

Plain torch writes a piece's logits out four times over, in float32. Here a program reads its row twice and writes it once,
where it lies: once for the largest logit and the sum of exponentials (kept in step with the maximum as it grows: Milakov and
Gimelshein, 2018), once for the exponentials themselves.

Shapes: R rows, V vocabulary.
"""

import torch

from .on_triton import jit, on, tl

BLOCK_V = 4096


@jit
def exponentials_kernel(logits, labels, Z, c, losses, hits, stride, V, COUNTS: tl.constexpr, BLOCK_V: tl.constexpr):
    """One row: overwrites its logits with E', see head_loss.py; Z, c and the token's loss in float32. COUNTS: adds to hits."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    label = tl.load(labels + row)
    label_logit = tl.load(start + label).to(tl.float32)
    top, others = label_logit, 0.0
    for at in range(0, V, BLOCK_V):
        column = at + tl.arange(0, BLOCK_V)
        z = tl.load(start + column, mask=column < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 0))
        e = tl.where(column == label, 0.0, tl.exp(z - higher))
        others = others * tl.exp(top - higher) + tl.sum(e, 0)
        top = higher
    for at in range(0, V, BLOCK_V):
        column = at + tl.arange(0, BLOCK_V)
        z = tl.load(start + column, mask=column < V, other=-float("inf")).to(tl.float32)
        e = tl.where(column == label, 0.0, tl.exp(z - top))
        tl.store(start + column, e, mask=column < V)
    whole = others + tl.exp(label_logit - top)
    tl.store(Z + row, whole)
    tl.store(c + row, -others / whole)
    tl.store(losses + row, tl.log(whole) + top - label_logit)
    if COUNTS:
        tl.atomic_add(hits, (label_logit >= top).to(tl.int32))


def exponentials(logits_RV: torch.Tensor, labels_R: torch.Tensor, hits: torch.Tensor | None = None):
    """As head_loss.exponentials; E' takes the place of the logits."""
    rows, vocabulary = logits_RV.shape
    Z_R, c_R, losses_R = torch.empty((3, rows), dtype=torch.float32, device=logits_RV.device)
    if rows:
        with on(logits_RV):
            exponentials_kernel[(rows,)](
                logits_RV, labels_R, Z_R, c_R, losses_R, losses_R if hits is None else hits, logits_RV.stride(0), vocabulary,
                COUNTS=hits is not None, BLOCK_V=BLOCK_V, num_warps=8,
            )  # fmt: skip
    return logits_RV, Z_R, c_R, losses_R
