"""The base that an adapter belongs to: found, and any other refused."""

from pathlib import Path

from ..errors import UserError, note
from . import (
    adapter_files,
    adapter_folder,
    config_files,
    fingerprints,
    hub,
    meant,
    model_folder,
    output_folder,
    quant_settings,
)


def find(adapter: Path, name: str | None = None) -> Path:
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
    check(adapter, folder)
    adapter_folder.check_adapter(adapter, folder)
    if problems := model_folder.first_problems(folder, may_be_quantized=True):
        raise UserError(*problems)
    return folder


def check(adapter: Path, base: Path, remedy: str = "give that one with --base") -> None:
    """Refuses an adapter on another base than the one it was trained on."""
    made_for = output_folder.read_record(adapter).get("base", {}).get("fingerprint")
    if made_for is None:
        return  # an adapter of other hands says nothing; shapes are checked when it is loaded
    if not isinstance(made_for, dict) or not {"sha256", "model_type", "hidden_size", "num_hidden_layers", "vocab_size"} <= made_for.keys():
        raise UserError(f"{adapter / output_folder.RECORD}: the fingerprint of the base in it is damaged - copy the adapter's folder again")
    found = fingerprints.of_model(base)
    if quant_settings.may_take(made_for, found, base):
        note(f"{adapter}: was trained over a quantized base, and {base} fits it in sizes: taken for its 16-bit sibling")
    elif not fingerprints.is_same(found, made_for):
        raise UserError(
            f"{adapter}: the adapter was made for another base ({fingerprints.describe(made_for)}); "
            f"{base} is {fingerprints.describe(found)} - {remedy}"
        )
