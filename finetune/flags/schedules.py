"""What each --lr_scheduler_type takes of --lr_scheduler_kwargs, and what it needs; tests/flags/test_trials.py asks transformers."""

from collections.abc import Iterator

from .. import json_text
from ..compat.on_transformers import word
from ..errors import shortened
from . import values

RATES = ("num_cycles", "min_lr", "min_lr_rate")
# the keys that each type takes
KEYS = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "reduce_lr_on_plateau": ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps"),
    "cosine_with_min_lr": RATES,
    "cosine_warmup_with_min_lr": (*RATES, "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
    "greedy": (
        "mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "warmup", "min_lr", "max_lr", "eps",
        "verbose", "smooth", "window_size", "reset_start",
    ),
}  # fmt: skip
# one of these must be given
NEEDED = {
    "cosine_with_min_lr": ("min_lr_rate", "min_lr"),
    "cosine_warmup_with_min_lr": ("min_lr_rate", "min_lr"),
    "warmup_stable_decay": ("num_decay_steps",),
    "greedy": ("min_lr",),  # its own, 0.001, is above most learning rates
}
SHARE, POSITIVE, COUNT = "from 0 to 1", "above 0", "0 or more"
# what a setting must be; all others are words
RANGES = {
    "num_cycles": POSITIVE, "min_lr": COUNT, "min_lr_rate": SHARE, "min_lr_ratio": SHARE, "warmup_lr_rate": SHARE, "lr_end": COUNT,
    "power": POSITIVE, "timescale": POSITIVE, "num_decay_steps": COUNT, "num_stable_steps": COUNT, "factor": SHARE, "patience": COUNT,
    "threshold": COUNT, "cooldown": COUNT, "warmup": COUNT, "max_lr": POSITIVE, "eps": COUNT, "window_size": POSITIVE,
}  # fmt: skip
INSIDE = {SHARE: lambda x: 0 <= x <= 1, POSITIVE: lambda x: x > 0, COUNT: lambda x: x >= 0}
EXAMPLES = {
    "cosine_with_min_lr": '{"min_lr_rate": 0.1}',
    "cosine_warmup_with_min_lr": '{"min_lr_rate": 0.1}',
    "warmup_stable_decay": '{"num_decay_steps": 100}',
    "greedy": '{"min_lr": 1e-6}',
}
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # they look at the evaluated loss


def problems(training: dict) -> Iterator[str]:
    """What is wrong with --lr_scheduler_type and its settings. training: the values of the training flags."""
    name = word(training["lr_scheduler_type"])
    if name not in KEYS or any(values.object_problems("lr_scheduler_kwargs", training["lr_scheduler_kwargs"], None)):
        return  # said elsewhere
    settings = values.json_object(training["lr_scheduler_kwargs"])
    if unknown := [key for key in settings if key not in KEYS[name]]:
        yield f"--lr_scheduler_kwargs: {shortened(name)} takes no {shortened(', '.join(unknown))} - {advice(name)}"
    if none := [key for key, value in settings.items() if json_text.finite(value) != value]:
        yield f"--lr_scheduler_kwargs: {shortened(none[0])} is {settings[none[0]]}, which is no number - {advice(name)}"
    for key, value in settings.items():
        wanted = RANGES.get(key)
        if wanted and value is not None and not (type(value) in (int, float) and INSIDE[wanted](value)) and key in KEYS[name] and key not in none:
            yield f"--lr_scheduler_kwargs: {key} is {shortened(json_text.dumps(value))}, and must be a number {wanted} - change it"
    needed = NEEDED.get(name, ())
    if needed and not any(settings.get(key) is not None for key in needed):
        yield f"--lr_scheduler_type {name}: needs {' or '.join(needed)} - add --lr_scheduler_kwargs '{EXAMPLES[name]}'"
    if name in BY_EVALUATION and word(training["eval_strategy"]) == "no":
        yield f"--lr_scheduler_type {name}: follows the evaluated loss - add --eval_data_path or --eval_split, or give another one"


def advice(name: str) -> str:
    """The settings that a type takes."""
    keys = KEYS[name]
    return f"--lr_scheduler_kwargs of {name} are {', '.join(keys)}" if keys else f"{name} has none: leave out --lr_scheduler_kwargs"


def with_kwargs(training) -> str:
    """The settings behind a schedule's name, as they were given."""
    return f" --lr_scheduler_kwargs {shortened(training.lr_scheduler_kwargs)}" if training.lr_scheduler_kwargs else ""
