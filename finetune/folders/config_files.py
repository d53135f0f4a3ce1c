"""A checkpoint's config.json and the other JSON files beside it."""

import json
from pathlib import Path

from ..errors import UserError, shortened

# what to do about a file that cannot be read, where it is one that a run has written
OF_A_RUN = {
    "training.json": "it is the record of the run that wrote this folder: copy the folder again, or remove the file to do without it",
    "trainer_state.json": "it tells how far a run was: remove this checkpoint, and go on from the one before it",
}


def read_json(path: Path) -> dict:
    """A JSON object; UserError for anything else, nested beyond Python's limit or not UTF-8 too."""
    remedy = OF_A_RUN.get(path.name, "download it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{path}: cannot be read (nested too deeply) - {remedy}") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({shortened(error)}) - {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, found a {type(value).__name__} - {remedy}")
    return value


def config_of(folder: Path) -> dict:
    """config.json, or {} where there is none to read."""
    try:
        return read_json(folder / "config.json")
    except UserError:
        return {}


def name_of(folder: Path) -> str:
    """What people call the model in a folder: in the Hub's cache the folder itself has a hash for a name."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--", 2)[-1]  # models--Qwen--Qwen-7B
    return folder.name
