"""What optimizers need beside transformers' own choice: LoRA+, and rounding for weights held in bfloat16."""

import importlib.util
import os
import shutil

# of transformers' --optim: torchao's AdamW, with a state of 8 or 4 bits, that can round stochastically
ROUNDING = ("adamw_torch_8bit", "adamw_torch_4bit")


def prepare(training) -> None:
    """Tells transformers to have weights in bfloat16 rounded stochastically, where --bf16_weights asks for that.

    A weight of 0.05 has neighbours 0.00024 away in bfloat16; an update of 1e-6, rounded to the nearest, would never
    count. Rounded up with probability 1e-6 / 0.00024, it counts on average.
    """
    if getattr(training, "bf16_weights", False):
        others = [part for part in (training.optim_args or "").split(",") if part and "stochastic_round" not in part]
        training.optim_args = ",".join([*others, "bf16_stochastic_round=True"])


def state_bytes(optim) -> float:
    """Bytes of an optimizer's state a parameter. optim: of --optim. Paged ones may lie in main memory, and count all the same."""
    name = str(getattr(optim, "value", optim))
    return 1 if "4bit" in name else 2 if "8bit" in name else 8 if "adam" in name else 4


def lacking(optim: str) -> str | None:
    """What an optimizer (of --optim) lacks on this machine, and what to do; None where it runs."""
    if optim in ROUNDING:
        return missing()
    if is_of_bitsandbytes(optim) and importlib.util.find_spec("bitsandbytes") is None:
        return "is of bitsandbytes, and the package is missing - pip install bitsandbytes"
    return None


def is_of_bitsandbytes(optim: str) -> bool:
    """adamw_8bit, paged_adamw_32bit, rmsprop_bnb, ..."""
    own = optim.startswith("paged_") or "bnb" in optim or "8bit" in optim or optim in ("lion_32bit", "ademamix")
    return own and optim not in ROUNDING


def missing() -> str | None:
    """What torchao's optimizers lack on this machine, and what to do; None where they run."""
    if importlib.util.find_spec("torchao") is None:
        return "the package is missing - pip install torchao"
    if not (os.environ.get("CC") or os.environ.get("CXX") or any(map(shutil.which, ("gcc", "g++", "clang", "cc")))):
        return "compiles its step, and there is no C compiler - install gcc (apt install build-essential)"
    return None


def add_lora_plus(optimizer, model, ratio: float | None):
    """LoRA+ (Hayou et al., 2024): the B matrices learn `ratio` times as fast as all else. Returns the optimizer.

    Before the first step, and before a schedule is made. Weight decay stays as it was grouped; rows of embeddings, biases
    and magnitudes learn as usual.
    """
    if ratio is None or any("lora_plus" in group for group in optimizer.param_groups):
        return optimizer
    fast = {id(parameter) for name, parameter in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in fast]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in fast]
            settings = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group(settings | {"params": moved, "lr": group["lr"] * ratio, "lora_plus": ratio})
    # torch restores an optimizer under FSDP2 only where no group, or the last one, is empty
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer
