"""What a run leaves on disk: its record, the fingerprint of an adapter's base, and its checkpoints."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from ..errors import UserError, note
from . import adapter_folder, config_files, hub, model_folder, quant_settings

RECORD = "training.json"


# ---- which base an adapter belongs to


def fingerprint(folder: Path) -> dict:
    """Identifies a base model: its sizes, and a hash of the first values of every tensor.

    Sharding and file format do not matter, nor does a type that holds the same values.
    """
    config = config_files.read_json(folder / "config.json")
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    found = {key: config.get(key) for key in keys} | {"sha256": hash_of_tensors(folder)}
    quantization = quant_settings.as_record(quant_settings.of_folder(folder))
    return found | ({"quantization": quantization} if quantization else {})


def hash_of_tensors(folder: Path) -> str:
    """SHA-256 of the names, shapes and first values of all tensors."""
    digest = hashlib.sha256()
    for line in sorted(beginnings(folder)):
        digest.update(line.encode())
    return digest.hexdigest()


def hash_of_adapter(folder: Path) -> str:
    """SHA-256 of an adapter's tensors and settings, without the path of its base."""
    settings = config_files.read_json(folder / "adapter_config.json")
    settings["base_model_name_or_path"] = None
    return hashlib.sha256((hash_of_tensors(folder) + json.dumps(settings, sort_keys=True)).encode()).hexdigest()


def beginnings(folder: Path, values: int = 8):
    """A line for each tensor: name, shape, first values. Reads a few bytes of each, not the file."""
    from .shards import Shards  # which imports torch

    with Shards(folder) as shards:
        for name in shards:
            shape = shards.shape(name)
            yield beginning(name, shape, shards.slice(name)[:1] if shape else shards[name], values)


def beginning(name: str, shape: list[int], tensor, values: int) -> str:
    return f"{name} {shape} {tensor.flatten()[:values].double().tolist()}\n"


def describe_fingerprint(print_: dict) -> str:
    """A fingerprint in words."""
    sizes = (
        f"hidden size {print_['hidden_size']}, {print_['num_hidden_layers']} layers, vocabulary {print_['vocab_size']}"
    )
    return f"{print_['model_type']}, {sizes}, fingerprint {print_['sha256'][:12]}"


def read_record(folder: Path) -> dict:
    """training.json, or {} for a folder that this toolkit did not write."""
    path = folder / RECORD
    return config_files.read_json(path) if path.is_file() else {}


def check_base(adapter: Path, base: Path, remedy: str = "give that one with --base") -> None:
    """Refuses an adapter on another base than the one it was trained on."""
    made_for = read_record(adapter).get("base", {}).get("fingerprint")
    if made_for is None:
        return  # an adapter of other hands says nothing; shapes are checked when it is loaded
    found = fingerprint(base)
    if quant_settings.may_take(made_for, found, base):
        note(f"{adapter}: was trained over a quantized base, and {base} fits it in sizes: taken for its 16-bit sibling")
    elif found != made_for:
        raise UserError(
            f"{adapter}: the adapter was made for another base ({describe_fingerprint(made_for)}); "
            f"{base} is {describe_fingerprint(found)} - {remedy}"
        )


def find_base(adapter: Path, name: str | None = None) -> Path:
    """The folder of an adapter's base: `name`, or the one that the adapter names. Refuses another base than it was made for."""
    stored = config_files.read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    name = name or stored
    folder, why = None, ""
    try:
        folder = hub.find_folder(name) if name else None
    except hub.NotFetched as error:
        why = f" ({error.why})" if model_folder.is_hub_id(name) else ""
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(f"{adapter}: its base {name} was not found{why} - give it with --base")
    check_base(adapter, folder)
    adapter_folder.check_adapter(adapter, folder)
    return folder


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
    """Are there checkpoints, complete or not, written by processes of these agents (see ranks.launch)?"""
    records = [read_record(path.parent) for path in output_dir.glob(f"checkpoint-*/{RECORD}")]
    return any(set(launches) & set(record.get("launches", ())) for record in records)


def is_complete(path: Path) -> bool:
    """Can a run resume exactly from here? Not from an interrupted save, nor from --save_only_model.

    The optimizer's state lies in one file, or as shards in a folder that DeepSpeed (file `latest`) or FSDP (optimizer_0) made.
    """
    optimizer = any((path / name).exists() for name in ("optimizer.pt", "latest", "optimizer_0", "optimizer.bin"))
    return optimizer and all((path / name).is_file() for name in ("trainer_state.json", "scheduler.pt"))


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
