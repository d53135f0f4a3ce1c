"""PiSSA (Meng et al., 2024): adapters begin with a weight's strongest directions, which leave the base while training.

With A0, B0 the beginning and s the scale, the base's W becomes W - s B0 A0, and the model is W - s B0 A0 + s B A. The result
of a run is written for the untouched base, as a plain LoRA of twice the rank: B A - B0 A0 = [B, -B0] [A; A0].
Checkpoints keep A and B as they are, and A0, B0 beside them: decomposing anew may turn out otherwise.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import json_text
from ..compat import on_peft

START = "pissa_start.safetensors"


def is_asked_for(init) -> bool:
    """Whether --init_lora_weights, or an adapter's init_lora_weights, asks for PiSSA."""
    return isinstance(init, str) and init.startswith("pissa")


def stored(folder: Path) -> bool:
    """Whether a checkpoint holds its initial A and B."""
    return (folder / START).is_file()


def read_start(folder: Path) -> dict[str, torch.Tensor]:
    """{name of an adapter's tensor, as saved: its initial value}."""
    return load_file(folder / START)


def remember(adapted) -> None:
    """Keeps a copy of the initial A and B on the CPU, on a model that peft has just decomposed."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    adapted.pissa_start = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items() if is_matrix(name)
    }


def is_matrix(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def begin_again(adapted, folder: Path, init: str) -> None:
    """Restores the initial state of the run that wrote `folder`, on a model with plain adapters."""
    start = read_start(folder)
    take_out_of_base(adapted, start)
    for name, layer in on_peft.lora_layers(adapted).items():
        for matrix, side in ((layer.lora_A, "A"), (layer.lora_B, "B")):
            matrix["default"].weight.data.copy_(start[f"{name}.lora_{side}.weight"])
    adapted.peft_config["default"].init_lora_weights = init


def take_out_of_base(adapted, start: dict[str, torch.Tensor]) -> None:
    """W becomes W - s B0 A0, to the bit as when the run began; also where ZeRO-3 holds W in shards."""
    for name, layer in on_peft.lora_layers(adapted).items():
        A, B = (start[f"{name}.lora_{side}.weight"] for side in "AB")
        weight = layer.get_base_layer().weight
        scale = layer.scaling["default"]
        with on_peft.gathered(weight, changes=True):
            B, A = B.to(weight.device), A.to(weight.device)
            weight.data = (weight.data.float() - scale * B @ A).to(weight.dtype)
    adapted.pissa_start = start


# ---- saving


def save_start(model, folder: Path) -> None:
    """Saves the initial A and B beside a checkpoint's; without PiSSA, nothing."""
    if getattr(model, "pissa_start", None):
        save_file(model.pissa_start, folder / START, metadata={"format": "pt"})


def as_plain(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors for the untouched base; without PiSSA, as they are."""
    start, result = getattr(model, "pissa_start", None) or {}, dict(tensors)
    for name, begun in start.items():
        tensor = tensors[name].cpu()
        result[name] = torch.cat([tensor, begun], 0) if ".lora_A." in name else torch.cat([tensor, -begun], 1)
    return result


def make_plain(model, folder: Path) -> None:
    """Turns a saved adapter into one for the untouched base; without PiSSA, leaves it."""
    if not getattr(model, "pissa_start", None):
        return
    file = folder / "adapter_model.safetensors"
    save_file(as_plain(model, load_file(file)), file, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # the scale is alpha / r, or alpha / sqrt(r) with rsLoRA; it stays
    config |= {
        "r": 2 * config["r"],
        "lora_alpha": config["lora_alpha"] * (2**0.5 if config["use_rslora"] else 2),
        "init_lora_weights": True,
    }
    path.write_text(json_text.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / START).unlink(missing_ok=True)
