"""Engines: how a step is spread over several processes. One process, DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2.

name_of(values)     which one the flags ask for
connect(training)   torch's process group, on every rank
"""

import datetime
import json
import os
import re
import socket
from pathlib import Path

from ..compat import on_accelerate, on_deepspeed
from . import deepspeed_file, ranks

ONE, DDP, ZERO1, ZERO2, ZERO3, FSDP = "one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"
FSDP_WORDS = ("true", "1", "full_shard", "auto_wrap", "offload")


def name_of(values: dict) -> str:
    """The engine that flags ask for. values: of TrainingArguments, where --deepspeed may be a file or its content."""
    if values.get("deepspeed"):
        return zero_stage(values["deepspeed"])
    if fsdp_words(values):
        return FSDP
    return DDP if ranks.count() > 1 else ONE


def zero_stage(config) -> str:
    """The engine of a DeepSpeed configuration: its content, or a file (ZeRO-2 where that does not tell)."""
    content = config if isinstance(config, dict) else deepspeed_file.read(config)[0]
    stage = deepspeed_file.at(content, "zero_optimization", "stage")
    return next((name for number, name in ((1, ZERO1), (2, ZERO2), (3, ZERO3)) if stage == number), ZERO2)


def offloaded(training) -> str:
    """What the engine keeps in main memory: "", "optimizer" or "all". training: TrainingArguments."""
    if training.deepspeed:
        places = {part: deepspeed_file.at(training.deepspeed, "zero_optimization", f"offload_{part}", "device") for part in ("param", "optimizer")}
        on = [part for part, place in places.items() if place not in (None, "none")]
        return "all" if "param" in on else "optimizer" if on else ""
    return "all" if fsdp_words(vars(training)) and (training.fsdp_config or {}).get("cpu_offload") else ""


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

    on_accelerate.forget_state()
    engine = name_of(vars(training))
    if engine != ONE and not torch.distributed.is_initialized():
        if ranks.count() == 1:
            alone()
        backend = training.ddp_backend or ("gloo" if training.use_cpu else "cuda:nccl,cpu:gloo")
        device = None if training.use_cpu else own_device()
        torch.distributed.init_process_group(
            backend, timeout=datetime.timedelta(seconds=training.ddp_timeout), device_id=None if backend == "gloo" else device
        )
        if training.deepspeed:
            import deepspeed

            on_deepspeed.leave_out_shm_operator()
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes the group that is there
    training.distributed_state = PartialState(cpu=training.use_cpu)
    if engine == FSDP and training.use_cpu:  # accelerate knows FSDP on GPUs only; torch's runs on CPUs, too
        on_accelerate.pretend_multi_gpu()


def own_device():
    """This rank's GPU, made the current one."""
    import torch

    index = ranks.gpu(torch.cuda.device_count())
    if index != ranks.local_rank():
        os.environ["LOCAL_RANK"] = str(index)  # where DeepSpeed looks for the GPU
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def alone() -> None:
    """Sets the environment variables of a run of one rank without a launcher."""
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
