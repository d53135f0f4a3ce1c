"""What a prepared run would do and take, a row for each thing: steps, passes, memory, disk, time."""

import shutil
from pathlib import Path
from typing import NamedTuple

from ..compat.on_transformers import word
from ..distributed import engines
from ..flags import checks
from ..folders import config_files
from ..memory import memory_plan, run_time
from ..memory.memory_model import Sizes
from ..model import loading
from ..steps.plan import Plan
from ..steps.preparation import Job

SURVEYED = 20_000  # samples whose passes are laid out; of a longer epoch, its first ones
GB = 1e9


class Passes(NamedTuple):
    """Of the steps looked at, of one process: their forward passes, and the tokens in them. whole: it was the whole epoch."""

    steps: int
    passes: int
    tokens: int
    largest: int
    whole: bool


def run_rows(args, job: Job, free: float) -> list[tuple[str, str]]:
    """job: of preparation.prepare(); free: bytes of memory for each process."""
    training, plan = args.training, job.plan
    config = config_files.config_of(job.folder)
    sizes = Sizes.of(config)
    run = memory_plan.run_of(args, config)
    total = plan.total_steps(training.num_train_epochs, training.max_steps)
    rows = [
        ("model", f"{args.model.model_name_or_path} ({config['model_type']}, {sizes.blocks + sizes.embeddings:,} parameters)"),
        ("method", method(args)),
        *step_rows(plan, training),
        ("memory", memory_in_words(args, job, free)),
        *checkpoints(args, job.folder, total),
        ("time", time_in_words(args, job)),
    ]
    if job.eval_samples is not None:
        rows.insert(2, ("evaluation", job.eval_samples.describe()))
    if not memory_plan.fits(job.memory, free):
        longest = int(job.samples.lengths.max())
        rows.append(("to fit", memory_plan.remedy(sizes, run, longest, free, args)))
    return rows


def method(args) -> str:
    """What trains, in which precision, with which engine."""
    lora, training = args.lora, args.training
    kind = "full-parameter"
    if lora.use_lora:
        kind = f"{'Q-' * lora.q_lora}LoRA r={lora.lora_r} alpha={lora.lora_alpha}, embeddings: {lora.train_embeddings}"
    precision = str(loading.compute_dtype(training)).removeprefix("torch.")
    place = "a GPU that is not here" if args.look.gpu_memory else training.device.type
    ranks = f", {training.world_size} processes" if training.world_size > 1 else ""
    return f"{kind}, {precision} on {place}, {engines.name_of(vars(training))}{ranks}"


# ---- steps and passes


def step_rows(plan: Plan, training) -> list[tuple[str, str]]:
    """training: of args.parse(), or a plain object with its flags."""
    return [
        ("steps", plan.in_words(plan.total_steps(training.num_train_epochs, training.max_steps))),
        ("passes", passes_in_words(survey(plan), plan.max_tokens_per_pass, plan.world_size)),
    ]


def survey(plan: Plan) -> Passes:
    """The passes of the first epoch."""
    steps = min(plan.steps_per_epoch, max(1, SURVEYED // plan.samples_per_step))
    laid_out = [plan.step(0, index) for index in range(steps)]
    sums = [int(plan.lengths[list(members)].sum()) for step in laid_out for rank in step.passes for members in rank]
    count = sum(len(step.passes[0]) for step in laid_out)
    return Passes(steps, count, sum(sums), max(sums), steps == plan.steps_per_epoch)


def passes_in_words(found: Passes, limit: int, ranks: int) -> str:
    """How many passes, and how full they are."""
    mean = found.tokens / (found.passes * ranks)
    where = "an epoch" if found.whole else f"in the first {found.steps:,} steps"
    each = f"{found.passes / found.steps:.1f} a step"
    return f"{found.passes:,} {where}, {each}; of {mean:,.0f} tokens on average, {found.largest:,} at most (limit {limit:,})"


# ---- memory, disk, time


def memory_in_words(args, job: Job, free: float) -> str:
    """What the run takes of what is there, on the device and on the host."""
    found = job.memory
    place = "given" if args.look.gpu_memory else "free"
    verdict = "fits" if memory_plan.fits(found, free) else "does not fit"
    text = f"{found.describe()}; {free / GB:.1f} GB {place}: {verdict}"
    on_gpu = args.training.device.type == "cuda" or args.look.gpu_memory
    each = " for each process" if args.training.world_size > 1 else ""
    return f"{text}; main memory about {found.host / GB:.1f} GB{each}" if on_gpu else text


def checkpoints(args, folder: Path, total: int) -> list[tuple[str, str]]:
    """The row for the disk; none where the model's tensors are not known."""
    training = args.training
    checkpoint, result = checks.bytes_to_write(args, folder)
    free = shutil.disk_usage(checks.existing(checks.out_of(args))).free
    saves = saved(training, total)
    kept = min(saves, training.save_total_limit or saves)
    parts = [f"the result {size(result)}"]
    if kept:
        parts.insert(0, f"{kept} checkpoint{'s' * (kept > 1)} of {size(checkpoint)}")
    return [("disk", f"{size(kept * checkpoint + result)} ({', '.join(parts)}); {size(free)} free")]


def saved(training, total: int) -> int:
    """How many checkpoints a run of `total` steps writes."""
    strategy = word(training.save_strategy)
    if strategy == "steps":
        every = training.save_steps if training.save_steps >= 1 else max(1, round(total * training.save_steps))
        return int(total // every)
    return int(training.num_train_epochs) if strategy == "epoch" else 0


def time_in_words(args, job: Job) -> str:
    """How long the steps take, and on what that rests."""
    needed, speed = seconds(args, job)
    basis = f"at {speed.flops / 1e9:,.0f} GFLOP/s, measured now"
    if speed.assumed:
        basis = f"on a GPU of {speed.flops / 1e12:.0f} TFLOP/s; one of twice that takes half"
    return f"about {run_time.in_words(needed)} for the steps ({basis})"


def seconds(args, job: Job) -> tuple[float, run_time.Speed]:
    """What all steps take, and the speed of the machine that this rests on: measured, or that of a GPU that is not here."""
    training, samples, plan = args.training, job.samples, job.plan
    config = config_files.config_of(job.folder)
    sizes, run = Sizes.of(config), memory_plan.run_of(args, config)
    speed = run_time.ELSEWHERE if args.look.gpu_memory else run_time.measured(training.device, loading.compute_dtype(training))
    total = plan.total_steps(training.num_train_epochs, training.max_steps)
    epochs, again = total / plan.steps_per_epoch, job.memory.recomputed / job.memory.layers
    needed = run_time.work(sizes, run, samples.lengths, samples.supervised, epochs, total, again)
    return needed.seconds(speed, run), speed


def size(count: float) -> str:
    """ "3.1 GB", "120 MB"."""
    return f"{count / GB:.1f} GB" if count >= GB else f"{max(1, count / 1e6):.0f} MB"
