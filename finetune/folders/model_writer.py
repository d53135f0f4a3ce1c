"""A model's folder, written from a stream of tensors: everything that a loader needs, and never the whole model in memory."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import custom_object_save

from .. import json_text
from ..errors import UserError
from ..writing.new_folder import hide_config_until_done
from . import output_folder
from .shards import ShardWriter


def skeleton(config):
    """The model on the meta device: which code and tensors a folder must hold."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tensor_shapes(model) -> dict[str, list[int]]:
    """{name: shape} of the tensors that are saved; for tied weights, the key that is saved."""
    return {name: list(tensor.shape) for name, tensor in saved_tensors(model).items()}


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype, remedy: str) -> torch.Tensor:
    """The tensor in the type it is written in; UserError, with the remedy, for values that the type cannot hold."""
    made = tensor.to(dtype)
    if made.isfinite().all():
        return made
    if not tensor.isfinite().all():
        raise UserError(f"{name}: holds infinities, or what is no number - the model is broken; take an earlier checkpoint")
    what = f"has values up to {tensor.abs().max().item():.3g}, which {str(dtype).removeprefix('torch.')} cannot hold"
    raise UserError(f"{name}: {what} - {remedy}")


def write_frame(folder: Path, model, tokenizer, generation_config, dtype: torch.dtype, record: dict, card: str) -> None:
    """All but the weights: config, code, generation_config, tokenizer, the record of its making, README.md.

    model: a skeleton, or the model itself; its config is written as it is, with `dtype`. From here on the folder only loads
    as long as this process lives (see new_folder.hide_config_until_done).
    """
    config = model.config
    config.use_cache, config.dtype = True, dtype
    if config.model_type == "qwen":  # which says it in three flags as well
        config.bf16, config.fp16, config.fp32 = (dtype == of for of in (torch.bfloat16, torch.float16, torch.float32))
    config.architectures = [type(model).__name__]
    if model._auto_class is not None:  # first-generation Qwen's code goes along
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    json_text.write(folder / output_folder.RECORD, record)
    (folder / "README.md").write_text(card, encoding="utf-8")
    hide_config_until_done(folder)


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int, expected: dict[str, list[int]]
) -> None:
    """Writes the tensors, and checks that they are those expected: {name: shape}. RuntimeError if they are not."""
    writer, missing = ShardWriter(folder, max_bytes), dict(expected)
    for name, tensor in tensors:
        shape = missing.pop(name, None)
        if shape != list(tensor.shape):
            wanted = "is not expected" if shape is None else f"should be {shape}"
            raise RuntimeError(f"{folder}: {name} {list(tensor.shape)} {wanted}: this is a fault of the toolkit")
        writer.add(name, tensor)
    if missing:
        raise RuntimeError(f"{folder}: {len(missing)} tensors were not made, the first is {next(iter(missing))}")
    writer.close()


def saved_tensors(model, state_dict=None) -> dict[str, torch.Tensor]:
    """{name: tensor} as save_pretrained writes them. state_dict: the gathered one of a sharded model."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    tensors = model.state_dict() if state_dict is None else state_dict
    tied = model.all_tied_weights_keys  # a head that is its embedding: written once
    return {name: tensor for name, tensor in tensors.items() if name not in tied}
