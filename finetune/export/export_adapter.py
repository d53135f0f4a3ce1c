"""Exports a LoRA adapter for its exported base: checks that the base is its own, converts it, compares logits."""

import copy
import hashlib
import shutil
from pathlib import Path

from safetensors.torch import save_file

import qwen_model

from .. import json_text
from ..errors import UserError, note
from ..folders import adapter_files, adapter_folder, config_files, fingerprints, output_folder, quant_settings
from ..folders.shards import Shards
from ..lora import pissa
from ..merge import formulas
from ..model import loading, whole_base
from ..quantized import quantized_model
from ..quantized.plain_weights import PlainWeights
from ..writing.new_folder import check_free, hide_config_until_done, new_folder
from . import export_config, export_proof, layouts
from .converted_adapter import ConvertedAdapter
from .export_checks import OTHER, QWEN, find_base
from .export_model import left_out_biases, new_config, unquantized_config
from .layouts import ConvertedTensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def export(folder: Path, out: Path, to: str, base: str | None) -> float:
    """Writes the adapter in `folder` to `out`, for its exported base; returns the largest difference between two logits."""
    qwen_model.register()
    adapter_files.check(folder)
    adapter = formulas.Adapter(folder)
    check_adapter(adapter, to)
    base_folder = find_base(folder, to, base)
    whole_base.check(base_folder)
    check_free(out, "what is exported", base_folder)
    note(f"exporting the adapter {folder} for {base_folder}")
    with Shards(base_folder) as stored, new_folder(out, CONFIG) as staging:
        original = ConvertedTensors(stored, to, left_out_biases(output_folder.read_record(base_folder), OTHER[to]))
        check_base(folder, base_folder, original)
        converted = ConvertedAdapter(adapter, OTHER[to], config_files.config_of(base_folder)["num_hidden_layers"])
        write(staging, folder, base_folder, converted, name=str(base_folder) if Path(base).is_dir() else base)
        adapter_folder.check_adapter(staging, base_folder)
        return prove(staging, base_folder, adapter, original)


# ---- checks


def check_adapter(adapter: formulas.Adapter, to: str) -> None:
    """UserError for an adapter in layout `to`, of another architecture, or of a base that is stored nowhere (PiSSA)."""
    folder = adapter.folder
    if pissa.stored(folder):
        what = f"{folder}: a checkpoint of PiSSA, whose base has other weights than the stored one"
        raise UserError(f"{what} - export the run's result instead, which is plain LoRA")
    names = list(adapter.tensors)
    if not any(layouts.place_of(name, OTHER[to]) for name in names):
        if any(layouts.place_of(name, to) for name in names):
            raise UserError(f"{folder}: is in that layout already - use it as it is")
        what = f"{folder}: holds {next(iter(names), 'nothing')}, which belongs to no layer of first-generation Qwen or Qwen2"
        raise UserError(f"{what} - give the output folder of a LoRA run")


def check_base(folder: Path, base: Path, original: ConvertedTensors) -> None:
    """UserError for a base that is not the export of the adapter's own.

    original: the tensors of `base` in the adapter's layout, as they were before they were exported.
    """
    made_for = output_folder.read_record(folder).get("base", {}).get("fingerprint")
    if made_for is None:
        return note(f"{folder}: has no record of its base, so it is not checked that {base} is the right one")
    found = original_fingerprint(base, original)
    if quant_settings.may_take(made_for, found, base):
        note(f"{folder}: was trained over a quantized base, and {base} has the same sizes: taken for its 16-bit sibling")
    elif not fingerprints.is_same(found, made_for):
        what = f"{folder}: the adapter was made for another base ({fingerprints.describe(made_for)})"
        other = f"{base} is an export of {fingerprints.describe(found)}"
        raise UserError(f"{what}; {other} - give the export of the adapter's own with --base")
    if quantized_model.of_adapter(folder):
        what = f"{folder}: was trained over NF4, whose scales are quantized per layer"
        note(f"{what}: q, k and v in NF4 differ from c_attn in NF4 in the last bits")


def original_fingerprint(base: Path, original: ConvertedTensors) -> dict:
    """fingerprints.of_model() of the base before it was exported, computed from the export: without the values spread over it."""
    found = {key: value for key, value in fingerprints.of_model(base).items() if key != "spread"}
    lines = [fingerprints.beginning(name, original.shape(name), original.first_row(name), 8) for name in original]
    digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    return found | {"model_type": OTHER[found["model_type"]], "sha256": digest}


# ---- writing


def write(staging: Path, folder: Path, base: Path, converted: ConvertedAdapter, name: str) -> None:
    """Writes the whole adapter folder. name: folder or hub id of the base, for adapter_config.json."""
    to, record = converted.target, output_folder.read_record(folder)
    json_text.write(staging / CONFIG, converted.config(name))
    own = export_config.settings_of(folder)
    settings = export_config.generation_config(own, base, converted.layout, record) if own else export_config.settings_of(base)
    json_text.write(staging / "generation_config.json", settings)
    write_tokenizer(staging, base, to)
    now = {"name": name, "folder": str(base.resolve()), "fingerprint": fingerprints.of_model(base)}
    source = {"from": str(folder.resolve()), "layout": converted.layout, "base": record.get("base")}
    source |= {"generation_config": own}
    json_text.write(staging / output_folder.RECORD, record | {"base": now, "exported": source})
    (staging / "README.md").write_text(adapter_folder.adapter_model_card(name), encoding="utf-8")
    hide_config_until_done(staging, CONFIG)
    save_file(converted.stored(), staging / WEIGHTS, metadata={"format": "pt"})
    record = config_files.read_json(staging / output_folder.RECORD)
    output_folder.write_record(staging, record)


def write_tokenizer(staging: Path, base: Path, to: str) -> None:
    """Writes the base's tokenizer files."""
    if to == QWEN:
        loading.load_tokenizer(base).save_pretrained(staging)
        return
    for path in (base / name for name in TOKENIZER_FILES if (base / name).is_file()):
        shutil.copyfile(path, staging / path.name)


# ---- the proof


def prove(staging: Path, base: Path, adapter: formulas.Adapter, original: ConvertedTensors) -> float:
    """Compares base + adapter before the export with both after it; returns the largest difference between two logits."""
    config, to = unquantized_config(base), OTHER[original.layout]
    record = output_folder.read_record(base)
    with PlainWeights(base) as after:
        before = copy.copy(after)
        before.shards = original  # the same weights by the names that the adapter was trained with
        exported = formulas.Adapter(staging)
        one = new_config(config, base, to, record), lambda name: adapter.merged(name, before[name])
        other = config, lambda name: exported.merged(name, after[name])
        difference = export_proof.compare(one, other, export_proof.prompts(loading.load_tokenizer(base), base))
    for used in (adapter, exported):
        used.check_all_used()
    return difference
