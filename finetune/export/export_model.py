"""Exports a whole model: checks it, writes the other layout one tensor at a time, reads it again and compares logits."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig

import qwen_model

from .. import json_text
from ..errors import UserError, note
from ..folders import config_files, model_folder, model_writer, output_folder, quant_settings
from ..folders.shards import Shards
from ..model import loading, whole_base
from ..quantized.plain_weights import PlainWeights
from ..writing.new_folder import new_folder
from . import export_config, export_proof, export_tokenizer
from .export_checks import OTHER, QWEN, QWEN2
from .layouts import ConvertedTensors


def export(folder: Path, out: Path, to: str, max_bytes: int) -> float:
    """Writes the model in `folder` to `out`; returns the largest difference between two logits.

    export_checks.check_model() comes first. Raises UserError for what the other layout does not have.
    """
    qwen_model.register()
    whole_base.check(folder)
    record = output_folder.read_record(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    note(f"exporting {folder} from the layout of {OTHER[to]} to that of {to}")
    with Shards(folder) as stored:
        converted = ConvertedTensors(stored, OTHER[to], left_out_biases(record, to))
        new = new_config(config, folder, to, record)
        tokenizer = new_tokenizer(folder, to)
        if to == QWEN2:
            export_config.note_length_limits(config)
        with new_folder(out) as staging:
            write(staging, folder, converted, new, tokenizer, max_bytes, record)
            return prove(folder, staging)


def new_config(config, folder: Path, to: str, record: dict):
    """The config for layout `to`, without quantization settings."""
    return export_config.to_qwen(config, folder, record) if to == QWEN else export_config.to_qwen2(config, folder)


def new_tokenizer(folder: Path, to: str):
    """An object whose save_pretrained writes the tokenizer files of layout `to`."""
    if to == QWEN:
        return export_tokenizer.to_first_generation(folder)
    chat = export_config.is_chat_model(export_config.settings_of(folder), QWEN)
    return export_tokenizer.Qwen2Files(loading.load_tokenizer(folder), chat)


def write(staging: Path, folder: Path, converted: ConvertedTensors, config, tokenizer, max_bytes: int, record: dict) -> None:
    """Writes the whole folder. converted: the tensors of `folder` in the new layout; config: of the new layout."""
    skeleton = model_writer.skeleton(config)
    shapes = {name: converted.shape(name) for name in converted}
    check_tensors(folder, shapes, model_writer.tensor_shapes(skeleton), set(converted.zero_biases))
    dtype = converted.first_row("lm_head.weight").dtype
    quantize_config(skeleton.config, folder, staging, converted.layout)
    settings = export_config.generation_config(export_config.settings_of(folder), folder, converted.layout, record)
    if config.model_type == QWEN2:  # some servers read it from config.json
        config.eos_token_id = stops[0] if isinstance(stops := settings["eos_token_id"], list) else stops
    frame = tokenizer, export_config.GenerationFile(settings), dtype, new_record(folder, converted, record)
    model_writer.write_frame(staging, skeleton, *frame, model_card(folder, config))
    bar = tqdm(converted, desc="exporting", total=len(shapes), unit=" tensors", delay=2, leave=False)
    model_writer.write_weights(staging, ((name, converted[name]) for name in bar), max_bytes, shapes)


def check_tensors(folder: Path, shapes: dict, wanted: dict, zero_biases: set[str]) -> None:
    """UserError unless the tensors are those of the config.

    shapes: {name: shape} of the converted tensors; wanted: of the 16-bit model's.
    """
    found = shapes | model_folder.unpacked_shapes(shapes)
    if wrong := [name for name in wanted if found.get(name) != wanted[name]]:
        what = f"{folder}: {wrong[0]} is {found.get(wrong[0], 'missing')}, and config.json asks for {wanted[wrong[0]]}"
        raise UserError(f"{what} - give a complete checkpoint")
    plain = [name for name in shapes if name.endswith((".weight", ".bias"))]
    if more := [name for name in plain if name not in wanted and name not in zero_biases]:
        raise UserError(f"{folder}: {more[0]} is not in the model that config.json describes - give a complete checkpoint")


def quantize_config(config, folder: Path, staging: Path, layout: str) -> None:
    """Adds the GPTQ settings to config.json, and to quantize_config.json where the source has that file."""
    settings, _ = quant_settings.settings_of(folder)
    if not settings:
        return
    config.quantization_config = {"quant_method": "gptq"} | export_config.quantization_config(settings, layout, folder)
    if (path := folder / "quantize_config.json").is_file():
        renamed = export_config.quantization_config(config_files.read_json(path), layout, folder)
        json_text.write(staging / path.name, renamed)


# ---- training.json and README.md


def new_record(folder: Path, converted: ConvertedTensors, record: dict) -> dict:
    """training.json: the model's own, and what exporting it back will need."""
    left_out = {name: [str(dtype).removeprefix("torch."), length] for name, (dtype, length) in converted.left_out.items()}
    return record | {
        "exported": {
            "from": str(folder.resolve()),
            "layout": converted.layout,
            "config": config_files.read_json(folder / "config.json"),
            "generation_config": export_config.settings_of(folder),
            "zero_biases": left_out,
        }
    }


def left_out_biases(record: dict, to: str) -> dict:
    """{name: (dtype, length)} of the zero biases that an earlier export from layout `to` left out."""
    source = record.get("exported", {})
    stored = source.get("zero_biases", {}) if source.get("layout") == to else {}
    return {name: (getattr(torch, dtype), length) for name, (dtype, length) in stored.items()}


def model_card(folder: Path, config) -> str:
    """README.md."""
    lines = [f"---\nbase_model: {folder.name}\n---\n\n# {folder.name}, in the layout of {config.model_type}\n"]
    if config.model_type == QWEN2:
        lines += [
            f"The weights of {folder.name} (first-generation Qwen) as transformers' own Qwen2 has them: it loads",
            "without remote code and without tiktoken, in any server that knows Qwen2. It computes the same numbers",
            f"up to {config.max_position_embeddings} tokens. Conversations go through the chat template (ChatML).\n",
            "Two things differ from first-generation Qwen's own chat. A server may read control tokens such as",
            "<|im_end|> in the text of a message as control tokens. A message that begins with an empty line",
            "gets other tokens, because BPE merges that line with the newline before it.",
        ]
    else:
        lines += [
            f"The weights of {folder.name} as first-generation Qwen has them, with its code (trust_remote_code=True),",
            "which the toolkit does not need: `python -m finetune.ask THIS_FOLDER`.",
        ]
    back = f"`python -m finetune.export THIS_FOLDER OUT --to {OTHER[config.model_type]}`"
    return "\n".join([*lines, f"\ntraining.json says what it was made from. {back} converts it back.\n"])


# ---- the proof


def prove(folder: Path, staging: Path) -> float:
    """Reads the new folder again and compares its tokens and logits with those of `folder`. RuntimeError where they differ."""
    tokenizer = loading.load_tokenizer(folder)
    export_proof.check_tokens(tokenizer, loading.load_tokenizer(staging))
    prompts = export_proof.prompts(tokenizer, folder)
    with PlainWeights(folder) as before, PlainWeights(staging) as after:
        one, other = (unquantized_config(folder), before.__getitem__), (unquantized_config(staging), after.__getitem__)
        return export_proof.compare(one, other, prompts)


def unquantized_config(folder: Path):
    """The folder's config without quantization: PlainWeights dequantizes the weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config

