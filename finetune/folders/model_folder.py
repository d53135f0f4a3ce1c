"""What is wrong with a checkpoint's folder, found out without loading a weight: file names, config.json, headers."""

import difflib
import re
from pathlib import Path

from ..compat import on_transformers
from ..errors import UserError, listed, shortened, warn
from . import config_files, meant, quant_settings, settings_files, tensor_files
from .headers import tensors_of

LFS = b"version https://git-lfs"
LATER_TYPES = ("qwen2", "qwen3")  # Qwen1.5, Qwen2 and Qwen2.5 are qwen2
TRAINED_TYPES = ("qwen", *LATER_TYPES)
# The linear layers of a block, which LoRA adapts. First-generation Qwen's c_proj is attention's and the MLP's.
LATER_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK_LAYERS = {"qwen": ("c_attn", "c_proj", "w1", "w2")} | dict.fromkeys(LATER_TYPES, LATER_LAYERS)
LATER_PLACES = tuple(f"{'mlp' if name in LATER_LAYERS[4:] else 'self_attn'}.{name}" for name in LATER_LAYERS)
# The same with their places, and what block N is called.
PLACES = {"qwen": ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")} | dict.fromkeys(LATER_TYPES, LATER_PLACES)
BLOCKS = {"qwen": "transformer.h"} | dict.fromkeys(LATER_TYPES, "model.layers")
EMBEDDINGS = ("transformer.wte.weight", "model.embed_tokens.weight")
# Of first-generation Qwen, above the ranks of qwen.tiktoken: as many as tokenization_qwen.py lists, whose import takes seconds.
SPECIAL_TOKENS = 208
# What a config.json may say beyond QWenConfig's own fields.
MORE_KEYS = {"auto_map", "torch_dtype", "quantization_config", "padded_vocab_size", "use_bfloat16"}


def is_hub_id(name: str) -> bool:
    """Does a name that is no folder look like one of the Hugging Face Hub: OWNER/NAME?"""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def problems(folder: Path, may_be_quantized: bool = False) -> list[str]:
    """One line for each thing that keeps the folder from being trained. Prints warnings for what only looks wrong."""
    return first_problems(folder, may_be_quantized) or value_problems(folder)


def first_problems(folder: Path, may_be_quantized: bool = False) -> list[str]:
    """What of it can be told without torch and transformers, whose import takes seconds."""
    if pointers := lfs_pointers(folder) or settings_files.dangling_links(folder):
        return pointers
    if not (folder / "config.json").is_file():
        return [no_config(folder)]
    if findings := settings_files.problems(folder):
        return findings
    try:
        config = config_files.read_json(folder / "config.json")
        findings = config_problems(folder, config, may_be_quantized) + weight_problems(folder)
        return findings or vocabulary_problems(folder, config)
    except UserError as error:
        return error.findings


def lfs_pointers(folder: Path) -> list[str]:
    """A line if files of the folder are Git LFS pointers instead of the files themselves."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS):
            found.append(path)
    if not found:
        return []
    more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
    return [f"{found[0]} is a git-lfs pointer ({found[0].stat().st_size} bytes){more} - run git lfs pull in {folder}"]


def no_config(folder: Path) -> str:
    """The line for a folder without config.json."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder}: holds a LoRA adapter, not a model - give its base model, and to train the "
            f"adapter on --use_lora --lora_weight_path {folder}; or merge it first: python -m finetune.merge"
        )
    return f"{folder}: no config.json there - give the folder of a whole checkpoint{meant.folder(folder)}"


# ---- config.json


def config_problems(folder: Path, config: dict, may_be_quantized: bool) -> list[str]:
    """A finding for a model that this toolkit does not train."""
    kind = config.get("model_type")
    if kind not in TRAINED_TYPES and not (isinstance(kind, str) and on_transformers.knows_model_type(kind)):
        what = f'model_type "{shortened(kind)}"' if kind else "no model_type"
        what = f"{folder}/config.json: {what}, which transformers does not know"
        return [f"{what} - give the folder of a Qwen checkpoint"]
    if findings := quant_settings.folder_problems(folder):
        return findings
    if quant_settings.of_folder(folder) and not may_be_quantized:
        return [quant_settings.needs_q_lora(folder)]
    return []


def value_problems(folder: Path) -> list[str]:
    """What first-generation Qwen's config class, which needs torch, finds wrong with config.json. Warns of unknown keys."""
    config = config_files.config_of(folder)
    if config.get("model_type") != "qwen" or settings_files.problems(folder):  # of which first_problems() speaks
        return []
    from qwen_model.configuration_qwen import QWenConfig

    warn_of_unknown_keys(folder, config)
    try:
        QWenConfig.from_dict(config)
    except Exception as error:  # whatever a value makes of transformers' classes
        return [f"{folder}/config.json: {shortened(error, 200)} - take the file of the published checkpoint"]
    return []


def warn_of_unknown_keys(folder: Path, config: dict) -> None:
    """Warns of a key that looks like a misspelt one of first-generation Qwen's: it has no effect."""
    from qwen_model.configuration_qwen import QWenConfig

    known = MORE_KEYS | set(QWenConfig().to_dict())
    for key in config.keys() - known:
        if close := difflib.get_close_matches(key, known - config.keys(), 1, 0.85):
            warn(f"{folder}/config.json: unknown config key {shortened(key)}; did you mean {close[0]}?")


def trained_length(config: dict) -> int | None:
    """How many tokens the model's training samples had."""
    return config.get("seq_length" if config.get("model_type") == "qwen" else "max_position_embeddings")


# ---- weights


def weight_problems(folder: Path) -> list[str]:
    """Findings for files that the index lists and that are missing, or shorter than their header says."""
    files = tensor_files.weight_files(folder)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        there = len(files) - len(missing)
        return [f"{folder}: missing {listed(missing, 3)} (index lists {len(files)} shards, {there} present) - download them again"]
    findings = []
    for path in files:
        try:
            tensors_of(path)
        except UserError as error:
            findings += error.findings
    return findings


def shapes(folder: Path) -> dict[str, list[int]]:
    """{name: shape} of the folder's tensors, from the headers of safetensors files; {} for .bin."""
    found = {}
    try:
        for path in tensor_files.weight_files(folder):
            found |= tensors_of(path)
    except (UserError, OSError):
        return {}
    return found | unpacked_shapes(found)


def unpacked_shapes(found: dict[str, list[int]]) -> dict[str, list[int]]:
    """{name: shape (out, in)} of the plain weights that GPTQ's tensors stand for."""
    layers = [name.removesuffix(".g_idx") for name in found if name.endswith(".g_idx")]
    layers = [name for name in layers if len(found.get(f"{name}.scales", ())) == 2]
    return {f"{name}.weight": [found[f"{name}.scales"][1], *found[f"{name}.g_idx"]] for name in layers}


def vocabulary_problems(folder: Path, config: dict) -> list[str]:
    """The rows of the embedding against config.json and the tokenizer."""
    found = shapes(folder)
    rows = next((found[name][0] for name in EMBEDDINGS if name in found), None)
    wanted = config.get("vocab_size")
    if rows is not None and wanted is not None and rows != wanted:
        what = f"{folder}: vocab {rows:,} in weights, {wanted:,} in config.json"
        return [f"{what} - take both from the same checkpoint"]
    if findings := tokenizer_problems(folder):
        return findings
    if config.get("model_type") != "qwen":
        return []
    with (folder / "qwen.tiktoken").open("rb") as file:
        tokens = sum(1 for line in file if line.strip()) + SPECIAL_TOKENS
    if wanted is not None and tokens > wanted:
        return [f"{folder}: the tokenizer has {tokens:,} tokens, the model {wanted:,} - give both of one checkpoint"]
    return []


def tokenizer_problems(folder: Path) -> list[str]:
    """A line for a folder without its tokenizer's vocabulary: transformers would make a tokenizer that knows no word."""
    kind = config_files.config_of(folder).get("model_type")
    if kind == "qwen" and not (folder / "qwen.tiktoken").is_file():
        return [f"{folder}: no qwen.tiktoken - copy it from the published checkpoint; the tokenizer needs it"]
    whole = (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if kind in LATER_TYPES and not whole:
        return [f"{folder}: no tokenizer.json, nor vocab.json with merges.txt - copy them from the published checkpoint"]
    return []


def has_outdated_code(folder: Path) -> bool:
    """Whether the folder has this toolkit's code of before versions.py. (Published code has no head_loss.py.)"""
    return (folder / "head_loss.py").is_file() and not (folder / "versions.py").is_file()


# ---- LoRA's layers


def block_layers(model_type: str | None) -> list[str]:
    """The names of the linear layers in a block of this kind of model; [] for a kind that is not trained here."""
    return list(BLOCK_LAYERS.get(str(model_type), ()))


def adaptable_layers(folder: Path) -> list[str]:
    """The names of the layers that LoRA can adapt; [] where that is not known."""
    if config_files.config_of(folder).get("model_type") == "qwen":
        return block_layers("qwen")
    found = shapes(folder).items()
    matrices = [name.split(".") for name, shape in found if len(shape) == 2 and name.endswith(".weight")]
    return sorted({parts[-2] for parts in matrices if any(part.isdigit() for part in parts)})


def unknown_layers(folder: Path, targets: list[str]) -> list[str]:
    """Those of `targets` that name no layer of a block. A name may be qualified, as peft reads it: attn.c_proj, h.0.attn.c_proj."""
    config = config_files.config_of(folder)
    kind, count = config.get("model_type"), config.get("num_hidden_layers")
    if list(targets) == ["auto"] or kind not in TRAINED_TYPES:
        return []
    numbers = range(count) if type(count) is int and count <= settings_files.MOST_LAYERS else (0,)  # of a bad one, others speak
    layers = [f".{BLOCKS[kind]}.{number}.{place}" for number in numbers for place in PLACES[kind]]
    return [name for name in targets if not any(layer.endswith(f".{name}") for layer in layers)]
