"""What a run saves: folders that are complete, load by themselves, and are either whole or not there."""

import json
import os
import shutil
from pathlib import Path

import torch

from ..folders.adapter_folder import adapter_model_card
from ..folders.checkpoint import RECORD
from ..folders.model_writer import saved_tensors
from ..folders.shards import read_tensors
from ..folders.tensor_files import MAX_SHARD_SIZE
from ..lora import pissa


def save_model(model, tokenizer, folder: Path, *, state_dict=None, record: dict | None = None) -> None:
    """Writes an adapter (peft) or a full model, with tokenizer, code and chat settings, into `folder`.

    An adapter folder holds the chat settings too: after merging, or beside its base, the model knows how to stop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True  # switched off in training; a saved model generates
    # peft would ask the hub whether the vocabulary has grown, to save the embedding; it never does here
    embeddings = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=MAX_SHARD_SIZE, **embeddings)
    pissa.save_start(model, folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if record:
        (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if embeddings and (base := record.get("base", {}).get("name")):
            # in the place of peft's form, which nobody has filled in
            (folder / "README.md").write_text(adapter_model_card(base), encoding="utf-8")


def save_final(model, tokenizer, folder: Path, *, state_dict=None, record: dict | None = None) -> None:
    """The result of a run: written beside its place, opened again and compared, then moved into `folder` file by file.

    The config comes last: without it nothing loads, so a run that is killed here leaves no half model.
    """
    staging = folder / ".unfinished"
    shutil.rmtree(staging, ignore_errors=True)
    save_model(model, tokenizer, staging, state_dict=state_dict, record=record)
    pissa.make_plain(model, staging)
    verify(staging, model, state_dict)
    remove_result(folder)
    for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", "adapter_config.json")):
        move_into_place(path, folder / path.name)
    staging.rmdir()


def remove_result(folder: Path) -> None:
    """Removes what an earlier save left in `folder`, the configs first: an adapter beside a full model would be put onto it."""
    weights = [path for ending in ("safetensors", "bin", "index.json") for path in folder.glob(f"*.{ending}")]
    for path in [folder / "adapter_config.json", folder / "config.json", *weights]:
        path.unlink(missing_ok=True)


def move_into_place(written: Path, place: Path) -> None:
    """Renames a file or folder over what may stand there."""
    if place.is_dir():
        shutil.rmtree(place)
    os.replace(written, place)


def verify(folder: Path, model, state_dict=None) -> None:
    """Reads a saved folder again: every tensor is compared with the model's, bit by bit, and config and tokenizer are opened.

    Raises RuntimeError naming the first difference: a run must not end in a folder that does not load.
    """
    from transformers import AutoConfig, AutoTokenizer

    expected = pissa.as_plain(model, saved_tensors(model, state_dict))
    for name, tensor in read_tensors(folder):
        wanted = expected.pop(name, None)
        if wanted is None or wanted.shape != tensor.shape or not torch.equal(wanted.to(tensor.dtype).cpu(), tensor):
            raise RuntimeError(
                f"{folder}: {name} was not written as it stands in memory; the disk or its quota may be at fault"
            )
    if expected:
        raise RuntimeError(f"{folder}: {len(expected)} tensors are missing, the first is {next(iter(expected))}")
    if (folder / "config.json").is_file():
        AutoConfig.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
