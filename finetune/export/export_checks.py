"""What can be exported, and for which base: checks that do without torch, whose import takes seconds."""

import shlex
from pathlib import Path

from ..errors import UserError
from ..folders import config_files, hub, meant, model_folder

QWEN, QWEN2 = "qwen", "qwen2"  # the layouts, as model_type of config.json
OTHER = {QWEN: QWEN2, QWEN2: QWEN}


def check_model(folder: Path, to: str) -> None:
    """UserError for a model that cannot be exported to layout `to`."""
    check_layout(folder, to)
    check_whole(folder)


def check_layout(folder: Path, to: str) -> None:
    """UserError unless the model is in the layout other than `to`."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there - give the folder of a model, or of a LoRA adapter{meant.folder(folder, meant.EITHER)}")
    kind = config_files.read_json(folder / "config.json").get("model_type")
    if kind == to:
        raise UserError(f"{folder}: is in that layout already (model_type {kind}) - use it as it is")
    if kind != OTHER[to]:
        works = "first-generation Qwen" if to == QWEN2 else "Qwen1.5, or an export of first-generation Qwen,"
        remedy = "use it as it is: servers support it" if to == QWEN2 else "use it in its own layout"
        raise UserError(f"{folder}: model_type is {kind}, and only {works} can be exported to {to} - {remedy}")


def check_whole(folder: Path) -> None:
    """UserError for a folder that is incomplete, or quantized with another method than GPTQ."""
    if findings := model_folder.problems(folder, may_be_quantized=True):
        raise UserError(*findings)


def find_base(folder: Path, to: str, base: str | None) -> Path:
    """The folder of --base. UserError where it is missing, in another layout than `to`, or incomplete.

    folder: the adapter's.
    """
    its_own = config_files.read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
    first = f"python -m finetune.export {shlex.quote(its_own)} EXPORTED_BASE --to {to}"
    if base is None:
        what = f"{folder}: an adapter is exported for an exported base"
        raise UserError(f"{what} - export its base first ({first}), then add --base EXPORTED_BASE")
    found = hub.find_folder(base)
    if not (found / "config.json").is_file():
        raise UserError(f"--base {base}: no config.json there - give the folder of the exported base{meant.folder(base)}")
    kind = config_files.config_of(found).get("model_type")
    if kind != to:
        raise UserError(f"--base {base}: is in the layout of {kind}, not {to} - export it ({first}) and give the result")
    check_whole(found)
    return found
