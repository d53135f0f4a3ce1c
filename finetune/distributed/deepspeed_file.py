"""The file of --deepspeed: checked against the flags, and completed from them.

A flag that a file may contradict stands in settings_of_flags().
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from . import ranks

HERE = Path(__file__).parent.parent  # where the scripts and our files lie
# the blocks of a DeepSpeed file that flags replace, and of them the keys that are compared with a flag
REPLACED = {
    "bf16": {"enabled"},
    "bfloat16": {"enabled"},
    "optimizer": {"type", "params"},
    "optimizer.params": {"lr", "betas", "eps", "weight_decay"},
    "scheduler": {"type", "params"},
    "scheduler.params": {"warmup_max_lr", "warmup_min_lr", "warmup_num_steps", "total_num_steps"},
}
AS_HERE = {"torch_adam": True, "adam_w_mode": True, "warmup_type": "linear", "last_batch_iteration": -1}
CURVES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def find(name: str) -> Path | None:
    """The file of --deepspeed: a path, or the name of one of ours (ds_config_zero3.json)."""
    places = (Path(name).expanduser(), HERE / name, HERE.parent / name)
    return next((path for path in places if path.is_file()), None)


def read(name: str) -> tuple[dict | None, list[str]]:
    """(content, findings) of a DeepSpeed file."""
    path = find(name)
    if path is None:
        ours = ", ".join(sorted(file.name for file in HERE.glob("ds_config_*.json")))
        return None, [f"--deepspeed {name}: no such file in {Path.cwd()} - give a path, or one of {ours}"]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return None, [f"--deepspeed {path}: is not JSON ({error}) - take one of {HERE}/ds_config_*.json"]
    if not isinstance(content, dict):
        return None, [
            f"--deepspeed {path}: holds a {type(content).__name__}, not an object - see {HERE}/ds_config_*.json"
        ]
    return content, []


def deepspeed_config(name: str, values: dict) -> tuple[dict, list[str]]:
    """(the complete configuration, findings): the file's sharding with the flags' precision, clipping and batch.

    What a flag sets is taken from the flag. A file may repeat it, or say "auto"; one that says something else is an error.
    """
    config, findings = read(name)
    if config is None:
        return {}, findings
    if importlib.util.find_spec("deepspeed") is None:
        findings.append("--deepspeed: the package is missing - pip install deepspeed")
    if malformed := [block for block in (*REPLACED, "fp16", "zero_optimization") if not is_object(config, block)]:
        what = [f"{block} is {json.dumps(at(config, *block.split('.')))}, not an object" for block in malformed]
        return {}, [*findings, *(f"--deepspeed {name}: {line} - see {HERE}/ds_config_*.json" for line in what)]
    if at(config, "zero_optimization", "stage") not in (1, 2, 3):
        what = f"--deepspeed {name}: no zero_optimization.stage of 1, 2 or 3, so nothing is split"
        findings.append(f"{what} - use --deepspeed none (finetune.py by hand: leave it out), or a file with a stage")
    if at(config, "zero_optimization", "compute_grad_norm") is False:
        what = f"--deepspeed {name}: zero_optimization.compute_grad_norm is false there, and a step is watched by the norm of its gradient"
        findings.append(f"{what} - leave it out of the file")
    for key, theirs in unread(config):
        what = f"--deepspeed {name}: {key} is {json.dumps(theirs)} there, and nothing here reads it"
        findings.append(f"{what} - leave it out of the file; the flags set precision, optimizer and learning rate")
    for (key, theirs), flag, ours in settings_of_flags(config, values):
        if theirs is not None and theirs != "auto" and not equal(theirs, ours):
            findings.append(
                f"--deepspeed {name}: {key} is {json.dumps(theirs)} there, and {flag} is {json.dumps(ours)} - "
                f"leave {'the whole block' if '.' in key else 'the key'} out of the file, the flag sets it"
            )
    return completed(config, values), findings


def settings_of_flags(config: dict, values: dict):
    """Yields ((key, its value in the file or None), flag, the flag's value) for all that both could set."""

    def file(*keys):
        return ".".join(keys), at(config, *keys)

    samples = values["per_device_train_batch_size"]
    steps = values["gradient_accumulation_steps"]
    yield file("bf16", "enabled"), "--bf16", values["bf16"]
    yield file("bfloat16", "enabled"), "--bf16", values["bf16"]
    yield file("fp16", "enabled"), "--fp16", values["fp16"]
    yield file("gradient_clipping"), "--max_grad_norm", values["max_grad_norm"]
    yield file("train_micro_batch_size_per_gpu"), "--per_device_train_batch_size", samples
    yield file("gradient_accumulation_steps"), "--gradient_accumulation_steps", steps
    yield file("train_batch_size"), "batch x accumulation x ranks", samples * steps * ranks.count()
    yield file("optimizer", "params", "lr"), "--learning_rate", values["learning_rate"]
    betas = [values["adam_beta1"], values["adam_beta2"]]
    yield file("optimizer", "params", "betas"), "--adam_beta1 and --adam_beta2", betas
    yield file("optimizer", "params", "eps"), "--adam_epsilon", values["adam_epsilon"]
    yield file("optimizer", "params", "weight_decay"), "--weight_decay", values["weight_decay"]
    key, optimizer = file("optimizer", "type")
    asked = str(values["optim"])
    yield (key, optimizer), "--optim", optimizer if str(optimizer).lower() in asked.lower() else asked
    yield file("scheduler", "params", "warmup_max_lr"), "--learning_rate", values["learning_rate"]
    yield file("scheduler", "params", "warmup_min_lr"), "the beginning of every warm-up", 0
    yield file("scheduler", "params", "warmup_num_steps"), *warmup(values)
    yield file("scheduler", "params", "total_num_steps"), "--max_steps", values["max_steps"]
    key, schedule = file("scheduler", "type")
    asked = str(values["lr_scheduler_type"])
    yield (key, schedule), "--lr_scheduler_type", schedule if CURVES.get(str(schedule)) == asked else asked


def warmup(values: dict) -> tuple[str, float]:
    """The flag that says how long the warm-up is, and its value."""
    name = "warmup_ratio" if values["warmup_ratio"] and not values["warmup_steps"] else "warmup_steps"
    return f"--{name}", values[name]


def unread(config: dict) -> Iterator[tuple[str, object]]:
    """(key, value) of what stands in replaced blocks and is compared with no flag: it would be dropped in silence."""
    for block, compared in REPLACED.items():
        for key, value in (at(config, *block.split(".")) or {}).items():
            if key not in compared and value != "auto" and value != AS_HERE.get(key):
                yield f"{block}.{key}", value


def at(config, *keys):
    """The value below these keys, or None."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def is_object(config: dict, block: str) -> bool:
    """May be left out, too."""
    return isinstance(at(config, *block.split(".")) or {}, dict)


def equal(theirs, ours) -> bool:
    """1e-5 and "1e-5" are the same, and so are 1 and 1.0."""
    try:
        pairs = zip(theirs, ours, strict=True) if isinstance(ours, list) else [(theirs, ours)]
        return all(float(a) == float(b) for a, b in pairs)
    except (TypeError, ValueError):
        return theirs == ours


def completed(config: dict, values: dict) -> dict:
    """What DeepSpeed reads. Optimizer and learning rate stay torch's; a step is one item, whatever passes it has."""
    zero = {"stage3_gather_16bit_weights_on_model_save": False} | (config.get("zero_optimization") or {})
    own = {
        "bf16": {"enabled": values["bf16"]},
        "fp16": {key: value for key, value in (config.get("fp16") or {}).items() if value != "auto"}
        | {"enabled": values["fp16"]},
        "gradient_clipping": values["max_grad_norm"],
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks.count(),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW works offloaded too, and needs no compiler
        "steps_per_print": 1 << 60,
    }
    if values["bf16"]:  # the passes of a step add up in float32
        own["data_types"] = {"grad_accum_dtype": "fp32"} | (config.get("data_types") or {})
    return (
        {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
        | own
        | {"zero_optimization": zero}
    )
