"""What optimizers need beside transformers' own choice: packages, settings, LoRA+, and rounding for weights held in bfloat16."""

import importlib.util
import os
import shutil
from collections.abc import Iterator

from ..compat.on_transformers import word
from ..errors import shortened

# of transformers' --optim: torchao's AdamW, with a state of 8 or 4 bits, that can round stochastically
ROUNDING = ("adamw_torch_8bit", "adamw_torch_4bit")
# the beginning of a name of --optim: (its module, how to install it)
PACKAGES = {
    "galore_": ("galore_torch", "pip install galore-torch"),
    "apollo_": ("apollo_torch", "pip install apollo-torch"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
    "adamw_anyprecision": ("torchdistx", "pip install git+https://github.com/pytorch/torchdistx"),
    "adamw_torch_xla": ("torch_xla", "pip install torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "pip install torch-npu"),
}
OTHER_ONE = "give another one, as adamw_torch_fused"
# names of --optim that this trainer cannot honour: why
REFUSED = {name: "steps inside the backward pass, and a step is several passes here" for name in (
    "lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw_layerwise",
)} | {name: "its weights are to be averaged before they are evaluated and saved, which is not done here" for name in (
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd",
)}  # fmt: skip
LOW_RANK = ("rank", "update_proj_gap", "scale", "proj_type")
ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
# the beginning of a name of --optim: the settings that it takes from --optim_args. Weight decay is --weight_decay.
ARGS = {
    "ademamix": ADEMAMIX,
    "paged_ademamix": ADEMAMIX,
    "adamw_torch_8bit": ("bf16_stochastic_round",),
    "adamw_torch_4bit": ("bf16_stochastic_round",),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "rmsprop_bnb": (),
    "galore_": LOW_RANK,
    "apollo_": (*LOW_RANK, "proj", "scale_type"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
    "adamw_anyprecision": ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
}


def problems(training) -> Iterator[str]:
    """What is wrong with --optim and what it needs, as far as names tell. Without torch."""
    name = word(training.optim)
    if why := REFUSED.get(name):
        yield f"--optim {name}: {why} - {OTHER_ONE}"
        return
    if why := lacking(name):
        yield f"--optim {name}: {why}"
        return
    targets, beginning = training.optim_target_modules, name.split("_")[0]
    if beginning in ("galore", "apollo") and not targets:
        yield f"--optim {name}: needs to know its layers - add --optim_target_modules all-linear"
    if targets and beginning not in ("galore", "apollo"):
        yield f"--optim_target_modules {targets}: is for galore and apollo, and {name} does not read it - leave it out"
    yield from args_problems(name, training.optim_args)


def args_problems(name: str, given: str | None) -> Iterator[str]:
    """Settings of --optim_args that are none, or that the optimizer does not read."""
    known, parts = of_name(ARGS, name) or (), (given or "").replace(" ", "").split(",")
    takes = f"{name} takes {', '.join(f'{key}=...' for key in known)}" if known else f"{name} takes none: leave it out"
    for part in filter(None, [given and part for part in parts]):
        key, equals, value = part.partition("=")
        if not equals or not value or "=" in value:
            yield f"--optim_args {shortened(part)}: is no setting - write name=value, several with commas between; {takes}"
        elif key not in known:
            yield f"--optim_args {shortened(part)}: {name} does not read it - {takes}"
    if given is not None and "" in parts and (len(parts) > 1 or given.strip()):
        yield f"--optim_args {shortened(given)}: a comma too many - write name=value, several with commas between"


def of_name(table: dict, name: str):
    """The entry of the longest beginning of `name` that the table has; None without one."""
    found = [beginning for beginning in table if name.startswith(beginning)]
    return table[max(found, key=len)] if found else None


def is_slow_to_try(name: str) -> bool:
    """Its first step takes a minute (torchao compiles it), or it looks for the model's own layers."""
    return name in ROUNDING or name.startswith(("galore_", "apollo_"))


def remedy(name: str) -> str:
    """What to do about an optimizer that does not work."""
    known = of_name(ARGS, name)
    return (f"mend --optim_args ({', '.join(known)}), or " if known else "") + OTHER_ONE


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
    name = word(optim)
    return 1 if "4bit" in name else 2 if "8bit" in name else 8 if "adam" in name else 4


def lacking(optim: str) -> str | None:
    """What an optimizer (of --optim) lacks on this machine, and what to do; None where it runs."""
    if optim in ROUNDING:
        return missing()
    if (package := of_name(PACKAGES, optim)) and importlib.util.find_spec(package[0]) is None:
        return f"the package is missing - {package[1]}"
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
