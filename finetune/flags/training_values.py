"""What can be told of transformers' flags from their values, before torch and transformers are imported."""

import re

from ..compat.on_transformers import word
from ..distributed import deepspeed_file, engines
from ..errors import note
from . import schedules
from .values import of_training

# Flags of transformers that the step plan, the packed rows or the loss of this toolkit leave without meaning.
NO_EFFECT = (
    "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_persistent_workers", "dataloader_prefetch_factor", "do_predict",
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "fp16_full_eval",
    "include_for_metrics", "label_names", "length_column_name",
    "logging_nan_inf_filter", "prediction_loss_only", "remove_unused_columns", "torch_empty_cache_steps",
    "train_sampling_strategy",
)  # fmt: skip
# Flags that would change the result, and would be passed over in silence.
REFUSED = {
    "parallelism_config": "not available in this version - leave it out",
    "label_smoothing_factor": "not available: the loss is plain cross-entropy - leave it out",
    "neftune_noise_alpha": "not available: its noise follows the length of a row, and rows are packed - leave it out",
    "use_liger_kernel": "not available: the loss is computed in pieces anyway - leave it out",
    "liger_kernel_config": "not available: the loss is computed in pieces anyway - leave it out",
    "auto_find_batch_size": "it would change the samples of a step - lower --max_tokens_per_pass instead",
}
COMPILING = ("torch_compile", "torch_compile_backend", "torch_compile_mode")  # each of them turns it on
# the words of --gradient_checkpointing
RECOMPUTING = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "auto": "auto"}


METRICS = {"loss": False, "perplexity": False, "token_accuracy": True}  # of an evaluation: whether more is better
UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> int:
    """ "3h50m" -> 13,800. ValueError for what is no time."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s?)?", text.strip().lower())
    seconds = sum(int(number or 0) * size for number, size in zip(found.groups(), UNITS.values())) if found else 0
    if not seconds:
        raise ValueError(f"{text}: is no time - give for example 3h50m, 90m or 300s")
    return seconds


def saved_where_evaluated(wanting: str, strategy: str, values: dict, usual: dict) -> dict:
    """--save_strategy and --save_steps as --eval_strategy and --eval_steps are: of an evaluation without a checkpoint nothing can be delivered.

    Says so where others were given, in a script's list or by hand.
    """
    saved, steps = word(values["save_strategy"]), values["save_steps"]
    found = {"save_strategy": strategy, "save_steps": (values["eval_steps"] or 0.1) if strategy == "steps" else steps}
    given = (saved, steps) != (word(usual["save_strategy"]), usual["save_steps"])
    if given and (saved, steps if saved == "steps" else None) != (strategy, found["save_steps"] if strategy == "steps" else None):
        was = f"--save_steps {steps:g}" if saved == "steps" else f"--save_strategy {saved}"
        note(f"--{wanting}: a checkpoint is written at each evaluation, which takes the place of {was}")
    return found


def with_best(values: dict, usual: dict) -> tuple[dict, list[str]]:
    """(the flags of the best checkpoint and of stopping, resolved, findings). usual: the default of each flag."""
    values, findings = dict(values), []
    metric, patience, strategy = (values[name] for name in ("metric_for_best_model", "early_stopping_patience", "eval_strategy"))
    if metric is not None:
        values["metric_for_best_model"] = metric = metric.removeprefix("eval_")
        if metric not in METRICS:
            findings.append(f"--metric_for_best_model {metric}: no evaluation has it - give {', '.join(METRICS)}")
    greater = METRICS.get(metric or "loss", False)
    if values["greater_is_better"] not in (None, greater) and metric in (None, *METRICS):
        better = "more" if greater else "less"
        findings.append(f"--greater_is_better {values['greater_is_better']}: of {metric or 'loss'} {better} is better - leave it out")
    values["greater_is_better"] = greater
    wanting = [name for name in ("early_stopping_patience", "load_best_model_at_end") if values[name]]
    wanting += ["save_strategy best"] if str(values["save_strategy"]).lower().endswith("best") else []
    strategy = word(strategy)
    if wanting and strategy == "no":
        findings.append(f"--{wanting[0]}: nothing is evaluated - give --eval_data_path or --eval_split, and --eval_strategy steps or epoch")
    elif wanting and word(values["save_strategy"]) != "best":
        values |= saved_where_evaluated(wanting[0], strategy, values, usual)
    if wanting and metric is None:
        values["metric_for_best_model"] = "loss"
    if patience:
        values["load_best_model_at_end"] = True
    if values["stop_after"] is not None:
        try:
            seconds_of(values["stop_after"])
        except ValueError as error:
            findings.append(f"--stop_after {error}")
    return values, findings


def checked(values: dict, usual: dict) -> tuple[dict, list[str]]:
    """(the flags with their engine's settings read, findings). Notes what has no effect. usual: the default of each flag."""
    changed = {name for name, value in values.items() if value != usual.get(name, value)}
    findings = [f"--{name} {values[name]}: {why}" for name, why in REFUSED.items() if name in changed and values[name]]
    findings += [*of_training(values), *schedules.problems(values)]
    wish = values["gradient_checkpointing"]
    if str(wish).lower() not in RECOMPUTING:
        findings.append(f"--gradient_checkpointing {wish}: unknown - give auto, True or False")
    if values["bf16"] and values["fp16"]:
        findings.append("--bf16 and --fp16: only one of them can be - leave out one; bf16 where the GPU has it")
    values, of_best = with_best(values, usual)
    values, more = with_engine(values)
    if idle := changed & set(NO_EFFECT):
        listed = ", ".join(f"--{name}" for name in sorted(idle))
        note(f"no effect in this trainer (packed samples, evaluated by their loss): {listed}")
    if compiled := [f"--{name}" for name in COMPILING if values[name]]:
        if values["fsdp"]:
            findings.append(f"{compiled[0]} and --fsdp: what is compiled and shared out cannot be put together again - leave out one")
        note("--torch_compile: steps differ in length, and the first ones are compiled anew, for a minute each on few cores")
    return values, findings + of_best + more


def with_engine(values: dict) -> tuple[dict, list[str]]:
    """(the flags with --deepspeed read and --fsdp in transformers' form, findings)."""
    values, findings = engines.fsdp_settings(values)
    if values.get("deepspeed") and values["fsdp"]:
        return values, [*findings, "--deepspeed and --fsdp: two engines for one run - leave out one"]
    if values.get("deepspeed"):
        config, more = deepspeed_file.deepspeed_config(values["deepspeed"], values)
        return values | {"deepspeed": config}, findings + more
    return values, findings
