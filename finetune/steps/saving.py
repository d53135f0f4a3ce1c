"""What a run saves, checkpoints and the result: folders that are complete, load by themselves, and are either whole or not there."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, Trainer

from qwen_model.compat import overrides

from ..compat import on_transformers
from ..distributed import engines
from ..distributed.ranks import meeting
from ..folders import adapter_files
from ..folders.adapter_folder import adapter_model_card
from ..folders.checkpoint import RECORD
from ..folders.model_writer import saved_tensors
from ..folders.shards import read_tensors
from ..folders.tensor_files import MAX_SHARD_SIZE
from ..lora import pissa
from ..model.loading import compute_dtype
from .health import check_tensors


class SavesCheckpoints:
    """Mixin for a Trainer: its checkpoints and its result. All ranks take part. What is in a checkpoint beside the model, transformers writes.

    Where ranks hold shards, these are put together. The others wait at the store while the first writes, which may take longer than
    a collective operation waits.
    """

    @overrides(Trainer, "output_dir", "_internal_call")
    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Writes the model of a checkpoint."""
        model = self.accelerator.unwrap_model(self.model)
        tensors = engines.gather(model, self.engine)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_model(model, self.chat_tokenizer, folder, state_dict=tensors, record=self.record)
        meeting.wait("a model is written")

    def save_result(self) -> None:
        """What the run was for, in --output_dir. A full model in the precision of the passes: its float32 masters have done."""
        model = self.accelerator.unwrap_model(self.model)
        dtype = None if hasattr(model, "peft_config") else compute_dtype(self.args)
        tensors = engines.gather(model, self.engine, dtype)
        if self.args.process_index == 0:
            if tensors is None and dtype is not None:
                model.to(dtype)
            out = Path(self.args.output_dir)
            save_final(model, self.chat_tokenizer, out, state_dict=tensors, record=self.record)
        meeting.wait("the result is written")

    @overrides(Trainer, "model", "trial")
    def _save_checkpoint(self, model, trial) -> None:
        """Writes checkpoint-N beside its place and renames it when it is whole: one that is there can be resumed from."""
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        staging = Path(self.args.output_dir) / ".unfinished"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.look_at_norm()
        meeting.wait("there is room for a checkpoint")
        with on_transformers.checkpoints_into(self, staging), self.throughput.paused():
            super()._save_checkpoint(model, trial)
        meeting.wait("a checkpoint is written")
        if self.args.should_save:
            written = staging / place.name
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(place)
                self.state.save_to_json(written / "trainer_state.json")
            move_into_place(written, place)
            staging.rmdir()
        self.untidy = True  # until a step behind it went well, the one before it stays
        meeting.wait("a checkpoint is in its place")


def save_model(model, tokenizer, folder: Path, *, state_dict=None, record: dict | None = None) -> None:
    """Writes an adapter (peft) or a full model, with tokenizer, code and chat settings, into `folder`.

    An adapter folder holds the chat settings too: after merging, or beside its base, the model knows how to stop.
    """
    check_tensors((state_dict or trained_tensors(model)).items())
    folder.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True  # switched off in training; a saved model generates
    # peft would ask the hub whether the vocabulary has grown, to save the embedding; it never does here
    embeddings = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=MAX_SHARD_SIZE, **embeddings)
    pissa.save_start(model, folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if record:
        write_record(record, folder)
        if embeddings and (base := record.get("base", {}).get("name")):
            # in the place of peft's form, which nobody has filled in
            (folder / "README.md").write_text(adapter_model_card(base), encoding="utf-8")


def trained_tensors(model) -> dict[str, torch.Tensor]:
    """What training has changed, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def write_record(record: dict, folder: Path) -> None:
    """training.json: last of all, because it holds the hashes of an adapter's files."""
    content = json.dumps(adapter_files.with_hashes(record, folder), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / RECORD).write_text(content + "\n", encoding="utf-8")


def save_final(model, tokenizer, folder: Path, *, state_dict=None, record: dict | None = None) -> None:
    """The result of a run: written beside its place, opened again and compared, then moved into `folder` file by file.

    The config comes last: without it nothing loads, so a run that is killed here leaves no half model.
    """
    staging = folder / ".unfinished"
    shutil.rmtree(staging, ignore_errors=True)
    save_model(model, tokenizer, staging, state_dict=state_dict, record=record)
    pissa.make_plain(model, staging)
    if record:
        write_record(record, staging)  # once more: with PiSSA the result is another file
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
