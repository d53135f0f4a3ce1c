"""Does an adapter folder hold every tensor that its config lists? Told from headers, before weights are loaded."""

import re
from pathlib import Path

from . import model_folder
from .errors import UserError

PREFIX = "base_model.model."
EMBEDDINGS = {"wte", "lm_head", "embed_tokens"}


def check(folder: Path, base: Path | None = None, flag: str = "") -> None:
    """Raises UserError where tensors are missing. flag: the one that names the folder, for the message."""
    missing = missing_tensors(folder, base)
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        what = f"{flag} {folder}: adapter misses {', '.join(missing[:4])}{more}".strip()
        published = " (the published finetune.py's last save leaves embeddings out)" if set(missing) & EMBEDDINGS else ""
        what = f"{what}, which adapter_config.json lists{published}"
        raise UserError(f"{what} - give a checkpoint-N of that run, or train again")


def missing_tensors(folder: Path, base: Path | None = None) -> list[str]:
    """What adapter_config.json lists and the file lacks: ["wte", "lm_head"]; without `base`, as far as can be told.

    Raises UserError where the file cannot be read.
    """
    config, names = model_folder.read_json(folder / "adapter_config.json"), tensor_names(folder)
    tied = base is not None and model_folder.config_of(base).get("tie_word_embeddings", False)
    expected = [*whole_modules(config, tied), *rows(config, tied), *halves(config, names), *everywhere(config, names)]
    if base is not None:
        expected += layers(config, base) + biases(config, base)
    found = [f".{name}" for name in names]
    return [label for label, ending in dict(expected).items() if not any(match(ending, name) for name in found)]


def match(ending: str, name: str) -> bool:
    """Peft keeps what it wraps one module further inside; before 0.6 it did not."""
    return name.replace(".base_layer.", ".").endswith(ending)


def tensor_names(folder: Path) -> list[str]:
    """The tensors of adapter_model.safetensors, or of .bin."""
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return list(model_folder.tensors_of(file))
    import torch

    return list(torch.load(folder / "adapter_model.bin", map_location="meta", weights_only=True))


# ---- what must be there: pairs (name for the message, end of the tensor's name)


def whole_modules(config: dict, tied: bool) -> list[tuple[str, str]]:
    """modules_to_save; of a tied pair either name will do, and peft adds one of its own."""
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
    parts = ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * bool(config.get("use_dora"))
    found = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in names if ".lora_" in name)
    return [listed(layer.removeprefix(PREFIX), part) for layer in found for part in parts]


def everywhere(config: dict, names: list[str]) -> list[tuple[str, str]]:
    """At least one adapter of each kind of layer that is listed."""
    targets = config.get("target_modules")
    found = {name.rsplit(".lora_", 1)[0].split(".")[-1] for name in names if ".lora_" in name}
    kinds = targets if isinstance(targets, list) else []
    return [listed(kind, "lora_A.weight") for kind in kinds if kind.split(".")[-1] not in found]


def layers(config: dict, base: Path) -> list[tuple[str, str]]:
    """An adapter for each layer of the base that the config means."""
    return [listed(layer, "lora_A.weight") for layer in adapted_layers(config, base)]


def biases(config: dict, base: Path) -> list[tuple[str, str]]:
    """The base's biases, all of them or those of the adapted layers. A quantized file lists some that no model has."""
    if model_folder.config_of(base).get("quantization_config"):
        return []
    there = [name.removesuffix(".bias") for name in model_folder.shapes(base) if name.endswith(".bias")]
    adapted = set(adapted_layers(config, base))
    wanted = {"all": there, "lora_only": [name for name in there if name in adapted]}
    return [listed(name, "bias") for name in wanted.get(config.get("bias"), [])]


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


def listed(layer: str, part: str) -> tuple[str, str]:
    return f"{layer}.{part.removesuffix('.weight')}", f".{layer}.{part}"
