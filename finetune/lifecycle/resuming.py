"""A look at the output folder before a run: start, go on from a checkpoint, only write the result, or nothing at all.

Raises UserError where a checkpoint is of another run. Which flags may have changed: flags/going_on.py.
"""

from pathlib import Path
from typing import NamedTuple

from ..compat.on_transformers import word
from ..errors import UserError, note, shortened, warn
from ..flags import going_on as flags
from ..folders import checkpoints, config_files, fingerprints, output_folder
from ..writing import durable
from . import best

START, GO_ON, RESULT, NOTHING = "start", "go on", "only write the result", "nothing to do"


class Way(NamedTuple):
    """What a run has to do.

    point: the checkpoint to go on from; before: its training.json ({} without one). done: the steps behind it; total: of the run,
    which were planned_before when it was written. changes: flags that were others then, and hold from now on.
    """

    kind: str = START
    point: Path | None = None
    before: dict = {}
    done: int = 0
    total: int = 0
    planned_before: int | None = None
    changes: tuple[flags.Change, ...] = ()

    @property
    def is_trained(self) -> bool:
        """No step is left."""
        return self.kind in (RESULT, NOTHING)

    @property
    def flags_unknown(self) -> bool:
        """The checkpoint does not say which flags its run had: it is of an older version, or has no record."""
        return self.kind == GO_ON and not isinstance(self.before.get("flags"), dict)


def find_way(args, out: Path, record: dict, plan, restarted: bool) -> Way:
    """What is to be done, and says so. Completes `record`, and gives `plan` the front that the run began with."""
    wish = flags.wish_of(args, out)
    point, total = checkpoints.resume_point(out, wish), plan.total_steps(args.training.num_train_epochs, args.training.max_steps)
    tell_incomplete(out, wish, point)
    record["first_steps"] = list(plan.front)
    if point is None:
        if restarted:
            note("started again after a failure, from the beginning: there is no complete checkpoint yet")
        return Way(total=total)
    checkpoints.tell_of(point, wish)
    checkpoints.check_trusted(point, args.training.engine, args.training.trust_checkpoint)
    before = check_same_run(point, record, args)
    if before:  # without a record, the likeliest front is that of the same layout
        plan.front = tuple(before.get("first_steps", ()))  # which are the largest depends on the layout, which may change
        record["first_steps"] = list(plan.front)
    state = config_files.read_json(point / "trainer_state.json")
    checkpoints.check_name(point, state.get("global_step"))
    way = Way(GO_ON, point, before, state.get("global_step", 0), total, state.get("max_steps"), changed(before, record, args))
    over = way.done == total or best.stopped_early(state.get("log_history", []), args.training)
    if way.done > total:
        raise UserError(
            f"{point}: has done {way.done} steps, and this run would have {total} - give more with --num_train_epochs or --max_steps, or "
            "another --output_dir"
        )
    if is_written(out, record, args, total) and (over or checkpoints.wants_newest(wish)):
        way = way._replace(kind=NOTHING)
    elif over:
        way = way._replace(kind=RESULT)
    new = [{"after_step": way.done, "flag": flag, "before": old, "now": value} for flag, old, value in way.changes]
    record["changes"] = [*before.get("changes", []), *new]
    tell(way, out, asked=args.training.resume_from_checkpoint is not None)
    tell_lacking(way, args.training.world_size)
    return way


def changed(before: dict, record: dict, args) -> tuple[flags.Change, ...]:
    """The flags that hold from now on, and other data to evaluate on.

    UserError where the learning rate or the best checkpoint follows evaluations: these are of the old ones.
    """
    found = flags.changes(before, args, flags.APPLIED)
    old, new = ((of.get("evaluation_data") or {}).get("fingerprint") for of in (before, record))
    if None not in (old, new) and old != new:
        found.append(flags.Change("eval_data_path", f"as rendered {old[:12]}", new[:12]))
        if args.training.load_best_model_at_end or args.training.early_stopping_patience:
            raise UserError(
                f"--eval_data_path: {old[:12]} as rendered, now {new[:12]}: evaluations on other data cannot be compared, and the best of "
                "them is to be found - give the data that the run was started with, or another --output_dir"
            )
    curves = {word(args.training.lr_scheduler_type), before.get("flags", {}).get("lr_scheduler_type")}
    stateful = [curve for curve in curves if curve in flags.STATEFUL]
    if stateful and (of_schedule := [change for change in found if change.flag in flags.SCHEDULE]):
        raise UserError(
            f"--lr_scheduler_type {stateful[0]}: follows the loss, so a run with it cannot go on with another schedule "
            f"({'; '.join(map(str, of_schedule))}) - give the flags that it was started with, or another --output_dir"
        )
    return tuple(found)


def is_written(out: Path, record: dict, args, total: int) -> bool:
    """Whether `out` holds the whole result of this run, with these flags, as it was written."""
    try:
        kept = output_folder.read_record(out)
    except UserError:  # damaged, or somebody wrote to it: the checkpoint has one of its own
        return False
    if kept.get("result", {}).get("of_steps") != total or differences(kept, record, args) or flags.changes(kept, args, flags.APPLIED):
        return False
    written = output_folder.files_of_records(out / output_folder.RECORD)
    written.pop("README.md", None)  # which is for people
    return bool(written) and all(len(hashes) == 1 and durable.matches(out / name, hashes[0]) for name, hashes in written.items())


def tell(way: Way, out: Path, asked: bool) -> None:
    """What is done, in one line. asked: for going on, by a flag."""
    if way.kind == NOTHING:
        note(f"nothing to do: {out} holds the result of this run, of all its {way.total} steps; --overwrite_output_dir begins anew")
    elif way.kind == RESULT:
        late = f"; this changes no step any more: {'; '.join(map(str, way.changes))}" if way.changes else ""
        note(f"nothing left to train: {way.point} is the end of this run ({way.done} steps), and its result is written from it{late}")
    else:
        why = "" if asked else f" (its run had this command; --overwrite_output_dir begins anew): step {way.done} of {way.total} is done"
        note(f"continuing from {way.point}{why}")


# ---- what is missing


def tell_incomplete(out: Path, wish: str | None, point: Path | None) -> None:
    """Says which checkpoints without a manifest are passed over; of one that has it, checkpoints.tell_of() says what is damaged."""
    newest = checkpoints.wants_newest(wish)
    whole = checkpoints.complete(out) if newest else []
    behind = checkpoints.number(point) if newest and point else -1
    there = [path for path in checkpoints.numbered(out) if not durable.has_manifest(path)] if newest else []
    passed = [path.name for path in there if path not in whole and checkpoints.number(path) > behind]
    if passed:
        then = f"going on from {point}" if point else "starting from the beginning"
        what = "not whole, as a save that was interrupted, or --save_only_model, leaves it"
        warn(f"{out}: {', '.join(passed)}: {what}: {then}")


def tell_lacking(way: Way, ranks: int) -> None:
    """What a checkpoint that is gone on from does not say, so that the run may become another one."""
    if way.kind != GO_ON:
        return
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    lacking = [name for name in names if not (way.point / name).is_file()]
    if lacking:
        warn(f"{way.point}: has no {lacking[0]}: dropout goes on with other random numbers than without the interruption")
    if not way.before:
        warn(f"{way.point}: has no {output_folder.RECORD}: whether it is of this base, these data and these flags cannot be told")
    elif way.flags_unknown:
        what = "was written before flags were recorded, so which of them are others now cannot be told"
        warn(f"{way.point}: {what}: learning rate, schedule, decay and betas are taken from the flags given now")


# ---- of this run?


def engine_of(record: dict) -> str:
    """What a checkpoint's optimizer state is laid out for: one file serves any number of processes, shards only as many."""
    engine = record.get("engine", "one process")
    return "one process or DDP" if engine in ("one process", "DDP") else f"{engine} on {record['ranks']} ranks"


def what_trains(record: dict) -> str:
    """The settings that decide which tensors a checkpoint holds beside those of plain LoRA, and for which base."""
    names = ("train_embeddings", "train_tokens", "use_dora", "use_rslora", "init_lora_weights", "loraplus_lr_ratio")
    method = record.get("method", {})
    return ", ".join(f"{name} {method[name]}" for name in names if method.get(name)) or "as usual"


# what must be as it was, read from a record: what flags lead to, not their words. None: the record is older than that
KEPT = {
    "base model": lambda record: record["base"]["fingerprint"],
    "adapter of --lora_weight_path": lambda record: record.get("base", {}).get("adapter"),
    "data as rendered": lambda record: record["data"]["fingerprint"][:12],
    "--multi_turn": lambda record: record["data"].get("multi_turn"),
    "--empty_thoughts": lambda record: record["data"].get("empty_thoughts"),
    "samples per step": lambda record: record["samples_per_step"],
    "seed": lambda record: record["seed"],
    "engine": engine_of,
    "precision": lambda record: record.get("precision", "unknown"),
    "--bf16_weights": lambda record: record.get("bf16_weights"),
    "--optim": lambda record: record.get("optim"),
    "quantization": lambda record: record.get("method", {}).get("quantization") or "none",
    "what trains": what_trains,
}
# the flags that decide what the data are: named where these differ
OF_DATA = ("eval_split", "bad_samples", "supervise", "long_samples", "allow_special", "model_max_length", "data_path")


def differences(before: dict, now: dict, args=None) -> list[str]:
    """What makes a run of one record another run than that of `now`: "name: value, now value" each. args: this run's flags, if known."""
    found = []
    for name, of in KEPT.items():
        try:
            one, other = of(before), of(now)
        except (KeyError, TypeError, AttributeError):  # somebody wrote to it
            found.append(f"{name}: {output_folder.RECORD} does not say it")
            continue
        if name == "base model":
            one, other = fingerprints.short(one, other), fingerprints.short(other, one)
        if one != other and one is not None:
            why = []
            if name == "data as rendered":
                changes = flags.changes(before, args, flags.COMPARED) if args else ()
                why = [*changed_files(before["data"], now["data"]), *(str(change) for change in changes if change.flag in OF_DATA)]
            found.append(f"{name}: {one}, now {other}" + (f" ({', '.join(why)})" if why else ""))
    return found + ([str(change) for change in flags.changes(before, args, flags.RUN)] if args else [])


def changed_files(before: dict, now: dict) -> list[str]:
    """Which files of data have other bytes than those of the run before, or are new or gone; [] where its record does not list them."""
    try:
        old, new = ({file["path"]: file for file in of["files"]} for of in (before, now))
        same = {file["sha256"] for file in old.values()} & {file["sha256"] for file in new.values()}  # wherever they lie now
        said = []
        for path in dict.fromkeys([*old, *new]):
            one, other = (file if file and file["sha256"] not in same else None for file in (old.get(path), new.get(path)))
            if one and other:
                said.append(f"{shortened(path, 200)} has changed: {one['samples']:,} samples then, {other['samples']:,} now")
            elif one or other:
                said.append(f"{shortened(path, 200)} {'was part of them' if one else 'is new'}")
        return said
    except (KeyError, TypeError, AttributeError, ValueError):  # an older version's, or somebody wrote to it
        return []


def check_same_run(path: Path, now: dict, args=None) -> dict:
    """The record of a checkpoint ({} without one). Refuses that of another base, other data, or flags that make another run."""
    before = output_folder.read_record(path)
    if before and (found := differences(before, now, args)):
        raise UserError(
            f"{path}: is of another run ({'; '.join(found)}) - give the flags and files that it was started with, or another "
            "--output_dir, or --overwrite_output_dir"
        )
    return before
