"""A whole model in the other layout: checked, written one tensor at a time, read again and compared."""

import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig

import qwen_model

from ..errors import UserError, note
from ..folders import checkpoint, config_files, model_folder, model_writer, quant_settings
from ..folders.new_folder import new_folder
from ..folders.shards import Shards
from ..model import loading
from ..quantized.plain_weights import PlainWeights
from . import export_config, export_proof, export_tokenizer
from .export_checks import OTHER, QWEN, QWEN2
from .layouts import Relaid


def export(folder: Path, out: Path, to: str, max_bytes: int) -> float:
    """Writes the model in `folder` to `out`; returns the largest difference of a logit.

    Check first: export_checks.check_model(). Raises UserError for what cannot go along.
    """
    qwen_model.register()
    record = checkpoint.read_record(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    note(f"exporting {folder} from the layout of {OTHER[to]} to that of {to}")
    with Shards(folder) as stored:
        relaid = Relaid(stored, OTHER[to], zeros_of(record, to))
        new = new_config(config, folder, to, record)
        tokenizer = new_tokenizer(folder, to)
        if to == QWEN2:
            export_config.note_of_length(config)
        with new_folder(out) as staging:
            write(staging, folder, relaid, new, tokenizer, max_bytes, record)
            return prove(folder, staging)


def new_config(config, folder: Path, to: str, record: dict):
    """The config of the other layout, without what is said of quantization."""
    return export_config.to_qwen(config, folder, record) if to == QWEN else export_config.to_qwen2(config, folder)


def new_tokenizer(folder: Path, to: str):
    """Something whose save_pretrained writes the tokenizer of the other layout."""
    if to == QWEN:
        return export_tokenizer.first_generation(folder)
    chats = export_config.chats(export_config.settings_of(folder), QWEN)
    return export_tokenizer.Qwen2Files(loading.load_tokenizer(folder), chats)


def write(staging: Path, folder: Path, relaid: Relaid, config, tokenizer, max_bytes: int, record: dict) -> None:
    """The whole new folder. relaid: of `folder`; config: of the new layout."""
    skeleton = model_writer.skeleton(config)
    shapes = {name: relaid.shape(name) for name in relaid}
    check_tensors(folder, shapes, model_writer.tensor_shapes(skeleton), set(relaid.zeros))
    dtype = relaid.beginning("lm_head.weight").dtype
    quantize_config(skeleton.config, folder, staging, relaid.layout)
    settings = export_config.generation(export_config.settings_of(folder), folder, relaid.layout, record)
    if config.model_type == QWEN2:  # some servers look for it there
        config.eos_token_id = stops[0] if isinstance(stops := settings["eos_token_id"], list) else stops
    frame = tokenizer, export_config.GenerationFile(settings), dtype, new_record(folder, relaid, record)
    model_writer.write_frame(staging, skeleton, *frame, model_card(folder, config))
    bar = tqdm(relaid, desc="exporting", total=len(shapes), unit=" tensors", delay=2, leave=False)
    model_writer.write_weights(staging, ((name, relaid[name]) for name in bar), max_bytes, shapes)


def check_tensors(folder: Path, shapes: dict, wanted: dict, zeros: set[str]) -> None:
    """UserError where the tensors are not those of the config. wanted: {name: shape} of the 16-bit model."""
    found = shapes | model_folder.unpacked_shapes(shapes)
    if wrong := [name for name in wanted if found.get(name) != wanted[name]]:
        what = f"{folder}: {wrong[0]} would be {found.get(wrong[0], 'missing')}, and by config.json {wanted[wrong[0]]}"
        raise UserError(f"{what} - give a complete checkpoint")
    plain = [name for name in shapes if name.endswith((".weight", ".bias"))]
    if more := [name for name in plain if name not in wanted and name not in zeros]:
        raise UserError(f"{folder}: {more[0]} would be more than config.json speaks of - give a complete checkpoint")


def quantize_config(config, folder: Path, staging: Path, layout: str) -> None:
    """GPTQ's settings go along, in config.json and, if they lie there too, in quantize_config.json."""
    settings, _ = quant_settings.settings_of(folder)
    if not settings:
        return
    config.quantization_config = {"quant_method": "gptq"} | export_config.quantization(settings, layout, folder)
    if (path := folder / "quantize_config.json").is_file():
        renamed = export_config.quantization(config_files.read_json(path), layout, folder)
        (staging / path.name).write_text(json.dumps(renamed, indent=2) + "\n", encoding="utf-8")


# ---- what the folder says of itself


def new_record(folder: Path, relaid: Relaid, record: dict) -> dict:
    """training.json: that of the model, and what it was exported from, with all that the way back needs."""
    zeros = {name: [str(dtype).removeprefix("torch."), length] for name, (dtype, length) in relaid.left_out.items()}
    return record | {
        "exported": {
            "from": str(folder.resolve()),
            "layout": relaid.layout,
            "config": config_files.read_json(folder / "config.json"),
            "generation_config": export_config.settings_of(folder),
            "zero_biases": zeros,
        }
    }


def zeros_of(record: dict, to: str) -> dict:
    """The biases of zeros that were left out when a model came from the layout that it goes back to."""
    came_from = record.get("exported", {})
    stored = came_from.get("zero_biases", {}) if came_from.get("layout") == to else {}
    return {name: (getattr(torch, dtype), length) for name, (dtype, length) in stored.items()}


def model_card(folder: Path, config) -> str:
    """README.md."""
    lines = [f"---\nbase_model: {folder.name}\n---\n\n# {folder.name}, in the layout of {config.model_type}\n"]
    if config.model_type == QWEN2:
        lines += [
            f"The weights of {folder.name} (first-generation Qwen) as transformers' own Qwen2 has them: it loads",
            "without remote code and without tiktoken, in any server that knows Qwen2. It computes the same numbers",
            f"up to {config.max_position_embeddings} tokens. Conversations go through the chat template (ChatML).\n",
            "What a server may do otherwise than first-generation Qwen's own chat: it takes control tokens such as",
            "<|im_end|> for such in contents, too, unless it is told not to; and of a content that begins with an",
            "empty line it makes other tokens, because that line melts into the newline before it.",
        ]
    else:
        lines += [
            f"The weights of {folder.name} as first-generation Qwen has them, with its code (trust_remote_code=True),",
            "which is not needed where the toolkit is installed: `python -m finetune.ask THIS_FOLDER`.",
        ]
    back = f"`python -m finetune.export THIS_FOLDER OUT --to {OTHER[config.model_type]}`"
    return "\n".join([*lines, f"\ntraining.json says what it was made from. The way back: {back}.\n"])


# ---- the proof


def prove(folder: Path, staging: Path) -> float:
    """Reads the new folder again: its tokens and its logits are those of `folder`."""
    tokenizer = loading.load_tokenizer(folder)
    export_proof.check_tokens(tokenizer, loading.load_tokenizer(staging))
    prompts = export_proof.prompts(tokenizer, folder)
    with PlainWeights(folder) as before, PlainWeights(staging) as after:
        one, other = (plain_config(folder), before.__getitem__), (plain_config(staging), after.__getitem__)
        return export_proof.compare(one, other, prompts)


def plain_config(folder: Path):
    """Of the 16-bit model that the folder's weights stand for."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config

