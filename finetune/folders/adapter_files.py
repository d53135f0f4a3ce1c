"""An adapter's files, before anything opens them: readable, of a kind that is known here, and as they were when they were written."""

import fnmatch
import re
from pathlib import Path

from ..errors import UserError, shortened
from ..hashing import sha256_of_file
from . import config_files, headers, settings_files, tensor_files
from .output_folder import RECORD

# what an adapter is when it is opened: weights, settings, chat settings. Its tokenizer is the base's; cards and code change nothing
PARTS = ("adapter_config.json", "generation_config.json", "*.safetensors", "*.bin")


def check(folder: Path, flag: str = "") -> None:
    """Raises UserError with what is damaged, or other than its record says. flag: the one that names the folder, for the message.

    Reads the files of weights once, to hash them: a second for a GB. Adapters of other hands have no hashes to compare with.
    """
    named = f"{flag} {folder}".strip()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{named}: no adapter_config.json there - give the output folder of a LoRA run")
    if findings := settings_files.dangling_links(folder) or settings_files.problems(folder) or changed_files(folder, named):
        raise UserError(*findings)
    config = config_files.read_json(folder / "adapter_config.json")
    if (kind := config.get("peft_type")) not in ("LORA", None):
        raise UserError(f"{named}: an adapter of type {shortened(kind)}, not LoRA - merge it with peft")
    check_pattern(folder, config)
    for path in tensor_files.weight_files(folder):
        if not path.is_file():
            raise UserError(f"{path}: is missing - give the whole output folder of a LoRA run")
        headers.tensors_of(path)
    for path in folder.glob("*.safetensors"):  # where a run with PiSSA began
        headers.tensors_of(path)


def check_pattern(folder: Path, config: dict) -> None:
    """UserError for a pattern of layers that is no regular expression."""
    for key in ("target_modules", "exclude_modules"):
        try:
            re.compile(config[key] if isinstance(config.get(key), str) else "")
        except (re.error, RecursionError, OverflowError) as error:
            what = f"{folder}/adapter_config.json: {key} {shortened(config[key])} is no pattern ({error})"
            raise UserError(f"{what} - download it again") from error


def changed_files(folder: Path, named: str) -> list[str]:
    """A line for weights or settings that are other than the folder's record says, or gone; [] without a record of them."""
    path = folder / RECORD
    written = (config_files.read_json(path).get("files") or {}) if path.is_file() else {}
    files = {name: folder / name for name in written if any(fnmatch.fnmatchcase(name, part) for part in PARTS)}
    if gone := [name for name, file in files.items() if not file.is_file()]:
        return [f"{named}: {gone[0]} is missing, which {RECORD} lists - copy the whole folder again"]
    changed = [name for name, file in files.items() if sha256_of_file(file) != written[name]]
    remedy = f'copy it again, or take it out of "files" in {RECORD} if you have changed it yourself'
    return [f"{named}: {', '.join(changed)} is not as it was written (another SHA-256 than in {RECORD}) - {remedy}"] if changed else []
