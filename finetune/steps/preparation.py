"""What every rank does by itself before training: the checks, the data, the step plan, where to go on from."""

import math
import os
from pathlib import Path
from typing import NamedTuple

from ..distributed import engines, ranks
from ..distributed.ranks import meeting
from ..errors import Findings, UserError, each_line_once, note, warn
from ..flags import checks, definitions
from ..folders import checkpoints, config_files, fingerprints, hub, model_folder
from ..lifecycle import resuming, run_record
from ..lora import adapters
from ..memory import memory_plan
from ..memory.memory_model import Estimate
from ..model import kinds, loading
from ..samples import rendered_samples, selection
from ..samples.rendered_samples import Samples
from ..writing import durable, run_lock
from .plan import Plan


class Job(NamedTuple):
    """A run that can begin. folder: the base model's; record: what its output folders will say of it."""

    folder: Path
    tokenizer: object
    samples: Samples
    eval_samples: Samples | None
    plan: Plan
    eval_plan: Plan | None
    record: dict
    way: resuming.Way
    memory: Estimate

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint that the run goes on from."""
        return self.way.point


def prepare(args, out: Path, restarted: bool = False, launches: list[str] = (), free: float = math.inf) -> Job:
    """The checks, the data, the plan of the steps, and where to go on from. restarted: by torchrun, after a failure.

    launches: the agents of this run (see ranks.launch). A run that one of them has started before goes on by itself; an
    earlier run's checkpoints are another matter, which --resume_from_checkpoint and --overwrite_output_dir decide.
    free: bytes of memory for this run, the least of all ranks (memory_plan.free_bytes).
    Raises UserError with everything that is wrong. Writes nothing but the cache of rendered data.
    """
    training = args.training
    if training.resume_from_checkpoint is None and checkpoints.of_launch(out, launches):
        training.resume_from_checkpoint = "auto"
    folder = check_and_download(args)
    tokenizer = loading.load_tokenizer(folder)
    resolve_adapter_flags(args, folder, tokenizer)
    samples, eval_samples = load_data(args, tokenizer)
    warn_of_lengths(folder, samples)
    memory = plan_memory(args, folder, samples, free)
    plan, eval_plan = make_plans(args, samples, eval_samples)
    memory = memory_plan.with_passes_of(args, folder, memory, plan.largest_passes())
    record = run_record.of_run(args.model.model_name_or_path, folder, args, samples, plan, eval_samples)
    if launches:
        record["launches"] = list(launches)
    way = resuming.find_way(args, out, record, plan, restarted)
    return Job(folder, tokenizer, samples, eval_samples, plan, eval_plan, record, way, memory)


def begin(args, out: Path, launches: list[str]) -> None:
    """Takes the output folder for this run, and reads its newest checkpoints until one is whole. All ranks call it.

    The first rank of each machine reads; prepare() then knows at once, on all of them.
    """
    if args.look.dry_run or args.findings or not args.training.output_dir:
        return
    with meeting.as_one("the output folder"):
        if ranks.rank() == 0:
            run_lock.hold(out, launches)
    found = {}
    for path in reversed(checkpoints.numbered(out)) if ranks.local_rank() == 0 else ():
        found[path.name] = durable.faults(path)
        if not found[path.name]:
            break
    first = meeting.exchange("checkpoints as they are", found)[ranks.rank() - ranks.local_rank()]
    for name in first:
        durable.learn(out / name, first[name])


def check_and_download(args) -> Path:
    """The model's folder, or one UserError with all findings. Downloads come last."""
    with each_line_once():  # a model from a hub is checked twice: as an id, and as a folder
        return checked(args)


def checked(args) -> Path:
    """check_and_download() without its filter for repeated lines."""
    findings, name = Findings(), args.model.model_name_or_path
    with findings:
        checks.check_flags(args)
    if findings.findings or not os.path.isdir(name):  # else the data is read once, when it is rendered
        for source in args.data.sources():
            with findings:
                rendered_samples.read(source.path, flag=source.flag, bad_samples=args.data.bad_samples)
    findings.raise_if_any()
    folder = hub.find_folder(name, args.training.cache_dir)
    if not os.path.isdir(name):
        checks.check_flags(definitions.on_folder(args, folder))
    return folder


def resolve_adapter_flags(args, folder: Path, tokenizer) -> None:
    """args.lora becomes what the run does and records: auto decided, or the settings of the adapter gone on from.

    Raises UserError for tokens that the tokenizer does not know: now, not later.
    """
    if args.lora.lora_weight_path:
        args.lora = adapters.flags_of(args.lora, tokenizer)
        return
    args.lora.train_embeddings = kinds.embeddings_of_run(args, folder)
    adapters.trained_rows(tokenizer, args.lora.train_embeddings, args.lora.train_tokens)


def load_data(args, tokenizer) -> list:
    """[samples, evaluation samples or None], rendered; prints what is worth knowing about them."""
    wish, findings, loaded = args.data, Findings(), []
    settings = wish.rendering() | {"train_tokens": tuple(args.lora.train_tokens)}
    settings |= {"long_samples": wish.long_samples, "bad_samples": wish.bad_samples, "max_length": args.training.model_max_length}
    for source in wish.sources():
        with findings:
            loaded.append((source, rendered_samples.load(source.path, tokenizer, flag=source.flag, **settings)))
    findings.raise_if_any()
    samples, held_out = selection.select(loaded, wish.eval_split)
    if not args.look.dry_run:  # which shows them itself
        for line in samples.notes + (held_out.notes if held_out and wish.eval_data_path else []):
            warn(line)
    return [samples, held_out]


def warn_of_lengths(folder: Path, samples: Samples) -> None:
    """Says how many samples reach positions that the model has never seen."""
    trained = model_folder.trained_length(config_files.config_of(folder))
    longer = int((samples.lengths > trained).sum()) if trained else 0
    if longer:
        warn(
            f"{longer:,} of {len(samples):,} samples are longer than the {trained:,} tokens that the model was trained on (config.json), and "
            f"reach positions it has never seen; --model_max_length {trained} keeps to what it knows"
        )


def write_left_out(job: Job, out: Path) -> None:
    """OUTPUT/left_out.jsonl: what --bad_samples drop left out of the data. No file where that was nothing."""
    every = [line for samples in (job.samples, job.eval_samples) if samples is not None for line in samples.left_out.splitlines(True)]
    if every and ranks.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / LEFT_OUT).write_bytes(b"".join(dict.fromkeys(every)))  # what is held out is of the same files
        note(f"{out / LEFT_OUT} has what was left out of the data, with the reasons")


LEFT_OUT = "left_out.jsonl"


def plan_memory(args, folder: Path, samples: Samples, free: float) -> Estimate:
    """Resolves --max_tokens_per_pass auto and --gradient_checkpointing auto; returns the memory that the run should take."""
    ranks = args.training.world_size
    unlimited = plan_of(args, samples, max_tokens_per_pass=samples.total_tokens)
    step_tokens = -(-unlimited.largest_step() // ranks)
    return memory_plan.resolve_auto(args, folder, int(samples.lengths.max()), step_tokens, free)


def make_plans(args, samples, eval_samples):
    """The step plan of training, and the layout of evaluation."""
    limit, training = args.data.max_tokens_per_pass, args.training
    plan = plan_of(args, samples, max_tokens_per_pass=limit)
    if eval_samples is None:
        return plan, None
    count, each = training.world_size, training.per_device_eval_batch_size
    settings = {"world_size": count, "max_tokens_per_pass": limit, "samples_per_step": each * count, "shuffle": False}
    return plan, Plan(eval_samples.lengths, eval_samples.supervised, weights=eval_samples.weight_sums, **settings)


def plan_of(args, samples, max_tokens_per_pass: int) -> Plan:
    """The step plan of training."""
    training, count = args.training, args.training.world_size
    return Plan(
        samples.lengths,
        samples.supervised,
        weights=samples.weight_sums,
        samples_per_step=training.per_device_train_batch_size * training.gradient_accumulation_steps * count,
        world_size=count,
        max_tokens_per_pass=max_tokens_per_pass,
        seed=training.seed if training.data_seed is None else training.data_seed,
        drop_last=training.dataloader_drop_last,
    )


def consistency_record(args, job) -> dict:
    """What all ranks must have alike, for ranks.agree(): what decides which collective operations they meet in."""
    base, point, training = job.record["base"]["fingerprint"], job.resume_from, args.training
    same = {"base model": fingerprints.short(base, base), "data as rendered": in_short(job.samples)}
    if job.eval_samples is not None:
        same["evaluation data as rendered"] = in_short(job.eval_samples)
    if args.lora.lora_weight_path:
        same["adapter of --lora_weight_path"] = fingerprints.of_adapter(Path(args.lora.lora_weight_path))[:12]
    if training.deepspeed:
        same[DEEPSPEED] = training.deepspeed
    same |= {"engine": training.engine, CHECKPOINT: point and point.name, VERSIONS: job.record["versions"]}
    return same | definitions.shared_flags(args)


CHECKPOINT, VERSIONS, DEEPSPEED = "checkpoint to go on from", "versions", "content of --deepspeed"
REMEDIES = {
    DEEPSPEED: "give the same --deepspeed file on all machines",
    CHECKPOINT: "give an --output_dir on storage that all machines share, or copy the checkpoint to all of them",
    VERSIONS: "install the same versions on all machines",
}


def in_short(samples: Samples) -> str:
    """A short fingerprint, to compare and to print."""
    return f"{samples.fingerprint[:12]} ({len(samples):,} samples, {samples.total_tokens:,} tokens)"


def make_room(args, job, out: Path) -> None:
    """Removes an earlier run's checkpoints, where --overwrite_output_dir says so and this run does not go on from one.

    Before a model is loaded: what dies there is started again, and this run's checkpoints must be the only ones then.
    """
    if job.resume_from is None and args.training.overwrite_output_dir and ranks.rank() == 0:
        checkpoints.remove_all(out)


def check_storage(args, out: Path) -> None:
    """On several machines, checkpoints that all ranks write or read need a folder that all of them see."""
    if ranks.machines() == 1 or args.training.save_strategy == "no" or ranks.sees_the_same(out):
        return
    what = f"--output_dir {out}: is not the same folder on all machines"
    if args.training.engine != engines.DDP:
        remedy = "give a folder on storage that they share, or --save_strategy no"
        raise UserError(f"{what}, and each rank writes its part of a checkpoint - {remedy}")
    warn(f"{what}: checkpoints will only be on that of rank 0, so a run that is interrupted cannot go on by itself")
