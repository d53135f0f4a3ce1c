"""The language-model head and its loss, in one pass and in pieces.

The logits of a 152k vocabulary are the largest tensor of a training step by far. Here they exist for a few rows at a
time: each piece is projected, its loss added up, and its gradient taken at once, from the same exponentials. Only rows
that are supervised are ever projected. The result is plain cross-entropy, to rounding.

With logits z = W h, m = max z, E = exp(z - m) and Z = sum E, for a row whose label is y:

    loss = log Z + m - z_y        dh = W^T E / Z - W_y        dW = E (h / Z)^T, minus h in row y

so neither the probabilities nor their difference from the label are ever written out.

Shapes: R rows (supervised positions), H hidden size, V vocabulary.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

# Logits of one piece, in elements (times 4 bytes). On a CPU more brings nothing (measured); a GPU reads the whole head once
# a piece, which takes some hundred rows to pay off.
PIECE_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


def rows_per_piece(vocab_size: int, device: str) -> int:
    """How many rows are projected at a time."""
    return max(16, PIECE_ELEMENTS.get(device, 2**24) // vocab_size)


class LMHead(nn.Linear):
    """A linear head (V, H) that, given labels, returns the sum of the token losses instead of logits.

    The loss is taken inside forward, so that whatever gathers the weight around a module's forward (ZeRO-3, FSDP) has it.
    """

    def forward(self, hidden, labels=None):
        """hidden (..., H) -> logits (..., V); with labels (R,) and hidden (R, H) -> the summed cross-entropy, float32."""
        if labels is None:
            return super().forward(hidden)
        return HeadLoss.apply(hidden, self.weight, labels)


def summed_loss(head: nn.Module, hidden_RH: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the cross-entropy of head(hidden) against labels; float32 scalar.

    Any module serves as head. An LMHead, also inside peft's wrapper for modules trained whole, takes the fused way; another
    (a LoRA on the head, say) is called piece by piece, and again in the backward pass.
    """
    if hidden_RH.shape[0] == 0:
        return (hidden_RH * 0).sum().float()  # keeps the graph: a pass without supervised tokens still has gradients
    wrapped = getattr(head, "original_module", head) if hasattr(head, "modules_to_save") else head
    if isinstance(wrapped, LMHead):
        return head(hidden_RH, labels=labels_R)

    def piece_loss(hidden, labels):
        return cross_entropy(head(hidden).float(), labels, reduction="sum")

    rows = rows_per_piece(getattr(head, "out_features", 2**17), hidden_RH.device.type)
    pieces = zip(hidden_RH.split(rows), labels_R.split(rows))
    return sum(checkpoint(piece_loss, hidden, labels, use_reentrant=False) for hidden, labels in pieces)


class HeadLoss(torch.autograd.Function):
    """Forward: the summed loss, and both gradients while the exponentials are at hand. Backward: scales them."""

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, labels_R):
        device = hidden_RH.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_RH.dtype
        need_hidden, need_weight, _ = ctx.needs_input_grad
        with torch.autocast(device, enabled=False):
            weight = weight_VH.to(dtype)
            grad_hidden = torch.empty_like(hidden_RH) if need_hidden else None
            grad_weight = torch.zeros_like(weight_VH) if need_weight else None
            loss = hidden_RH.new_zeros((), dtype=torch.float32)
            rows = min(rows_per_piece(weight.shape[0], device), hidden_RH.shape[0])
            # one buffer for all pieces: fresh memory for each would cost a page fault every 4 kB
            buffer = hidden_RH.new_empty((rows, weight.shape[0]), dtype=dtype)
            for at in range(0, hidden_RH.shape[0], rows):
                part = slice(at, at + rows)
                hidden, labels = hidden_RH[part].to(dtype), labels_R[part]
                logits = torch.mm(hidden, weight.T, out=buffer[: len(labels)])
                exp_RV, Z_R, piece_loss = exponentials(logits, labels)
                loss += piece_loss
                if need_hidden:
                    grad_hidden[part] = (exp_RV @ weight).float().div_(Z_R[:, None]) - weight_VH[labels]
                if need_weight:
                    scaled = (hidden / Z_R[:, None]).to(dtype)
                    if grad_weight.dtype == dtype:
                        grad_weight.addmm_(exp_RV.T, scaled)
                    else:
                        grad_weight += exp_RV.T @ scaled
                    grad_weight.index_add_(0, labels, hidden.to(grad_weight.dtype), alpha=-1)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss.to(grad_weight.dtype))
        return grad_hidden, grad_weight, None


def exponentials(logits_RV: torch.Tensor, labels_R: torch.Tensor):
    """(exp(z - max z) in the logits' type, its sums Z (R,) in float32, the summed loss in float32)."""
    logits = logits_RV.float()
    label_logits = logits.gather(1, labels_R[:, None]).squeeze(1)
    top_R = logits.amax(1)
    exp = logits.sub_(top_R[:, None]).exp_()
    Z_R = exp.sum(1)
    loss = (Z_R.log() + top_R - label_logits).sum()
    return exp.to(logits_RV.dtype), Z_R, loss
