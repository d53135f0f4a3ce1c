"""The language-model head and its loss, in one pass and in pieces.

The logits of a 152k vocabulary are the largest tensor of a training step by far. Here they exist for a few rows at a
time: each piece is projected, its loss added up, and its gradient taken at once, from the same exponentials. Only rows
that are supervised are ever projected. The result is plain cross-entropy, to the rounding of the type it is computed in.

With logits z = W h, m = max z, E = exp(z - m), Z = sum E, label y, and E' = E with 0 in place of the label's entry:

    loss = log Z + m - z_y        c = -(sum E') / Z  (that is p_y - 1)
    dh = W^T E' / Z + c W_y       dW = E' (h / Z)^T, plus c h in row y

so neither the probabilities nor their difference from the label are ever written out. The label's entry is kept apart
because p_y - 1 would be the difference of two nearly equal numbers once a model is sure, and vanish in half precision.

A head may have a few trained rows (of the chat format's tokens, say) over a frozen matrix. They stand in W in their tokens'
places, but W is never copied: their logits are projected apart and put into their columns. With T = E' / Z + c at the label,
of those columns only,

    dh = W^T E'' / Z + c W_y + rows^T T      d rows = T h^T

where E'' is E' with 0 in those columns, and c is 0 where the label is one of those tokens.

A row may weigh w >= 0 in the sum: its loss is w (log Z + m - z_y), and its gradients are those above with Z / w in the place of
Z, and w c in that of c. Weights of 1 change no bit.

What this costs nothing more to know is how many labels were the likeliest token: see counting().

Shapes: R rows (supervised positions), H hidden size, V vocabulary, K trained rows.
"""

import contextlib

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, nll_loss
from torch.utils.checkpoint import checkpoint

from .on_triton import why_no_triton

# Logits of one piece, in elements (times 4 bytes). On a CPU more brings nothing (measured); a GPU reads the whole head once
# a piece, which takes some hundred rows to pay off.
PIECE_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}


counters: list[torch.Tensor] = []  # of counting(); the last one counts


@contextlib.contextmanager
def counting(hits: torch.Tensor):
    """Within, each loss adds to `hits`, int32 () on its device: the number of its labels than which no token was likelier.

    A piece that is computed again in the backward pass, outside, is not counted again. Nobody waits for the device.
    """
    counters.append(hits)
    try:
        yield
    finally:
        counters.pop()


def rows_per_piece(vocab_size: int, device: str) -> int:
    """How many rows are projected at a time."""
    return max(16, PIECE_ELEMENTS.get(device, 2**24) // vocab_size)


class LMHead(nn.Linear):
    """A linear head (V, H) that, given labels, returns the sum of the token losses instead of logits.

    The loss is taken inside forward, so that whatever gathers the weight around a module's forward (ZeRO-3, FSDP) has it.
    """

    takes_labels = True  # a module around the head that hands labels on says the same

    def forward(self, hidden, labels=None, rows=None, row_ids=None, weight_bits=None):
        """hidden (..., H) -> logits (..., V); with labels (R,) and hidden (R, H) -> the summed cross-entropy, float32.

        rows (K, H), which may train, stand in the places of the weight's rows row_ids (K,), each token once.
        weight_bits (R,): what each label's loss weighs in the sum, float32 seen as int32, because what gathers the weight
        may round the numbers that it hands on (FSDP does); None: 1.
        """
        if labels is not None:
            weights = None if weight_bits is None else weight_bits.view(torch.float32)
            return HeadLoss.apply(hidden, self.weight, labels, rows, row_ids, weights)
        logits = super().forward(hidden)
        return logits if rows is None else put_row_logits(logits, hidden, rows, row_ids)


def put_row_logits(logits, hidden, rows_KH, row_ids_K):
    """Overwrites the columns row_ids of logits (..., V) with hidden (..., H) times the trained rows."""
    return logits.index_copy_(-1, row_ids_K, linear(hidden, rows_KH.to(hidden.dtype)))


def summed_loss(head: nn.Module, hidden_RH, labels_R, weights_R: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over rows of the cross-entropy of head(hidden) against labels, each times its weight; float32 scalar.

    Any module serves as head. An LMHead, also inside a wrapper that hands labels and weights on to it, takes the fused way; another
    (a LoRA on the head, say) is called piece by piece, and again in the backward pass. Without a supervised token the head is
    called all the same: what trains of it gets a gradient of zeros, and ranks that gather its weights meet.
    """
    if getattr(head, "takes_labels", False):
        weight_bits = None if weights_R is None else weights_R.float().view(torch.int32)
        return head(hidden_RH, labels=labels_R, weight_bits=weight_bits)

    def piece_loss(hidden, labels, weights=None):
        logits = head(hidden).float()
        if counters:
            with torch.no_grad():
                add_hits(counters[-1], logits.gather(1, labels[:, None]).squeeze(1), logits.amax(1))
        if weights is None:
            return cross_entropy(logits, labels, reduction="sum")
        losses = cross_entropy(logits, labels, reduction="none") * weights.float()
        # added up as cross_entropy adds them: weights of 1 change no bit
        return nll_loss(-losses[:, None], torch.zeros_like(labels), reduction="sum")

    rows = rows_per_piece(getattr(head, "out_features", 2**17), hidden_RH.device.type)
    pieces = zip(*(given.split(rows) for given in (hidden_RH, labels_R, weights_R) if given is not None))
    return sum(checkpoint(piece_loss, *piece, use_reentrant=False) for piece in pieces)


def mean_loss(head: nn.Module, hidden_RH, labels_R, weights_R=None, count=None) -> torch.Tensor:
    """summed_loss over `count` where it is given, else over the sum of weights, or the number of labels where none are given."""
    if count is None:
        count = labels_R.numel() if weights_R is None else weights_R.float().sum()
    return summed_loss(head, hidden_RH, labels_R, weights_R) / count


class HeadLoss(torch.autograd.Function):
    """Forward: the summed loss, and both gradients while the exponentials are at hand. Backward: scales them."""

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, labels_R, rows_KH=None, row_ids_K=None, weights_R=None):
        device = hidden_RH.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_RH.dtype
        need_hidden, need_weight, _, need_rows, _, _ = ctx.needs_input_grad
        ctx.hidden_dtype, ctx.rows_dtype = hidden_RH.dtype, None if rows_KH is None else rows_KH.dtype
        largest = None
        with torch.autocast(device, enabled=False):
            if weights_R is not None and len(weights_R):
                # gradients are of shares of the largest, and backward does the rest: half precision holds them, whatever the weights are
                largest = weights_R.amax().clamp_min(torch.finfo(torch.float32).tiny)
                shares_R = weights_R / largest
            weight = weight_VH.to(dtype)
            # in float32 until backward has scaled it: fp16's loss scaling is there so that small gradients are not lost
            grad_hidden = torch.empty_like(hidden_RH, dtype=torch.float32) if need_hidden else None
            grad_weight = torch.zeros_like(weight_VH) if need_weight else None
            grad_rows = torch.zeros_like(rows_KH, dtype=torch.float32) if need_rows else None
            loss = hidden_RH.new_zeros((), dtype=torch.float32)
            piece = max(1, min(rows_per_piece(weight.shape[0], device), hidden_RH.shape[0]))
            # one buffer for all pieces: fresh memory for each would cost a page fault every 4 kB
            buffer = hidden_RH.new_empty((piece, weight.shape[0]), dtype=dtype)
            for at in range(0, hidden_RH.shape[0], piece):
                part = slice(at, at + piece)
                hidden, labels = hidden_RH[part].to(dtype), labels_R[part]
                logits = torch.mm(hidden, weight.T, out=buffer[: len(labels)])
                if rows_KH is not None:
                    put_row_logits(logits, hidden, rows_KH, row_ids_K)
                others_RV, Z_R, c_R, losses_R = exponentials(logits, labels, counters[-1] if counters else None)
                if largest is not None:
                    losses_R, Z_R, c_R = losses_R * weights_R[part], Z_R / shares_R[part], c_R * shares_R[part]
                loss += losses_R.sum()
                if rows_KH is not None:
                    of_rows_RK, c_R = take_columns(others_RV, Z_R, c_R, labels, row_ids_K)
                if need_hidden:
                    of_others = (others_RV @ weight).float().div_(Z_R[:, None])
                    grad_hidden[part] = of_others.addcmul_(c_R[:, None], weight_VH[labels].float())
                    if rows_KH is not None:
                        grad_hidden[part].addmm_(of_rows_RK, rows_KH.float())
                if need_weight:
                    add_weight_gradient(grad_weight, others_RV, hidden.float(), Z_R, c_R, labels)
                if need_rows:
                    grad_rows.addmm_(of_rows_RK.T, hidden.float())
        ctx.save_for_backward(largest, grad_hidden, grad_weight, grad_rows)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        largest, *gradients = ctx.saved_tensors
        scale = grad_loss if largest is None else grad_loss * largest
        grad_hidden, grad_weight, grad_rows = (None if gradient is None else gradient.mul_(scale) for gradient in gradients)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.hidden_dtype)
        if grad_rows is not None:
            grad_rows = grad_rows.to(ctx.rows_dtype)
        return grad_hidden, grad_weight, None, grad_rows, None, None


def take_columns(others_RV, Z_R, c_R, labels_R, row_ids_K):
    """(T (R, K) in float32, c (R,)): the trained rows' share of the gradient, taken out of others_RV and c; see above."""
    is_label_RK = labels_R[:, None] == row_ids_K
    of_rows_RK = others_RV[:, row_ids_K].float().div_(Z_R[:, None]) + is_label_RK * c_R[:, None]
    others_RV.index_fill_(1, row_ids_K, 0.0)
    return of_rows_RK, c_R.masked_fill(is_label_RK.any(1), 0.0)


def add_weight_gradient(grad_VH, others_RV, hidden_RH, Z_R, c_R, labels_R) -> None:
    """Adds a piece's dW to grad_VH, in its type."""
    scaled = (hidden_RH / Z_R[:, None]).to(others_RV.dtype)
    if grad_VH.dtype == others_RV.dtype:
        grad_VH.addmm_(others_RV.T, scaled)
    else:
        grad_VH += others_RV.T @ scaled
    grad_VH.index_add_(0, labels_R, (c_R[:, None] * hidden_RH).to(grad_VH.dtype))


def has_kernel(x: torch.Tensor) -> bool:
    """Whether Triton's kernel computes the exponentials."""
    return x.stride(1) == 1 and not why_no_triton(x.device, "head")


def add_hits(hits, label_logits_R, top_R) -> None:
    hits += (label_logits_R >= top_R).sum()


def exponentials(logits_RV: torch.Tensor, labels_R: torch.Tensor, hits: torch.Tensor | None = None):
    """(E' in the logits' type; in float32: Z, c and the loss, each (R,)). May overwrite the logits. hits: see counting()."""
    if has_kernel(logits_RV):
        from .head_loss_kernels import exponentials as in_one_kernel

        return in_one_kernel(logits_RV, labels_R, hits)
    logits, at_label = logits_RV.float(), labels_R[:, None]
    label_logits = logits.gather(1, at_label).squeeze(1)
    top_R = logits.amax(1)
    if hits is not None:
        add_hits(hits, label_logits, top_R)
    others = logits.sub_(top_R[:, None]).exp_().scatter_(1, at_label, 0.0)
    sum_R = others.sum(1)
    Z_R = sum_R + (label_logits - top_R).exp()
    return others.to(logits_RV.dtype), Z_R, -sum_R / Z_R, Z_R.log() + top_R - label_logits
