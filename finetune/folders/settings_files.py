"""The JSON files of a model's or an adapter's folder: can they be read, and has each value the type that whoever opens it expects?

A damaged or hostile file is one line here. Later it would be a traceback of another package's, or a size that no memory has.
"""

import os
import re
from pathlib import Path

from .. import json_text
from ..errors import UserError, shortened
from .config_files import read_json

MOST_LAYERS, MOST_WIDTH, MOST_ROWS, MOST_LENGTH = 10_000, 10_000_000, 100_000_000, 10**12  # far beyond what there is


def whole(least: int, most: int):
    """The test for a whole number between two others, and its words."""
    return lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most:,}"


def of_type(words: str, *types):
    """The test for some types, and its words. True and False are numbers only where bool is listed."""
    return lambda value: type(value) in types, words


def ids(value) -> bool:
    """Whether a value is a token's id, or a list of such."""
    return all(type(each) is int and 0 <= each < MOST_ROWS for each in (value if isinstance(value, list) else [value]))


def rows(value) -> bool:
    """Whether a value is an adapter's trainable_token_indices: a list of ids, or such lists by their module."""
    return all(isinstance(each, list) and ids(each) for each in (value.values() if isinstance(value, dict) else [value]))


def texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def tokens(value) -> bool:
    """Whether a value is tokenizer_config.json's added_tokens_decoder: {"151643": {"content": "<|endoftext|>", ...}}."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"\d{1,9}", index) and isinstance(token, dict) and isinstance(token.get("content"), str) for index, token in value.items()
    )


def positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e15


WIDTH, ROWS, LENGTH = whole(1, MOST_WIDTH), whole(1, MOST_ROWS), whole(1, MOST_LENGTH)
TEXT, FLAG, OBJECT = of_type("a text", str), of_type("true or false", bool), of_type("an object", dict)
NUMBER, POSITIVE = of_type("a number", int, float), (positive, "a number above 0")
IDS, TEXTS = (ids, "a token's id or a list of ids"), (texts, "a list of texts")
TEXT_OR_TOKEN = of_type("a text or a token", str, dict)
NAMES = (lambda value: isinstance(value, str) or texts(value), "a list of layers' names, or one pattern")
# What is asked of a value, if it is there and not null. What no table lists is not looked at.
OF_CONFIG = {
    "hidden_size": WIDTH, "intermediate_size": WIDTH, "kv_channels": WIDTH, "head_dim": WIDTH,
    "num_hidden_layers": whole(1, MOST_LAYERS), "num_attention_heads": WIDTH, "num_key_value_heads": WIDTH,
    "vocab_size": ROWS, "seq_length": LENGTH, "max_position_embeddings": LENGTH, "sliding_window": LENGTH,
    "model_type": TEXT, "architectures": TEXTS, "layer_types": TEXTS, "hidden_act": TEXT, "torch_dtype": TEXT, "dtype": TEXT,
    "rms_norm_eps": POSITIVE, "layer_norm_epsilon": POSITIVE, "rope_theta": POSITIVE, "rotary_emb_base": POSITIVE,
    "initializer_range": NUMBER, "attention_dropout": NUMBER, "tie_word_embeddings": FLAG, "use_sliding_window": FLAG,
    "auto_map": OBJECT, "quantization_config": OBJECT, "rope_scaling": OBJECT, "rope_parameters": OBJECT, "eos_token_id": IDS,
}  # fmt: skip
OF_GENERATION = {
    "chat_format": TEXT, "eos_token_id": IDS, "pad_token_id": IDS, "bos_token_id": IDS, "max_window_size": LENGTH,
    "max_new_tokens": LENGTH, "max_length": LENGTH, "do_sample": FLAG, "temperature": NUMBER, "top_p": NUMBER, "top_k": NUMBER,
    "repetition_penalty": NUMBER,
}  # fmt: skip
OF_TOKENIZER = {
    "added_tokens_decoder": (tokens, "an object of tokens by their ids"), "tokenizer_class": TEXT, "auto_map": OBJECT,
    "chat_template": of_type("a text", str, list), "eos_token": TEXT_OR_TOKEN, "pad_token": TEXT_OR_TOKEN, "bos_token": TEXT_OR_TOKEN,
    "model_max_length": NUMBER,
}  # fmt: skip
OF_ADAPTER = {
    "peft_type": TEXT, "base_model_name_or_path": TEXT, "r": whole(1, MOST_WIDTH), "lora_alpha": NUMBER, "lora_dropout": NUMBER,
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"), "target_modules": NAMES,
    "modules_to_save": TEXTS, "use_dora": FLAG, "use_rslora": FLAG, "rank_pattern": OBJECT, "alpha_pattern": OBJECT,
    "trainable_token_indices": (rows, "a list of ids, or an object of such lists"), "exclude_modules": NAMES, "fan_in_fan_out": FLAG,
    "init_lora_weights": of_type("true, false or a text", bool, str), "task_type": TEXT,
}  # fmt: skip
OF_RECORD = dict.fromkeys(("base", "method", "data", "files", "exported", "quantized", "merged", "result"), OBJECT)
OF_INDEX = {"weight_map": (lambda value: isinstance(value, dict) and texts([*value.values()]), "an object of files' names"), "metadata": OBJECT}
TABLES = {
    "config.json": OF_CONFIG, "generation_config.json": OF_GENERATION, "tokenizer_config.json": OF_TOKENIZER,
    "adapter_config.json": OF_ADAPTER, "training.json": OF_RECORD, "quantize_config.json": {},
    "model.safetensors.index.json": OF_INDEX, "pytorch_model.bin.index.json": OF_INDEX,
    "adapter_model.safetensors.index.json": OF_INDEX, "adapter_model.bin.index.json": OF_INDEX,
    "added_tokens.json": {}, "special_tokens_map.json": {},
}  # fmt: skip
READ = (*TABLES, "tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken", "chat_template.jinja", "model.safetensors",
        "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")  # fmt: skip


def problems(folder: Path) -> list[str]:
    """A line for each settings file of a folder that cannot be read, or holds a value of a wrong type or beyond all measure."""
    findings = []
    for name, table in TABLES.items():
        if (folder / name).is_file():
            try:
                values = read_json(folder / name)
                findings += value_problems(folder / name, values, table) or infinite(folder / name, values)
            except UserError as error:
                findings += error.findings
    return findings


def value_problems(path: Path, values: dict, table: dict) -> list[str]:
    """A line for the first values that are not what the table asks for."""
    wrong = [(key, words) for key, (test, words) in table.items() if values.get(key) is not None and not test(values[key])]
    return [f"{path}: {key} is {shortened(repr(values[key]))}, not {words} - take the file of the published folder" for key, words in wrong[:3]]


def infinite(path: Path, values: dict) -> list[str]:
    """A line for a number that is infinite or none, which is no JSON: it would be written into every folder that is made of this one."""
    if path.name == "training.json":  # of an older version may hold them; what is written anew does not
        return []
    try:
        wrong = [key for key, value in values.items() if json_text.finite(value) != value]
    except RecursionError:
        return [f"{path}: cannot be read (nested too deeply) - take the file of the published folder"]
    return [f"{path}: {shortened(wrong[0])} holds NaN or Infinity, which is no JSON - take the file of the published folder"] if wrong else []


def dangling_links(folder: Path) -> list[str]:
    """A line for a file that would be read and is a link to nothing."""
    found = [path for path in sorted(folder.iterdir()) if path.is_symlink() and not path.exists()]
    found = [path for path in found if path.name in READ or path.suffix in (".safetensors", ".bin")]
    return [f"{found[0]}: a link to {shortened(os.readlink(found[0]))}, where nothing is - copy the file itself"] if found else []
