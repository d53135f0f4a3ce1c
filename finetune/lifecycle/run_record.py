"""What a run writes about itself into training.json of its output folder and of each checkpoint: all that it takes to do it again, and to judge it."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from transformers import TrainerCallback

from ..compat.on_transformers import word
from ..data_files.sample_files import SampleFile
from ..flags.going_on import SECRETS, flags_given
from ..folders import fingerprints, quant_settings
from ..memory.peak_memory import memory_gb
from ..model import loading, optimizers
from ..quantized import quantized_model
from . import best

ROOT = Path(__file__).resolve().parents[2]


def of_run(name: str, folder: Path, args, samples, plan, eval_samples=None) -> dict:
    """training.json: base, method, data, flags, versions and more. name: of the base, as the user gave it; folder: the base's."""
    training, quantization, adapter = args.training, quantized_model.of_run(folder, args.lora), args.lora.lora_weight_path
    return {
        "base": {
            "name": name,
            "folder": str(folder.resolve()),
            "fingerprint": fingerprints.of_model(folder),
            "adapter": fingerprints.of_adapter(Path(adapter))[:12] if adapter else "none",
        },
        # without the path of the adapter, which may move
        "method": vars(args.lora)
        | {"lora_weight_path": None, "quantization": quant_settings.as_record(quantization)},
        "data": {
            "paths": list(args.data.data_path),
            "files": files(samples, "--data_path"),
            "samples": len(samples),
            "eval_split": args.data.eval_split,
            "bad_samples": args.data.bad_samples,
            "long_samples": args.data.long_samples,
            "system": samples.system,
            "fingerprint": samples.fingerprint,
            "without_thoughts": samples.without_thoughts,
            **args.data.rendering(),
        },
        "evaluation_data": None if eval_samples is None else {
            "paths": list(args.data.eval_data_path),
            "files": files(eval_samples, "--eval_data_path"),
            "samples": len(eval_samples),
            "fingerprint": eval_samples.fingerprint,
        },
        "samples_per_step": plan.samples_per_step,
        "engine": training.engine,
        "ranks": training.world_size,
        "precision": str(loading.compute_dtype(training)).removeprefix("torch."),
        "bf16_weights": training.bf16_weights,
        "optim": word(training.optim),
        "seed": training.seed,
        "schedule": schedule(training, plan),
        "max_length": training.model_max_length,
        "command": command(),
        "started_in": os.getcwd(),
        "flags": flags_given(args),
        "versions": versions(training, quantization),
        "toolkit": toolkit_version(),
    }  # fmt: skip


def files(samples, flag: str) -> list[dict]:
    """The files that samples are of: path, SHA-256 of its bytes, and how many of its samples are taken."""
    parts = getattr(samples, "parts", None) or [(samples, samples)]
    return [{"path": of.path, "sha256": SampleFile(of.path, flag).content_hash(), "samples": len(taken)} for of, taken in parts]


def schedule(training, plan) -> dict:
    """How long it trains, and at which rate."""
    steps = plan.total_steps(training.num_train_epochs, training.max_steps)
    return {
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": word(training.lr_scheduler_type),
        "warmup_steps": training.get_warmup_steps(steps),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "epochs": steps / plan.steps_per_epoch,
        "steps": steps,
        "steps_per_epoch": plan.steps_per_epoch,
    }


def command() -> str:
    """The command as it was typed, for bash: of the script (launch.sh) where one started this. Without secrets."""
    return without_secrets(os.environ.get("FINETUNE_COMMAND") or shlex.join([sys.executable, *sys.argv]))


def without_secrets(line: str) -> str:
    """A command without the values of flags that hold secrets, under each of their spellings."""
    secret = {spelling for name in (*SECRETS, "push_to_hub_token") for spelling in (f"--{name}", f"--{name.replace('_', '-')}")}
    if not any(spelling in line for spelling in secret):
        return line  # as bash quotes it, which Python does not read everywhere
    words, before = [], None
    for given in shlex.split(line):
        name, equals, _ = given.partition("=")
        words.append("***" if before in secret else f"{name}=***" if equals and name in secret else given)
        before = given
    return shlex.join(words)


def toolkit_version() -> str:
    """What git calls this state of the toolkit; without git, a hash of its sources."""
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            words = ["git", "-C", str(ROOT), "describe", "--tags", "--always", "--dirty"]
            return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("finetune/**/*.py"), *ROOT.glob("qwen_model/*.py")]):
        digest.update(path.read_bytes())
    return f"sources {digest.hexdigest()[:12]}"


def versions(training, quantization) -> dict[str, str]:
    """{package: version} of the packages that this run computes with."""
    packages = ["torch", "transformers", "peft", "accelerate", "tiktoken"]
    packages += ["deepspeed"] if training.deepspeed else []
    packages += quantized_model.PACKAGES.get(quantization.method, ()) if quantization else ()
    optim = word(training.optim)
    packages += ["torchao"] if optim in optimizers.ROUNDING else []
    packages += ["bitsandbytes"] if optimizers.is_of_bitsandbytes(optim) else []
    installed = filter(quantized_model.installed, dict.fromkeys(packages))
    return {package: importlib.metadata.version(package) for package in installed}


# ---- while it trains, and at its end


class Clock(TrainerCallback):
    """Keeps the record's times and tokens, which each checkpoint takes along, so that they go on over resumes."""

    def __init__(self, record: dict, before: dict):
        """before: the record of the checkpoint that the run goes on from; {} without one."""
        self.record, self.begin, self.earlier = record, time.monotonic(), before.get("seconds_of_training", 0.0)
        record["start"] = before.get("start") or now()
        record["starts"] = [*before.get("starts", []), now()]
        record["seconds_of_training"] = self.earlier

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.record["seconds_of_training"] = round(self.earlier + time.monotonic() - self.begin, 1)
        self.record["tokens_seen"] = state.num_input_tokens_seen


def complete(record: dict, state, training) -> None:
    """What can be told at the end. state: transformers' TrainerState. seconds_of_training: of all starts, with evaluating and saving."""
    import torch

    record["end"] = now()
    record["device"] = torch.cuda.get_device_name() if training.device.type == "cuda" else training.device.type
    record["peak_memory_gb"] = round(memory_gb(), 3)
    record["tokens_seen"] = state.num_input_tokens_seen
    record["losses"] = losses(state.log_history)
    record["result"] = best.delivered(state, training) | {"steps": state.global_step, "of_steps": state.max_steps}


def losses(log: list[dict]) -> dict:
    """{"first", "last", "best"}: the lines of the log, step and loss, of what was trained on. {} where nothing was logged."""
    lines = [{"step": line["step"], "loss": line["loss"]} for line in log if math.isfinite(line.get("loss", math.nan))]
    return {"first": lines[0], "last": lines[-1], "best": min(lines, key=lambda line: line["loss"])} if lines else {}


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
