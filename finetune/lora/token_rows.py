"""A few trained rows of embedding and head over frozen matrices.

Storage and files are peft's own (`trainable_token_indices`), so that an adapter folder loads with plain peft. peft's
forward copies the whole matrix to put the rows in place, and its backward makes a gradient of that size: gigabytes on a 7B
model. Here the frozen matrix is read as it is, and only what concerns the rows is computed anew.

Imported where adapters are made: it needs peft.
"""

import torch
from torch.nn.functional import embedding

from qwen_model.compat import overrides
from qwen_model.head_loss import LMHead, put_row_logits

from ..compat import on_peft

theirs = on_peft.token_classes()


class TokenRows(theirs.TrainableTokensLayer):
    """peft's layer around an embedding or a head, with a forward that copies no matrix.

    The rows are read inside this module's forward, through its parameters: there ZeRO-3 gathers them.
    """

    @overrides(theirs.TrainableTokensLayer, "x", "active_adapters")
    def forward_adapters(self, x, active_adapters, *args, **kwargs):
        """ids (B, T) -> (B, T, H), or hidden (..., H) -> logits (..., V); a head of ours also takes labels and their weights."""
        if self.disable_adapters or self.merged or not active_adapters:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        (adapter,) = active_adapters
        rows_KH = self.trainable_tokens_delta[adapter]
        if isinstance(self.base_layer, torch.nn.Embedding):
            return put_rows(self.base_layer(x), x, rows_KH, self.row_ids)
        if isinstance(self.base_layer, LMHead):
            return self.base_layer(x, *args, rows=rows_KH, row_ids=self.row_ids, **kwargs)
        logits = self.base_layer(x, *args, **kwargs)
        return put_row_logits(logits, x, rows_KH, self.row_ids)


class TokenRowsWrapper(theirs.TrainableTokensWrapper):
    """peft's wrapper, which hands on all that the head takes, labels and their weights too."""

    @property
    def takes_labels(self) -> bool:
        """Whether what is wrapped returns a loss where it is given labels; see head_loss.summed_loss."""
        return getattr(self.original_module, "takes_labels", False)

    @overrides(theirs.TrainableTokensWrapper, "x")
    def _forward_wrapped(self, x, *args, **kwargs):
        return self.token_adapter(x, *args, **kwargs)


def put_rows(embedded, ids, rows_KH, row_ids_K):
    """embedded (..., H) with the trained rows where ids (...) is one of row_ids; the gradient goes to the rows."""
    is_row = ids[..., None] == row_ids_K
    trained = embedding(is_row.int().argmax(-1), rows_KH.to(embedded.dtype))
    return torch.where(is_row.any(-1, keepdim=True), trained, embedded)


def install(model) -> None:
    """Turns the layers of trained rows that peft put into `model` into ours. Without any, nothing happens."""
    for wrapper in [module for module in model.modules() if isinstance(module, theirs.TrainableTokensWrapper)]:
        layer = wrapper.token_adapter
        (adapter,) = layer.token_indices
        ids = torch.tensor(layer.token_indices[adapter], device=layer.get_base_layer().weight.device)
        layer.register_buffer("row_ids", ids, persistent=False)
        layer.__class__, wrapper.__class__ = TokenRows, TokenRowsWrapper
