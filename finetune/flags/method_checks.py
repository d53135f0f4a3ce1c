"""What can be wrong with the method asked for: full-parameter, LoRA and its kinds, over which weights, on which engine."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from ..compat.on_transformers import word
from ..distributed import engines
from ..errors import note, warn
from ..folders import adapter_base, adapter_files, adapter_folder, config_files, meant, model_folder, settings_files
from ..model import kinds, optimizers
from ..quantized import quantized_model
from . import methods


def method(args) -> Iterator[str]:
    """Full-parameter or LoRA, and its settings."""
    lora = args.lora
    if lora.lora_weight_path and (damaged := settings_files.problems(Path(lora.lora_weight_path))):
        yield from damaged
        return
    yield from half_weights(args)
    yield from optimizers.problems(args.training)
    yield from combination(args)
    if not lora.use_lora:
        usual = type(lora)()
        if idle := [f"--{name}" for name, value in vars(lora).items() if value != getattr(usual, name)]:
            what = f"{', '.join(idle)}: without --use_lora all parameters are trained"
            yield f"{what} - add --use_lora, or leave this out"
        return
    yield from variants(lora)
    if lora.lora_weight_path is not None:
        yield from adapter(args)
        return
    folder = Path(args.model.model_name_or_path or "")
    if args.model.model_name_or_path and (wrong := model_folder.unknown_layers(folder, lora.lora_target_modules)):
        there = ", ".join(model_folder.adaptable_layers(folder))
        what = f"--lora_target_modules {' '.join(wrong)}: no such layer"
        yield f"{what} - this model has {there}; separate them by blanks"


def combination(args) -> Iterator[str]:
    """The table of methods, weights and engines; and what --q_lora asks of the folder."""
    lora, folder = args.lora, Path(args.model.model_name_or_path or "")
    yield from quantized_model.flag_problems(lora)
    there = (folder / "config.json").is_file()
    if there and lora.q_lora and (problems := quantized_model.run_problems(folder, lora)):
        yield from problems
        return
    found = quantized_model.of_run(folder, lora) if there else None
    if found is not None and not lora.q_lora:
        return  # model_folder's finding, of whatever kind (GPTQ, AWQ, FP8)
    weights = {None: methods.PLAIN, "nf4": methods.NF4, "gptq": methods.GPTQ}[found and found.method]
    engine = engines.name_of(vars(args.training))
    tied = bool(config_files.config_of(folder).get("tie_word_embeddings"))
    of_run = dataclasses.replace(args, lora=adapter_folder.lora_of_run(lora))
    asked = methods.of_run(of_run, kinds.embeddings_of_run(of_run, folder), tied)
    by = f" (so {lora.lora_weight_path} has it)" if lora.lora_weight_path else ""
    for line in methods.refused(asked, weights, engine):
        yield f"{methods.named(asked, weights, engine)}{by}: {line}"


def variants(lora) -> Iterator[str]:
    """--lora_bias, --init_lora_weights, --loraplus_lr_ratio."""
    if lora.lora_bias not in ("none", "all", "lora_only"):
        yield f"--lora_bias {lora.lora_bias}: unknown - give none, all or lora_only"
    init = lora.init_lora_weights
    if not re.fullmatch(r"default|gaussian|pissa|pissa_niter_[1-9]\d*", init):
        ways = "default, gaussian, pissa, or pissa_niter_N with a number of iterations (pissa_niter_16)"
        yield f"--init_lora_weights {init}: unknown - give {ways}"
    elif init.startswith("pissa") and lora.lora_dropout and lora.lora_weight_path is None:
        what = f"--lora_dropout {lora.lora_dropout} with --init_lora_weights {init}"
        warn(f"{what}: what is dropped is part of the model itself, until training begins - give --lora_dropout 0")
    if lora.train_embeddings == "all" and lora.train_tokens:
        note("--train_tokens adds nothing to --train_embeddings all, with which all rows train")


def half_weights(args) -> Iterator[str]:
    """--bf16_weights: what it needs."""
    training = args.training
    if not training.bf16_weights:
        return
    if args.lora.use_lora or args.lora.q_lora:
        yield "--bf16_weights is for full-parameter training - leave it out; what LoRA freezes is in --bf16 anyway"
        return
    if not training.bf16:
        yield "--bf16_weights needs --bf16 - add it"
    if word(training.optim) not in optimizers.ROUNDING:
        wanted = " or ".join(f"--optim {name}" for name in optimizers.ROUNDING)
        yield f"--bf16_weights with --optim {word(training.optim)}: small updates would be lost - give {wanted}"


def adapter(args) -> Iterator[str]:
    """The adapter of --lora_weight_path: complete, with every tensor that it lists."""
    folder = Path(args.lora.lora_weight_path)
    if not (folder / "adapter_config.json").is_file():
        yield f"--lora_weight_path {folder}: no adapter_config.json there - give the output folder of a LoRA run{meant.folder(folder, meant.ADAPTER)}"
    elif pointers := model_folder.lfs_pointers(folder):
        yield from pointers
    elif not any((folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")):
        what = f"--lora_weight_path {folder}: no adapter_model.safetensors there"
        yield f"{what} - give the whole output folder of a LoRA run"
    else:
        adapter_files.check(folder, "--lora_weight_path")
        config = config_files.read_json(folder / "adapter_config.json")
        base = Path(args.model.model_name_or_path or "")
        there = (base / "config.json").is_file()
        if there and (model_folder.lfs_pointers(base) or model_folder.weight_problems(base)):
            return  # of the model, others speak
        if there:  # first: on a larger base than its own it would seem to lack tensors
            adapter_base.check(folder, base, remedy="give that one with -m")
        adapter_folder.check_adapter(folder, base if there else None, "--lora_weight_path")
        if ignored := adapter_folder.ignored_flags(args.lora):
            what = f"--lora_weight_path {folder}: its own settings hold ({adapter_folder.describe_adapter(config)})"
            yield f"{what}, and not {', '.join(ignored)} - leave these out, or train a new adapter"
        else:
            note(f"going on from {folder}: its own settings hold ({adapter_folder.describe_adapter(config)})")


# ---- small things
