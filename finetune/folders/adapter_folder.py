"""Checks that an adapter folder holds every tensor that its config lists, from headers alone."""

import dataclasses
import os
import re
from pathlib import Path

from ..errors import UserError, listed, shortened
from . import config_files, model_folder

PREFIX = "base_model.model."
EMBEDDINGS = {"wte", "lm_head", "embed_tokens"}


def check_adapter(folder: Path, base: Path | None = None, flag: str = "") -> None:
    """Raises UserError where tensors are missing. flag: the one that names the folder, for the message."""
    missing = missing_tensors(folder, base)
    if missing:
        what = f"{flag} {folder}: adapter misses {listed([shortened(name) for name in missing], 4)}".strip()
        embeddings = set(missing) <= EMBEDDINGS
        published = " (the published finetune.py's last save leaves embeddings out)" if embeddings else ""
        base_too = "" if base is None or embeddings else "its own base, or "
        what = f"{what}, which adapter_config.json lists{published}"
        raise UserError(f"{what} - give {base_too}a checkpoint-N of that run, or train again")


def missing_tensors(folder: Path, base: Path | None = None) -> list[str]:
    """What adapter_config.json lists and the file lacks: ["wte", "lm_head"]; without `base`, as far as can be told.

    Raises UserError where the file cannot be read.
    """
    config, names = config_files.read_json(folder / "adapter_config.json"), tensor_names(folder)
    tied = base is not None and config_files.config_of(base).get("tie_word_embeddings", False)
    expected = [*whole_modules(config, tied), *rows(config, tied), *halves(config, names), *everywhere(config, names)]
    if base is not None:
        expected += layers(config, base) + biases(config, base)
    found = [f".{name}" for name in names]
    return [label for label, ending in dict(expected).items() if not any(match(ending, name) for name in found)]


def match(ending: str, name: str) -> bool:
    """Compares without peft's `.base_layer`, which peft before 0.6 did not write."""
    return name.replace(".base_layer.", ".").endswith(ending)


def tensor_names(folder: Path) -> list[str]:
    """The names of the tensors in adapter_model.safetensors or .bin."""
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return list(model_folder.tensors_of(file))
    from .shards import read_bin  # with torch

    return list(read_bin(folder / "adapter_model.bin"))


# ---- an adapter that a run goes on from: its settings hold, not the flags

OF_ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias", "use_dora", "use_rslora",
              "init_lora_weights")  # fmt: skip


def lora_of_run(lora):
    """The flags (LoraArguments), or what the adapter of --lora_weight_path says in their place.

    Rows of any tokens are chat_rows there: whose they are, only a tokenizer can tell (adapters.flags_of).
    """
    if lora.lora_weight_path is None:
        return lora
    file = Path(lora.lora_weight_path) / "adapter_config.json"
    config = config_files.read_json(file) if file.is_file() else {}
    targets, init = config.get("target_modules") or [], config.get("init_lora_weights")
    whole = EMBEDDINGS & {name.split(".")[-1] for name in config.get("modules_to_save") or []}
    return dataclasses.replace(
        lora,
        lora_r=config.get("r", 8),  # where nothing is said, peft's defaults
        lora_alpha=config.get("lora_alpha", 8),
        lora_dropout=config.get("lora_dropout", 0.0),
        lora_target_modules=[targets] if isinstance(targets, str) else sorted(targets),
        lora_bias=config.get("bias", "none"),
        use_dora=bool(config.get("use_dora")),
        use_rslora=bool(config.get("use_rslora")),
        init_lora_weights=init if isinstance(init, str) else "default",
        train_embeddings="all" if whole else "chat_rows" if row_ids(config) else "none",
        train_tokens=[],
    )


def row_ids(config: dict) -> list[int]:
    """The token ids whose rows train, of embedding, head or both."""
    indices = config.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return sorted({index for ids in lists for index in ids})


def ignored_flags(lora) -> list[str]:
    """The flags (--lora_r 8) that a user has set, and that the adapter of --lora_weight_path contradicts."""
    own, usual = lora_of_run(lora), type(lora)()
    asked = {name: getattr(lora, name) for name in OF_ADAPTER if getattr(lora, name) != getattr(usual, name)}
    asked["lora_target_modules"] = sorted(asked.get("lora_target_modules", own.lora_target_modules))
    ignored = {name: value for name, value in asked.items() if value != getattr(own, name)}
    has_rows, wants = own.train_embeddings == "chat_rows", lora.train_embeddings
    if wants != "auto" and wants != own.train_embeddings and not (wants == "none" and lora.train_tokens and has_rows):
        ignored["train_embeddings"] = wants
    if lora.train_tokens and own.train_embeddings == "none":
        ignored["train_tokens"] = lora.train_tokens
    shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in ignored.items()}
    return [f"--{name}" if value is True else f"--{name} {value}" for name, value in shown.items()]


# ---- what must be there: pairs (name for the message, end of the tensor's name)


def whole_modules(config: dict, tied: bool) -> list[tuple[str, str]]:
    """modules_to_save. For tied weights either name will do, and peft adds one of its own."""
    names = list(dict.fromkeys(name.split(".")[-1] for name in config.get("modules_to_save") or []))
    return [(name, f".{name}.weight") for name in (names[:1] if tied else names)]


def rows(config: dict, tied: bool) -> list[tuple[str, str]]:
    """trainable_token_indices: {module: ids}, or ids of the embedding alone."""
    indices = config.get("trainable_token_indices") or {}
    names = list(indices) if isinstance(indices, dict) else [""]
    ending = ".token_adapter.trainable_tokens_delta"
    if tied or names == [""]:
        return [("rows of the embedding", ending)][: len(names)]
    return [(f"rows of {name}", f".{name}{ending}") for name in names]


def halves(config: dict, names: list[str]) -> list[tuple[str, str]]:
    """Beside each of an adapter's matrices the other one, and with DoRA the magnitudes."""
    found = dict.fromkeys(name.rsplit(".lora_", 1)[0].removeprefix(PREFIX) for name in names if ".lora_" in name)
    magnitude = ["lora_magnitude_vector"] * bool(config.get("use_dora"))
    return [of_layer(layer, part) for layer in found for part in [*matrices(layer), *magnitude]]


def matrices(layer: str) -> tuple[str, str]:
    """peft's names of A and B; an embedding's differ from a linear layer's."""
    if layer.split(".")[-1] in EMBEDDINGS - {"lm_head"}:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def everywhere(config: dict, names: list[str]) -> list[tuple[str, str]]:
    """At least one adapter of each kind of layer that is listed."""
    targets = config.get("target_modules")
    found = {name.rsplit(".lora_", 1)[0].split(".")[-1] for name in names if ".lora_" in name}
    kinds = targets if isinstance(targets, list) else []
    return [of_layer(kind, matrices(kind)[0]) for kind in kinds if kind.split(".")[-1] not in found]


def layers(config: dict, base: Path) -> list[tuple[str, str]]:
    """An adapter for each layer of the base that the config means."""
    return [of_layer(layer, matrices(layer)[0]) for layer in adapted_layers(config, base)]


def biases(config: dict, base: Path) -> list[tuple[str, str]]:
    """The base's biases, all of them or those of the adapted layers. A quantized file lists some that no model has."""
    if config_files.config_of(base).get("quantization_config"):
        return []
    there = [name.removesuffix(".bias") for name in model_folder.shapes(base) if name.endswith(".bias")]
    adapted = set(adapted_layers(config, base))
    wanted = {"all": there, "lora_only": [name for name in there if name in adapted]}
    return [of_layer(name, "bias") for name in wanted.get(config.get("bias"), [])]


def adapted_layers(config: dict, base: Path) -> list[str]:
    """The base's layers that target_modules names; [] where it is a pattern or other settings narrow it."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return []
    found = [
        re.sub(r"\.q?weight$", "", name)
        for name, shape in model_folder.shapes(base).items()
        if name.endswith("weight") and len(shape) == 2
    ]
    return [layer for layer in found if any(f".{layer}".endswith(f".{target}") for target in targets)]


def of_layer(layer: str, part: str) -> tuple[str, str]:
    return f"{layer}.{part.removesuffix('.weight')}", f".{layer}.{part}"


def adapter_model_card(base: str) -> str:
    """What an adapter is, for people and for the hub. Of a base that was a folder, the name only."""
    base = Path(base).name if os.path.isdir(base) else base
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\n---\n\n# LoRA adapter for {base}\n\n"
        "training.json says how it was made: data, settings, versions, and the fingerprint of its base. Try it with\n"
        "`python -m finetune.ask THIS_FOLDER`, make a model of it that stands alone with\n"
        "`python -m finetune.merge THIS_FOLDER OUT`, or open it with peft on its base.\n"
    )


def describe_adapter(config: dict) -> str:
    """An adapter's settings: "r=64 alpha=16 on c_attn, c_proj, w1, w2, bias none"."""
    targets = config.get("target_modules") or []
    named = shortened(targets if isinstance(targets, str) else ", ".join(sorted(targets)), 200)
    rank, alpha, bias = (shortened(config.get(name, usual), 30) for name, usual in (("r", None), ("lora_alpha", None), ("bias", "none")))
    return f"r={rank} alpha={alpha} on {named}, bias {bias}"
