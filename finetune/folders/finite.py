"""Numbers that are none: the first tensor that holds an infinity, or what is no number, is named, in memory or in files."""

from collections.abc import Iterable
from pathlib import Path

import torch

from ..distributed import ranks
from ..errors import UserError
from .shards import Shards


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first of (name, tensor) that is not finite; None where all are. One pass over each."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether each element is a finite number. So counts what can hold no other, lies on the meta device, or is packed in bytes.

    The sum comes first, which allocates nothing: what memory can deliver, some GB a second on a CPU. That of finite numbers
    may overflow, so then the elements are looked at one by one.
    """
    tensor = tensor.detach()
    if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def check_model(model, folder: Path, remedy: str) -> None:
    """UserError for a loaded model with weights or buffers that are not finite. folder: which it was loaded from."""
    refuse(first_not_finite([*model.named_parameters(), *model.named_buffers()]), folder, remedy)


def check_files(folder: Path, remedy: str, shared_out: bool = False) -> None:
    """The same from a folder's files, which are read whole. shared_out: each rank reads its share of the tensors."""
    begin, step = (ranks.rank(), ranks.count()) if shared_out else (0, 1)
    with Shards(folder) as shards:
        refuse(first_not_finite((name, shards[name]) for name in list(shards)[begin::step]), folder, remedy)


def refuse(name: str | None, folder: Path, remedy: str) -> None:
    if name is not None:
        raise UserError(f"{folder}: {name} holds infinities, or what is no number - {remedy}")
