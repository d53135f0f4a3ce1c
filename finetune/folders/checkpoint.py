"""What is saved: folders that are complete, load by themselves, and are either whole or not there."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import UserError, note
from ..lora import pissa
from ..quantized import quantized_model

RECORD = "training.json"
MAX_SHARD_SIZE = "2GB"


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
            (folder / "README.md").write_text(adapter_card(base), encoding="utf-8")


def adapter_card(base: str) -> str:
    """What an adapter is, for people and for the hub. Of a base that was a folder, the name only."""
    base = Path(base).name if os.path.isdir(base) else base
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\n---\n\n# LoRA adapter for {base}\n\n"
        "training.json says how it was made: data, settings, versions, and the fingerprint of its base. Try it with\n"
        "`python -m finetune.ask THIS_FOLDER`, make a model of it that stands alone with\n"
        "`python -m finetune.merge THIS_FOLDER OUT`, or open it with peft on its base.\n"
    )


def save_final(model, tokenizer, folder: Path, *, state_dict=None, record: dict | None = None) -> None:
    """The result of a run: written beside its place, opened again and compared, then moved into `folder` file by file.

    The file without which nothing loads (the config) comes last, so a run that is killed here leaves no half model.
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


def saved_tensors(model, state_dict=None) -> dict[str, torch.Tensor]:
    """The tensors that save_pretrained writes, under the names that it writes. state_dict: of a model in shards."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    tensors = model.state_dict() if state_dict is None else state_dict
    tied = model.all_tied_weights_keys  # a head that is its embedding: written once
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: the index's shards, or the one file; safetensors before .bin."""
    for name in ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / shard for shard in sorted(shards)]
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(
        f"{folder}: no weights (model.safetensors, pytorch_model.bin or an index of shards) - give a complete folder"
    )


def read_tensors(folder: Path):
    """Yields (name, tensor), one at a time; .bin files are read with weights_only."""
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of a folder's weights as they lie there."""
    return next(tensor.dtype for _, tensor in read_tensors(folder) if tensor.is_floating_point())


# ---- which base an adapter belongs to


def fingerprint(folder: Path) -> dict:
    """What tells a base model from another: its sizes, and a hash of the first values of every tensor.

    Sharding and file format do not matter, nor does a type that holds the same values.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    found = {key: config.get(key) for key in keys} | {"sha256": hash_of_tensors(folder)}
    quantization = quantized_model.describe(quantized_model.of_folder(folder))
    return found | ({"quantization": quantization} if quantization else {})


def hash_of_tensors(folder: Path) -> str:
    """Of the names, shapes and first values of all."""
    digest = hashlib.sha256()
    for line in sorted(beginnings(folder)):
        digest.update(line.encode())
    return digest.hexdigest()


def hash_of_adapter(folder: Path) -> str:
    """Of its tensors and its settings, but for where its base lay."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = None
    return hashlib.sha256((hash_of_tensors(folder) + json.dumps(settings, sort_keys=True)).encode()).hexdigest()


def beginnings(folder: Path, values: int = 8):
    """A line for each tensor: name, shape, first values. Reads a few bytes of each, not the file."""
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    yield beginning(name, shape, part[:1] if shape else file.get_tensor(name), values)
        else:
            for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
                yield beginning(name, list(tensor.shape), tensor[:1] if tensor.ndim else tensor, values)


def beginning(name: str, shape: list[int], tensor: torch.Tensor, values: int) -> str:
    return f"{name} {shape} {tensor.flatten()[:values].double().tolist()}\n"


def describe(print_: dict) -> str:
    """A fingerprint in words."""
    sizes = (
        f"hidden size {print_['hidden_size']}, {print_['num_hidden_layers']} layers, vocabulary {print_['vocab_size']}"
    )
    return f"{print_['model_type']}, {sizes}, fingerprint {print_['sha256'][:12]}"


def read_record(folder: Path) -> dict:
    """What a run wrote about itself, or {} for a folder from elsewhere."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_base(adapter: Path, base: Path, remedy: str = "give that one with --base") -> None:
    """Refuses an adapter on another base than the one it was trained on."""
    made_for = read_record(adapter).get("base", {}).get("fingerprint")
    if made_for is None:
        return  # an adapter of other hands says nothing; shapes are checked when it is loaded
    found = fingerprint(base)
    if quantized_model.may_take(made_for, found, base):
        note(f"{adapter}: was trained over a quantized base, and {base} fits it in sizes: taken for its 16-bit sibling")
    elif found != made_for:
        raise UserError(
            f"{adapter}: the adapter was made for another base ({describe(made_for)}); {base} is {describe(found)} - "
            f"{remedy}"
        )


# ---- checkpoints of a run


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and is_complete(path)
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def of_launch(output_dir: Path, launches: list[str]) -> bool:
    """Whether checkpoints lie there, whole or not, that processes of these agents (see ranks.launch) have written."""
    records = [read_record(path.parent) for path in output_dir.glob(f"checkpoint-*/{RECORD}")]
    return any(set(launches) & set(record.get("launches", ())) for record in records)


def is_complete(path: Path) -> bool:
    """Whether a run can go on from there to the same weights: not from an interrupted save, nor from --save_only_model.

    The optimizer's state lies in one file, or as shards in a folder that DeepSpeed (file `latest`) or FSDP (optimizer_0) made.
    """
    optimizer = any((path / name).exists() for name in ("optimizer.pt", "latest", "optimizer_0", "optimizer.bin"))
    return optimizer and all((path / name).is_file() for name in ("trainer_state.json", "scheduler.pt"))


def check_same_run(path: Path, now: dict) -> dict:
    """The record of a checkpoint ({} without one). Refuses that of another base, other data, other steps or another optimizer."""
    before = read_record(path) or {}
    kept = {
        "base model": lambda record: record["base"]["fingerprint"]["sha256"][:12],
        "data as rendered": lambda record: record["data"]["fingerprint"][:12],
        "samples per step": lambda record: record["samples_per_step"],
        "seed": lambda record: record["seed"],
        "engine": engine_of,
        "precision": lambda record: record.get("precision"),
        # a record without these is older than they are
        "--bf16_weights": lambda record: record.get("bf16_weights", now.get("bf16_weights")),
        "--optim": lambda record: record.get("optim", now.get("optim")),
        "quantization": lambda record: record.get("method", {}).get("quantization"),
        "what trains": what_trains,
    }
    changed = [f"{name}: {of(before)}, now {of(now)}" for name, of in kept.items() if before and of(before) != of(now)]
    if changed:
        raise UserError(
            f"{path}: is of another run ({'; '.join(changed)}) - give the flags and files that it was started with, or another "
            "--output_dir"
        )
    return before


def engine_of(record: dict) -> str:
    """What a checkpoint's optimizer state is laid out for: one file serves any number of processes, shards only as many."""
    engine = record.get("engine", "one process")
    return "one process or DDP" if engine in ("one process", "DDP") else f"{engine} on {record['ranks']} ranks"


def what_trains(record: dict) -> str:
    """The settings that decide which tensors a checkpoint holds beside those of plain LoRA, and for which base."""
    names = ("train_embeddings", "train_tokens", "use_dora", "use_rslora", "init_lora_weights", "loraplus_lr_ratio")
    method = record.get("method", {})
    return ", ".join(f"{name} {method[name]}" for name in names if method.get(name)) or "as usual"


def keep_newest(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Removes the oldest checkpoints above `limit`; never the best or the newest."""
    if not limit or limit < 1:
        return
    every = checkpoints(output_dir)
    removable = [path for path in every[:-1] if best is None or path.resolve() != Path(best).resolve()]
    for path in removable[: max(0, len(every) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def remove_all(output_dir: Path) -> None:
    """Removes an earlier run's checkpoints (--overwrite_output_dir): beside this run's they would count as the newest."""
    for path in [*checkpoints(output_dir), output_dir / ".unfinished"]:
        if path.is_dir():
            note(f"removing {path}, of an earlier run")
            shutil.rmtree(path)


def resume_point(output_dir: Path, wish: str | None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means: None, the newest complete one ("auto", "True"), or a path."""
    if wish is None or str(wish).lower() in ("", "false", "none"):
        return None
    if str(wish).lower() in ("auto", "true"):
        every = checkpoints(output_dir)
        return every[-1] if every else None
    path = Path(wish)
    if not is_complete(path):
        raise UserError(
            f"--resume_from_checkpoint {wish}: no complete checkpoint there - give one of checkpoint-N, or auto"
        )
    return path
