"""check_flags(args): what can be wrong with a command line, its files and its folders, found before weights are loaded.

Each part yields findings, one line each: what, where, what to do. Nothing is written; warnings are printed.
"""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..compat.on_transformers import word
from ..data_files.sample_files import SampleFile
from ..data_files.sources import sources_of
from ..distributed import engines
from ..errors import UserError, note, shortened, warn
from ..folders import adapter_folder, checkpoints, config_files, meant, model_folder
from ..model import adapter_fits, kinds, optimizers, whole_base
from . import going_on, method_checks, services, trials, values

GB = 1e9
GIVE_MODEL = "give a checkpoint's folder with -m, or its Hugging Face id (Qwen/Qwen-7B)"


def check_flags(args) -> None:
    """Raises one UserError with all findings. args: of args.parse()."""
    check_parts(args, (*FIRST, *LATER, *LAST))


def check_first(args) -> None:
    """The checks that need neither torch nor transformers."""
    check_parts(args, FIRST)


def check_parts(args, parts) -> None:
    """Raises one UserError with the findings of all parts."""
    findings = list(args.findings)
    for part in parts:
        if findings and part in LAST:
            continue
        try:
            for line in part(args):
                findings.append(line)
        except UserError as error:
            findings += error.findings
    if findings:
        raise UserError(*dict.fromkeys(findings))


def ranges(args) -> Iterator[str]:
    """Numbers that are out of range; those of the training flags are looked at where these are read (training_values.py)."""
    yield from values.problems(vars(args.data), values.OF_DATA)
    yield from values.problems(vars(args.lora), values.OF_LORA)
    yield from values.problems(vars(args.look), values.OF_LOOK)


def look(args) -> Iterator[str]:
    """What belongs to --dry_run."""
    for name in ("html", "gpu_memory"):
        if getattr(args.look, name) is not None and not args.look.dry_run:
            yield f"--{name} {getattr(args.look, name)}: belongs to a look before the run - add --dry_run, or leave it out"


def data_files(args) -> Iterator[str]:
    """The files exist, and evaluation has both data and a strategy, or neither."""
    data, evaluates = args.data, args.training.eval_strategy != "no" or args.training.eval_on_start
    if data.lazy_preprocess:
        note("--lazy_preprocess has no effect: the data is checked and tokenized once, and kept on disk from then on")
    if not data.data_path:
        yield "--data_path: missing - give your training JSON with -d"
    for flag in ("data_path", "eval_data_path"):
        try:
            for source in sources_of(getattr(data, flag), f"--{flag}"):
                SampleFile(source.path, source.flag)
        except UserError as error:
            yield from error.findings
    if data.eval_split and not evaluates:
        yield "--eval_split is set but evaluation is off (--eval_strategy no) - give --eval_strategy steps or epoch, or leave out both"
    if data.eval_data_path and not evaluates:
        yield "--eval_data_path is set but evaluation is off (--eval_strategy no) - give --eval_strategy steps or epoch, or leave out both"
    if evaluates and not (data.eval_data_path or data.eval_split):
        strategy = word(args.training.eval_strategy)
        asked = "eval_on_start" if strategy == "no" else f"eval_strategy {strategy}"
        yield f"--{asked} needs conversations to evaluate on - give --eval_data_path, or leave it out"
    if data.eval_split and data.eval_data_path:
        yield "--eval_split and --eval_data_path: two ways to evaluation data - leave out one"
    if any(same(path, other) for path in data.data_path for other in data.eval_data_path):
        warn("--eval_data_path is the training data: the evaluation will look better than the model is")


def base_model(args) -> Iterator[str]:
    """A folder with a complete checkpoint, or a name that may be a Hub id."""
    name = args.model.model_name_or_path
    if not name:
        yield f"--model_name_or_path: missing - {GIVE_MODEL}"
        return
    folder = Path(name)
    if folder.is_dir():
        problems = model_folder.first_problems(folder, may_be_quantized=args.lora.q_lora)  # of --q_lora, method() speaks
        named = "" if (folder / "config.json").is_file() else "--model_name_or_path "
        yield from (named * line.startswith(f"{folder}: ") + line for line in problems)
        if problems:
            return
        kind = config_files.config_of(folder).get("model_type")
        if kind not in model_folder.TRAINED_TYPES:
            trained = ", ".join(model_folder.TRAINED_TYPES)
            what = f"--model_name_or_path {folder}: is of model type {shortened(kind)}, and trained are {trained}"
            yield f"{what} - give a checkpoint of Qwen, Qwen1.5, Qwen2, Qwen2.5 or Qwen3 that is no mixture of experts"
            return
        yield from kinds.kind_problems(args, folder)
    elif folder.exists():
        yield f"--model_name_or_path {name}: is a file - give the folder of a checkpoint"
    elif not model_folder.is_hub_id(name):
        yield f"--model_name_or_path {name}: no such folder - {GIVE_MODEL}{meant.folder(folder)}"


def values_of_config(args) -> Iterator[str]:
    """The values in config.json, and whether the tensors are those of its model; if the folder is whole."""
    folder = Path(args.model.model_name_or_path or "")
    if args.model.model_name_or_path and (folder / "config.json").is_file():
        findings = model_folder.value_problems(folder)
        trained = config_files.config_of(folder).get("model_type") in model_folder.TRAINED_TYPES
        if not findings and trained and not model_folder.first_problems(folder, may_be_quantized=True):
            findings = whole_base.problems(folder)
        yield from findings


def adapter_on_base(args) -> Iterator[str]:
    """The adapter of --lora_weight_path fits the model, where both are whole."""
    folder, adapter = Path(args.model.model_name_or_path or ""), args.lora.lora_weight_path
    if adapter and (folder / "config.json").is_file():
        adapter_fits.check(folder, Path(adapter))
    yield from ()


# ---- the output folder


def output_folder(args) -> Iterator[str]:
    """The folder can be written, and holds no earlier run's work unless a flag allows that."""
    training, out = args.training, out_of(args)
    inputs = {"--model_name_or_path": args.model.model_name_or_path, "--lora_weight_path": args.lora.lora_weight_path}
    for flag, folder in inputs.items():
        if same(out, folder):
            yield f"--output_dir {out}: is the folder of {flag}, which would be overwritten - give another one"
            return
    if out.exists() and not out.is_dir():
        yield f"--output_dir {out}: is a file - give a folder"
        return
    if dangling := [place for place in (out, *out.parents) if place.is_symlink() and not place.exists()]:
        remedy = "make that folder, or give another one"
        yield f"--output_dir {out}: {dangling[0]} is a link to {shortened(os.readlink(dangling[0]))}, where nothing is - {remedy}"
        return
    root = existing(out)
    if not root.is_dir() or not os.access(root, os.W_OK | os.X_OK):
        yield f"--output_dir {out}: {root} cannot be written to - give another folder"
        return
    there = checkpoints.numbered(out)
    if training.overwrite_output_dir or (there and checkpoints.wants_one(going_on.wish_of(args, out))):
        return
    if there:
        remedy = "continue with --resume_from_checkpoint auto, or give another folder or --overwrite_output_dir"
        why = going_on.why_another(out, args)
        of_other = f" of another command ({why})" if why else ""
        yield f"--output_dir {out}: has {there[-1].name}{of_other} - {remedy}"
    elif any((out / name).is_file() for name in ("config.json", "adapter_config.json")):
        yield f"--output_dir {out}: holds a finished model - give another folder, or --overwrite_output_dir"


def resuming(args) -> Iterator[str]:
    """The checkpoint exists and was made with this run's method."""
    wish, lora = going_on.wish_of(args, out_of(args)), args.lora
    if not checkpoints.wants_one(wish):
        return
    point = checkpoints.resume_point(out_of(args), wish)
    if point is None:
        if str(wish).lower() == "true":
            remedy = "give its folder, or auto to begin anew where there is none"
            yield f"--resume_from_checkpoint {wish}: no checkpoint in {out_of(args)} - {remedy}"
        return
    folder = Path(args.model.model_name_or_path or "")
    config = point / "adapter_config.json"
    was = f"LoRA {adapter_folder.describe_adapter(config_files.read_json(config))}" if config.is_file() else "full-parameter"
    own = {"r": lora.lora_r, "lora_alpha": lora.lora_alpha, "bias": lora.lora_bias}
    own["target_modules"] = lora_layers(args, folder)
    now = f"LoRA {adapter_folder.describe_adapter(own)}" if lora.use_lora else "full-parameter"
    # the layers of a hub's model are not known before it is here; then it is checked once more
    known = (folder / "config.json").is_file() and lora.lora_weight_path is None
    if was.split()[0] != now.split()[0] or (was != now and known):
        yield f"{point} is {was}, this run is {now} - give the flags that it was started with, or another --output_dir"


def disk_space(args) -> Iterator[str]:
    """Room for at least one checkpoint and the result; a warning where it will get tight."""
    folder, training = Path(args.model.model_name_or_path or ""), args.training
    root = existing(out_of(args))
    if not args.model.model_name_or_path or not folder.is_dir() or not root.is_dir():
        return
    checkpoint, result = bytes_to_write(args, folder)
    free, saves = shutil.disk_usage(root).free, training.save_strategy != "no"
    limit = training.save_total_limit
    sizes = [f"{size / GB:.3g} GB" for size in (checkpoint, result, free)]
    size = "a checkpoint takes about {}, the result {}, free are {}".format(*sizes)
    if free < saves * checkpoint + result:
        yield f"--output_dir {out_of(args)}: too little room ({size}) - make room, or give a folder on another disk"
    elif saves and free < ((limit or 2) + 1) * checkpoint + result:  # one more than kept: the old one goes last
        kept = f"--save_total_limit {limit}" if limit else "no --save_total_limit"
        warn(f"--output_dir {out_of(args)}: {size}; with {kept} that may not last")


WRITTEN_BESIDE = (".json", ".tiktoken", ".txt", ".jinja", ".py")  # suffixes of what stands beside the weights of a result


def bytes_to_write(args, folder: Path) -> tuple[float, float]:
    """(bytes of a checkpoint, bytes of the result), from the shapes of the base model's tensors.

    DeepSpeed and FSDP checkpoints hold the weights twice: as a folder that loads, and as shards to go on from.
    """
    training, lora = args.training, args.lora.use_lora
    trained = adapter_size(args, folder) if lora else full_size(folder)
    weight = 2 if training.bf16_weights else 4
    state = optimizers.state_bytes(training.optim)
    copies = 1 if engines.name_of(vars(training)) in (engines.ONE, engines.DDP) else 2
    checkpoint = weight if training.save_only_model else copies * weight + state
    half = not lora and (training.bf16 or training.fp16)
    twice = 2 if lora and str(args.lora.init_lora_weights).startswith("pissa") else 1  # its result has twice the rank
    # beside the weights: the tokenizer, which is more than a small adapter
    beside = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WRITTEN_BESIDE and path.is_file())
    return trained * checkpoint + beside, trained * twice * (2 if half else 4) + beside


def full_size(folder: Path) -> int:
    """Number of the model's parameters; of .bin files, their size over two bytes each."""
    found = model_folder.shapes(folder)
    if not found:
        return sum(path.stat().st_size for path in folder.glob("pytorch_model*.bin")) // 2
    return sum(math.prod(shape) for shape in found.values())


def adapter_size(args, folder: Path) -> int:
    """Number of parameters of the adapters, and of embedding and head where they train whole."""
    found = model_folder.shapes(folder)
    targets = tuple(f".{name}.weight" for name in lora_layers(args, folder))
    adapted = [shape for name, shape in found.items() if len(shape) == 2 and name.endswith(targets)]
    whole = ("lm_head.weight", *model_folder.EMBEDDINGS) if args.lora.train_embeddings == "all" else ()
    return sum(args.lora.lora_r * sum(shape) for shape in adapted) + sum(
        math.prod(shape) for name, shape in found.items() if name in whole
    )


def lora_layers(args, folder: Path) -> list[str]:
    """--lora_target_modules, with auto replaced by the layers' names."""
    asked = list(args.lora.lora_target_modules)
    return asked if asked != ["auto"] else model_folder.block_layers(config_files.config_of(folder).get("model_type"))


FIRST = (ranges, look, data_files, base_model, method_checks.method, output_folder, resuming, disk_space)
LATER = (values_of_config, services.reporting, services.pushing, trials.optimizer, trials.schedule, trials.backends)  # with torch
LAST = (adapter_on_base,)  # where nothing else was found


# ---- small things


def out_of(args) -> Path:
    return Path(args.training.output_dir).expanduser()


def existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def same(one, other) -> bool:
    """Whether two paths, each possibly None, are the same existing file or folder."""
    return bool(one and other) and os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
