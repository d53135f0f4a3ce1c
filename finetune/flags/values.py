"""The values that flags may have: numbers with their ranges, words, JSON objects. What is not in the table is refused in a line.

Every number among the flags, transformers' too, has a rule here, and every text that can only be one of some words
(tests/flags/test_values.py fails for one without). Neither torch nor transformers is imported.
"""

import difflib
import json
import math
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import shortened
from . import synonyms

INF = math.inf
COUNT = 2**31  # what counts samples, steps or tokens lies below: beyond it some package's integers end


class Number(NamedTuple):
    """From `low` up to, not including, `high`; above: low itself is too low. whole: from 1 on only whole numbers.

    off: a value outside of the range that means "not set".
    """

    low: float
    high: float = INF
    above: bool = False
    whole: bool = False
    off: float | None = None
    wanted: str = ""  # instead of the range in words

    def allows(self, value: float) -> bool:
        if value == self.off:
            return True
        lowest = value > self.low if self.above else value >= self.low
        return lowest and value < self.high and not (self.whole and value >= 1 and value != int(value))

    def words(self) -> str:
        """What to give: "a value from 0 up to, not including, 1"."""
        if self.wanted:
            return self.wanted
        start = f"above {self.low}" if self.above else f"at least {self.low}"
        if self.high == INF:
            return f"a value {start}, and no infinite one"
        return f"a value from {self.low} up to, not including, {self.high}" if not self.above else f"a value {start} and below {self.high}"


AT_LEAST_1 = Number(1, COUNT, wanted="a whole number of at least 1, and below 2147483648")
SHARE, SEED = Number(0, 1), Number(0, 2**32)
STEPS = Number(0, COUNT, above=True, whole=True, wanted="a number of steps, or below 1 a share of the run")
NOT_NEGATIVE = Number(0)
OF_DATA = {
    "eval_split": SHARE,
    "max_tokens_per_pass": AT_LEAST_1,
}
OF_LORA = {
    "lora_r": Number(1, 2**16),
    "lora_alpha": AT_LEAST_1,
    "lora_dropout": SHARE,
    "loraplus_lr_ratio": Number(1, wanted="at least 1; 16 is usual"),
}
OF_LOOK = {"gpu_memory": Number(0, above=True, wanted="the GB of a GPU, as 24")}
OF_TRAINING = {
    "model_max_length": Number(16, COUNT),
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "num_train_epochs": Number(0, 1e6),
    "max_steps": Number(-1, COUNT),
    "learning_rate": NOT_NEGATIVE,
    "warmup_ratio": SHARE,
    "warmup_steps": Number(0, COUNT, whole=True, wanted="a number of steps, or below 1 a share of the run"),
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": Number(0, above=True, wanted="a small number above 0; 1e-8 is usual"),
    "max_grad_norm": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "logging_steps": STEPS,
    "save_steps": STEPS,
    "eval_steps": STEPS,
    "eval_delay": Number(0, COUNT, wanted="a number of steps or epochs, 0 or more"),
    "eval_accumulation_steps": AT_LEAST_1,
    "torch_empty_cache_steps": AT_LEAST_1,
    "save_total_limit": AT_LEAST_1,
    "early_stopping_patience": Number(1, COUNT, wanted="how many evaluations in a row may be no better, as 3"),
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": Number(0, 1024),
    "dataloader_prefetch_factor": AT_LEAST_1,
    "ddp_bucket_cap_mb": AT_LEAST_1,
    "ddp_timeout": Number(1, 10**9, wanted="a number of seconds, as 1800"),
    "local_rank": Number(-1, COUNT),
}
NUMBERS = OF_DATA | OF_LORA | OF_LOOK | OF_TRAINING

STRATEGIES = ("no", "steps", "epoch")
# flag: its words; a version of transformers may know fewer, and refuses the others itself
WORDS = {
    "optim": (
        "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
        "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit",
        "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
        "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
        "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw",
        "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
    ),
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
    ),
    "eval_strategy": STRATEGIES,
    "logging_strategy": STRATEGIES,
    "save_strategy": (*STRATEGIES, "best"),
    "hub_strategy": ("end", "every_save", "checkpoint", "all_checkpoints"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}  # fmt: skip
SHOWN = 12  # of a flag's words; more of them are not listed, but those that are close

RECOMPUTING_KEYS = ("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "debug")
# flag: the keys of its JSON object; None: schedules.py knows them
OBJECTS = {
    "activation_checkpointing_kwargs": RECOMPUTING_KEYS,
    "gradient_checkpointing_kwargs": RECOMPUTING_KEYS,
    "lr_scheduler_kwargs": None,
}


def problems(values: dict, numbers: dict[str, Number]) -> Iterator[str]:
    """Numbers that are out of range. numbers: the rules of the flags among `values`; others are passed over."""
    for name, rule in numbers.items():
        value = values.get(name)
        if value is None or value == "auto" or rule.allows(value):
            continue
        yield f"--{name} {shortened(value)}: out of range - give {rule.words()}"


def of_training(values: dict) -> Iterator[str]:
    """What is wrong with the values of the training flags, each by itself."""
    yield from problems(values, OF_TRAINING)
    if values["num_train_epochs"] == 0 and values["max_steps"] <= 0:
        yield f"--num_train_epochs {values['num_train_epochs']}: nothing to train - give a number above 0"
    for name, known in WORDS.items():
        word = values.get(name)
        word = getattr(word, "value", word)
        if word is not None and word not in known:
            yield f"--{name} {shortened(word)}: unknown - {advice(name, str(word))}"
    for name, keys in OBJECTS.items():
        yield from object_problems(name, values.get(name), keys)
    if not str(values["output_dir"]).strip():
        yield '--output_dir "": is empty - give a folder'


def advice(name: str, word: str) -> str:
    """What to give in the place of a word that a flag does not know."""
    known = WORDS[name]
    if meant := synonyms.WORDS.get(name, {}).get(word.lower()):
        return f"did you mean {meant}?"
    if close := difflib.get_close_matches(word.lower(), known, 3, 0.5 if len(known) > SHOWN else 0.7):
        return f"did you mean {' or '.join(close)}?"
    return f"give {', '.join(known[:SHOWN])}" + (", ..." if len(known) > SHOWN else "")


def object_problems(name: str, given, keys: tuple[str, ...] | None) -> Iterator[str]:
    """A finding for a text that is no JSON object, or has keys that nothing reads. given: text, or the object."""
    try:
        content = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        yield f"--{name} {shortened(given)}: is not JSON ({error}) - give an object, as '{{\"name\": value}}'"
        return
    if content is None:
        return
    if not isinstance(content, dict):
        yield f"--{name} {shortened(given)}: is no JSON object - give one, as '{{\"name\": value}}'"
    elif keys and (unknown := [key for key in content if key not in keys]):
        yield f"--{name}: {shortened(', '.join(unknown))} is nothing that it reads - give of {', '.join(keys)}"


def json_object(given) -> dict:
    """The object of a flag that object_problems() found nothing wrong with."""
    return (json.loads(given) if isinstance(given, str) else given) or {}
