"""A LoRA adapter for its exported base: is it that base, what it is there, and do both compute the same?"""

import copy
import hashlib
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

import qwen_model

from ..errors import UserError, note
from ..folders import adapter_folder, checkpoint, config_files, quant_settings
from ..folders.new_folder import check_free, hide_config_until_done, new_folder
from ..folders.shards import Shards
from ..lora import pissa
from ..merge import formulas
from ..model import loading
from ..quantized import quantized_model
from ..quantized.plain_weights import PlainWeights
from . import export_config, export_proof, layouts
from .export_checks import OTHER, QWEN, find_base
from .export_model import new_config, plain_config, zeros_of
from .layouts import Relaid
from .relaid_adapter import RelaidAdapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def export(folder: Path, out: Path, to: str, base: str | None) -> float:
    """Writes the adapter in `folder` to `out`, for its exported base; returns the largest difference of a logit."""
    qwen_model.register()
    adapter = formulas.Adapter(folder)
    check_adapter(adapter, to)
    base_folder = find_base(folder, to, base)
    check_free(out, "what is exported", base_folder)
    note(f"exporting the adapter {folder} for {base_folder}")
    with Shards(base_folder) as stored, new_folder(out, CONFIG) as staging:
        there = Relaid(stored, to, zeros_of(checkpoint.read_record(base_folder), OTHER[to]))
        check_base(folder, base_folder, there)
        relaid = RelaidAdapter(adapter, OTHER[to], config_files.config_of(base_folder)["num_hidden_layers"])
        write(staging, folder, base_folder, relaid, name=str(base_folder) if Path(base).is_dir() else base)
        adapter_folder.check_adapter(staging, base_folder)
        return prove(staging, base_folder, adapter, there)


# ---- checks


def check_adapter(adapter: formulas.Adapter, to: str) -> None:
    """UserError for an adapter that is in the layout already, or that belongs to no stored base."""
    folder = adapter.folder
    if pissa.stored(folder):
        what = f"{folder}: a checkpoint of PiSSA, which is trained over a changed base"
        raise UserError(f"{what} - export the run's result instead, which is plain LoRA")
    names = list(adapter.tensors)
    if not any(layouts.place_of(name, OTHER[to]) for name in names):
        if any(layouts.place_of(name, to) for name in names):
            raise UserError(f"{folder}: is in that layout already - use it as it is")
        what = f"{folder}: holds {next(iter(names), 'nothing')}, which is of no layer of first-generation Qwen or Qwen2"
        raise UserError(f"{what} - give the output folder of a LoRA run")


def check_base(folder: Path, base: Path, there: Relaid) -> None:
    """Refuses a base that is not the export of the adapter's own. there: the base, as it was before it was exported."""
    made_for = checkpoint.read_record(folder).get("base", {}).get("fingerprint")
    if made_for is None:
        return note(f"{folder}: does not say which base it was trained on, so that {base} is the one is not checked")
    found = fingerprint(base, there)
    if quant_settings.may_take(made_for, found, base):
        note(f"{folder}: was trained over a quantized base, and {base} fits it in sizes: taken for its 16-bit sibling")
    elif found != made_for:
        what = f"{folder}: the adapter was made for another base ({checkpoint.describe_fingerprint(made_for)})"
        other = f"{base} is an export of {checkpoint.describe_fingerprint(found)}"
        raise UserError(f"{what}; {other} - give the export of the adapter's own with --base")
    if quantized_model.of_adapter(folder):
        what = f"{folder}: was trained over NF4, whose scales are rounded for a whole layer"
        note(f"{what}: c_attn's three parts in NF4 differ from it in the last bits")


def fingerprint(base: Path, there: Relaid) -> dict:
    """checkpoint.fingerprint of what the base was before it was exported, read off the export."""
    found = checkpoint.fingerprint(base)
    lines = [checkpoint.beginning(name, there.shape(name), there.beginning(name), 8) for name in there]
    digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    return found | {"model_type": OTHER[found["model_type"]], "sha256": digest}


# ---- writing


def write(staging: Path, folder: Path, base: Path, relaid: RelaidAdapter, name: str) -> None:
    """The whole adapter folder. name: of the base, as it is to be found."""
    to, record = relaid.other, checkpoint.read_record(folder)
    write_json(staging / CONFIG, relaid.config(name))
    own = export_config.settings_of(folder)
    settings = export_config.generation(own, base, relaid.layout, record) if own else export_config.settings_of(base)
    write_json(staging / "generation_config.json", settings)
    write_tokenizer(staging, base, to)
    now = {"name": name, "folder": str(base.resolve()), "fingerprint": checkpoint.fingerprint(base)}
    came_from = {"from": str(folder.resolve()), "layout": relaid.layout, "base": record.get("base")}
    came_from |= {"generation_config": own}
    write_json(staging / checkpoint.RECORD, record | {"base": now, "exported": came_from})
    (staging / "README.md").write_text(adapter_folder.adapter_model_card(name), encoding="utf-8")
    hide_config_until_done(staging, CONFIG)
    save_file(relaid.stored(), staging / WEIGHTS, metadata={"format": "pt"})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(staging: Path, base: Path, to: str) -> None:
    """The base's."""
    if to == QWEN:
        loading.load_tokenizer(base).save_pretrained(staging)
        return
    for path in (base / name for name in TOKENIZER_FILES if (base / name).is_file()):
        shutil.copyfile(path, staging / path.name)


# ---- the proof


def prove(staging: Path, base: Path, adapter: formulas.Adapter, there: Relaid) -> float:
    """Base and adapter as they were, against base and adapter as they are."""
    config, to = plain_config(base), OTHER[there.layout]
    record = checkpoint.read_record(base)
    with PlainWeights(base) as after:
        before = copy.copy(after)
        before.shards = there  # the same weights, as they were called when the adapter was trained
        exported = formulas.Adapter(staging)
        one = new_config(config, base, to, record), lambda name: adapter.merged(name, before[name])
        other = config, lambda name: exported.merged(name, after[name])
        difference = export_proof.compare(one, other, export_proof.prompts(loading.load_tokenizer(base), base))
    for used in (adapter, exported):
        used.check_all_used()
    return difference
