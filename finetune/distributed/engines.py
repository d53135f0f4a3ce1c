"""Engines: how a step is spread over several processes. One process, DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2.

name_of(values)        which one the flags ask for
deepspeed_config(...)  the file of --deepspeed, checked against the flags and completed from them
connect(training)      torch's process group, on every rank
"""

import datetime
import importlib.util
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from . import ranks

ONE, DDP, ZERO1, ZERO2, ZERO3, FSDP = "one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"
FSDP_WORDS = ("true", "1", "full_shard", "auto_wrap", "offload")
HERE = Path(__file__).parent.parent
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


def name_of(values: dict) -> str:
    """The engine that flags ask for. values: of TrainingArguments, where --deepspeed may be a file or its content."""
    if values.get("deepspeed"):
        return zero_stage(values["deepspeed"])
    if fsdp_words(values):
        return FSDP
    return DDP if ranks.count() > 1 else ONE


def zero_stage(config) -> str:
    """The engine of a DeepSpeed configuration: its content, or a file (ZeRO-2 where that does not tell)."""
    content = config if isinstance(config, dict) else read(config)[0]
    stage = at(content, "zero_optimization", "stage")
    return next((name for number, name in ((1, ZERO1), (2, ZERO2), (3, ZERO3)) if stage == number), ZERO2)


# ---- DeepSpeed's file


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


# ---- FSDP2


def fsdp_words(values: dict) -> list[str]:
    """--fsdp as words, in lower case; [] where it is left out or says no. launch_torchrun.sh reads it alike."""
    words = re.sub(r"[\[\]',]", " ", str(values.get("fsdp") or "")).lower().split()
    return [] if words in (["false"], ["none"], ["no"], ["0"]) else words


def fsdp_settings(values: dict) -> tuple[dict, list[str]]:
    """(the flags with --fsdp as FSDP2's settings, findings). full_shard and auto_wrap mean what True means."""
    words = fsdp_words(values)
    if not words:
        return values | {"fsdp": None}, []
    if unknown := [word for word in words if word not in FSDP_WORDS]:
        what = f"--fsdp {values['fsdp']}: {' '.join(unknown)} is nothing that FSDP2 does here"
        return values | {"fsdp": None}, [f"{what} - give True, full_shard, auto_wrap, offload or False"]
    config, findings = fsdp_config(values.get("fsdp_config") or {})
    usual = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_offload": "offload" in words}
    return values | {"fsdp": True, "fsdp_config": usual | config}, findings


def fsdp_config(given) -> tuple[dict, list[str]]:
    """(content, findings) of --fsdp_config: an object, its text, or a file."""
    if isinstance(given, dict):
        return given, []
    try:
        content = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"is not JSON ({error})"
        return {}, [f"--fsdp_config {given}: {why} - give a JSON file, or leave it out"]
    if not isinstance(content, dict):
        kind = type(content).__name__
        return {}, [f"--fsdp_config {given}: holds a {kind}, not an object - give a JSON object, or leave it out"]
    return content, []


# ---- the process group


def connect(training) -> None:
    """Joins torch's process group, where there are several ranks or an engine that wants one; sets `training`'s device.

    All ranks have met before, so nobody waits here for one that is still reading data.
    """
    import torch
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    engine = name_of(vars(training))
    if engine != ONE and not torch.distributed.is_initialized():
        if ranks.count() == 1:
            alone()
        backend = training.ddp_backend or ("gloo" if training.use_cpu else "cuda:nccl,cpu:gloo")
        if not training.use_cpu:
            torch.cuda.set_device(ranks.local_rank())
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=training.ddp_timeout))
        if training.deepspeed:
            import deepspeed

            # on the CPU it would compile an operator for inference, a minute long
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes the group that is there
    training.distributed_state = PartialState(cpu=training.use_cpu)
    if engine == FSDP and training.use_cpu:  # accelerate knows FSDP on GPUs only; torch's runs on CPUs, too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def alone() -> None:
    """The environment of a run of one rank that nobody launched."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for key, value in (here | {"MASTER_PORT": port}).items():
        os.environ.setdefault(key, str(value))


def gather(model, engine: str, dtype=None) -> dict | None:
    """Parameter names and whole tensors on the CPU of the first rank, {} on the others; None where nothing is sharded.

    Of an adapter only what trains is gathered, never the frozen model: one parameter at a time, all ranks together. Half
    precision that trains comes from DeepSpeed's float32 masters. dtype: what to store in; default: as it comes.
    """
    if engine in (ONE, DDP):
        return None
    adapter, kept = hasattr(model, "peft_config"), {}
    # peft saves a tied pair that it trains whole under both names
    for name, parameter in model.named_parameters(remove_duplicate=not adapter):
        if parameter.requires_grad or not adapter:
            tensor = whole(parameter, engine, masters=adapter)
            if ranks.rank() == 0:
                kept[name] = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True)
    return kept


def whole(parameter, engine: str, masters: bool):
    """One parameter, unsharded."""
    if engine == FSDP:
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    import deepspeed

    if masters and (master := deepspeed.utils.safe_get_full_fp32_param(parameter)) is not None:
        return master.reshape(getattr(parameter, "ds_shape", parameter.shape))
    with deepspeed.zero.GatheredParameters([parameter], enabled=engine == ZERO3):
        return parameter.detach().clone()


def size_of(parameter) -> int:
    """How many numbers a parameter has, also where this rank holds none of them."""
    return getattr(parameter, "ds_numel", parameter.numel())


def disconnect() -> None:
    """Leaves the process group; where there is none, nothing happens."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
