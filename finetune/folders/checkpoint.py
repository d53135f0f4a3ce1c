"""What a run leaves on disk: its record, the fingerprint of an adapter's base, and its checkpoints."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from ..distributed import engines
from ..errors import UserError, note, warn
from . import (
    adapter_files,
    adapter_folder,
    config_files,
    durable,
    hub,
    meant,
    model_folder,
    output_folder,
    quant_settings,
    settings_files,
)  # fmt: skip
from .output_folder import RECORD

# ---- which base an adapter belongs to


SPOTS, RUN = 16, 8  # places in each tensor that a fingerprint looks at, and values at each


def fingerprint(folder: Path) -> dict:
    """Identifies a base model: its sizes, a hash of the first values of every tensor, and one of values spread over them.

    Sharding and file format do not matter, nor does a type that holds the same values. What differs between a model and
    its fine-tuned sister differs nearly everywhere; a few values changed by hand may lie between the places looked at.
    """
    config = config_files.read_json(folder / "config.json")
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    found = {key: config.get(key) for key in keys} | {"sha256": hash_of_tensors(folder), "spread": hash_of_spread(folder)}
    quantization = quant_settings.as_record(quant_settings.of_folder(folder))
    return found | ({"quantization": quantization} if quantization else {})


def hash_of_tensors(folder: Path) -> str:
    """SHA-256 of the names, shapes and first values of all tensors."""
    return hash_of_lines(beginnings(folder))


def hash_of_spread(folder: Path) -> str:
    """SHA-256 of names, shapes and values all over the tensors: SPOTS places in each, evenly spread, RUN values at each."""
    from .shards import Shards  # which imports torch

    with Shards(folder) as shards:
        return hash_of_lines(spread(name, shards) for name in shards)


def hash_of_lines(lines) -> str:
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode())
    return digest.hexdigest()


def spread(name: str, shards) -> str:
    """A line with a tensor's shape and values at places that its shape decides, the last one its end. Reads these values alone."""
    shape = shards.shape(name)
    if not shape or 0 in shape:
        return f"{name} {shape}\n"
    part, rows, width = shards.slice(name), shape[0] if len(shape) > 1 else 1, shape[-1]
    places, found = [spot * (rows * width - 1) // (SPOTS - 1) for spot in range(SPOTS)], []
    for row, column in (divmod(place, width) for place in places):
        begin = min(column, max(0, width - RUN))
        run = slice(begin, begin + RUN)
        values = part[run] if len(shape) == 1 else part[row : row + 1, ..., run]
        found += values.flatten()[:RUN].double().tolist()
    return f"{name} {shape} {found}\n"


def is_same_base(one: dict, other: dict) -> bool:
    """Whether two fingerprints are of the same base. An older one has no "spread": then the first values decide."""
    if "spread" in one and "spread" in other:
        return one == other
    return {**one, "spread": None} == {**other, "spread": None}


def short_print(print_: dict, beside: dict) -> str:
    """A fingerprint in short, with what both have in common: to be compared with `beside`, and shown."""
    both = "spread" in print_ and "spread" in beside
    return print_["sha256"][:12] + (f"-{print_['spread'][:8]}" if both else "")


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
    return f"{print_['model_type']}, {sizes}, fingerprint {print_['sha256'][:12]}" + (f"-{print_['spread'][:8]}" if "spread" in print_ else "")


def read_record(folder: Path) -> dict:
    """training.json, or {} for a folder that this toolkit did not write; without the hashes of the folder's own files."""
    path = folder / RECORD
    record = config_files.read_json(path) if path.is_file() else {}
    if wrong := settings_files.value_problems(path, record, settings_files.OF_RECORD):
        raise UserError(*wrong)
    return {key: value for key, value in record.items() if key != "files" and not (key in settings_files.OF_RECORD and value is None)}


def check_base(adapter: Path, base: Path, remedy: str = "give that one with --base") -> None:
    """Refuses an adapter on another base than the one it was trained on."""
    made_for = read_record(adapter).get("base", {}).get("fingerprint")
    if made_for is None:
        return  # an adapter of other hands says nothing; shapes are checked when it is loaded
    if not isinstance(made_for, dict) or not {"sha256", "model_type", "hidden_size", "num_hidden_layers", "vocab_size"} <= made_for.keys():
        raise UserError(f"{adapter / RECORD}: the fingerprint of the base in it is damaged - copy the adapter's folder again")
    found = fingerprint(base)
    if quant_settings.may_take(made_for, found, base):
        note(f"{adapter}: was trained over a quantized base, and {base} fits it in sizes: taken for its 16-bit sibling")
    elif not is_same_base(found, made_for):
        raise UserError(
            f"{adapter}: the adapter was made for another base ({describe_fingerprint(made_for)}); "
            f"{base} is {describe_fingerprint(found)} - {remedy}"
        )


def find_base(adapter: Path, name: str | None = None) -> Path:
    """The folder of an adapter's base: `name`, or the one that the adapter names. Refuses another base than it was made for."""
    adapter_files.check(adapter)
    stored = config_files.read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    name = name or stored
    folder, why = None, ""
    try:
        folder = hub.find_folder(name) if name else None
    except hub.NotFetched as error:
        why = f" ({error.why})" if model_folder.is_hub_id(name) else ""
    if folder is None or not (folder / "config.json").is_file():
        what = f"{adapter}: its base {name} was not found{why} - give it with --base"
        if name is not stored:
            what = f"--base {name}: no model was found there{why} - give the folder of {adapter}'s base"
        raise UserError(what + (meant.folder(name) if name else ""))
    check_base(adapter, folder)
    adapter_folder.check_adapter(adapter, folder)
    if problems := model_folder.first_problems(folder, may_be_quantized=True):
        raise UserError(*problems)
    return folder


# ---- checkpoints of a run


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. What is in their files, faults() of durable.py tells."""
    return [path for path in numbered(output_dir) if is_complete(path)]


def of_launch(output_dir: Path, launches: list[str]) -> bool:
    """Are there checkpoints, complete or not, written by processes of these agents (see ranks.launch)?"""
    records = [read_record(path.parent) for path in output_dir.glob(f"checkpoint-*/{RECORD}")]
    return any(set(launches) & set(record.get("launches", ())) for record in records)


def is_complete(path: Path) -> bool:
    """Can a run resume exactly from here? Not from an interrupted save, nor from --save_only_model.

    The optimizer's state lies in one file, or as shards in a folder that DeepSpeed (file `latest`) or FSDP (optimizer_0) made.
    """
    if durable.has_manifest(path) and durable.verify(path, hashes=False):
        return False
    optimizer = any((path / name).exists() for name in ("optimizer.pt", "latest", "optimizer_0", "optimizer.bin"))
    return optimizer and all((path / name).is_file() for name in ("trainer_state.json", "scheduler.pt"))


def keep_newest(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Removes the oldest checkpoints above `limit`; never the best or the newest, and none before the newest is read and found whole."""
    if not limit or limit < 1:
        return
    every = checkpoints(output_dir)
    removable = [path for path in every[:-1] if best is None or path.resolve() != Path(best).resolve()]
    removable = removable[: max(0, len(every) - limit)]
    if removable and (wrong := durable.faults(every[-1])):
        warn(f"{every[-1]}: {in_short(wrong)}; the checkpoints before it are kept, and the disk should be looked at")
        return
    for path in removable:
        output_folder.discard(path)


def remove_all(output_dir: Path) -> None:
    """Removes an earlier run's checkpoints (--overwrite_output_dir): beside this run's they would count as the newest."""
    written = [path for path in numbered(output_dir) if output_folder.is_checkpoint(path)]
    for path in [*written, *output_folder.leftovers(output_dir)]:
        note(f"removing {path}, of an earlier run")
        shutil.rmtree(path)


def resume_point(output_dir: Path, wish: str | None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means: None, the newest whole one ("auto", "True"), or a path.

    Of damaged ones, the one before is taken, which tell_of() says. UserError where a path, or all there are, cannot be gone on from.
    """
    if wish is None or str(wish).lower() in ("", "false", "none"):
        return None
    if str(wish).lower() in ("auto", "true"):
        return newest_whole(output_dir)
    path = Path(wish)
    if wrong := durable.faults(path):
        raise UserError(f"--resume_from_checkpoint {wish}: {in_short(wrong)} - give another of checkpoint-N, or auto for the newest whole one")
    if not is_complete(path):
        raise UserError(
            f"--resume_from_checkpoint {wish}: no complete checkpoint there - give one of checkpoint-N, or auto"
        )
    return path


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint of which every file is as it was written; None where there is no checkpoint."""
    damaged = []
    for path in reversed(numbered(output_dir)):
        if wrong := durable.faults(path):
            damaged.append(f"{path.name}: {in_short(wrong)}")
        elif is_complete(path):
            return path
    if damaged:
        remedy = "give another --output_dir, or --overwrite_output_dir to begin anew"
        raise UserError(f"{output_dir}: no checkpoint is whole ({'; '.join(damaged)}) - {remedy}")
    return None


def tell_of(path: Path, wish: str) -> None:
    """Says what is to be known of resume_point()'s answer: which newer ones are damaged, and whether it could be checked at all."""
    for newer in numbered(path.parent) if str(wish).lower() in ("auto", "true") else ():
        if int(newer.name.split("-")[1]) > int(path.name.split("-")[1]) and (wrong := durable.faults(newer)):
            warn(f"{newer}: {in_short(wrong)}; going on from {path.name}, the newest that is whole")
    if not durable.has_manifest(path):
        note(f"{path}: is of an older version, without a manifest, so whether its files are as they were written is not known")


def in_short(wrong: list[str]) -> str:
    """What is wrong with a checkpoint, in one line."""
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def numbered(output_dir: Path) -> list[Path]:
    """Folders called checkpoint-N, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def check_trusted(path: Path, engine: str, trusted: bool) -> None:
    """DeepSpeed and FSDP read their shards by unpickling, which can run any code: refused unless a run of this user wrote them.

    One process and DDP read weights alone (torch's weights_only). trusted: --trust_checkpoint.
    """
    if trusted or engine in (engines.ONE, engines.DDP) or durable.is_ours(path):
        return
    what = f"{path}: {engine} reads it by unpickling, which can run any code, and it has no manifest signed with this user's key"
    raise UserError(f"{what} - if you know who wrote it, add --trust_checkpoint; else do not use it")
