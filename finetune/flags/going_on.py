"""What each flag means to a run that goes on from a checkpoint: must it be as it was, may it change, does it matter at all?

A checkpoint's training.json has the flags that its run was given (flags_given). A flag that is not in RULES is taken for RUN.
"""

from pathlib import Path
from typing import NamedTuple

from .. import json_text
from ..folders import checkpoints, output_folder

RUN = "part of what the run is: another value is refused"
APPLIED = "may change: the new value holds from the next step on, which is said and recorded"
COMPARED = "what it leads to is compared (lifecycle/resuming.py: KEPT), not the flag"
FREE = "does not matter to the result"

RULES = {
    name: rule
    for rule, names in {
        RUN: """
            model_kind lora_r lora_alpha lora_dropout lora_bias
            tf32 data_seed dataloader_drop_last optim_args optim_target_modules
            metric_for_best_model greater_is_better
            label_smoothing_factor neftune_noise_alpha use_liger_kernel auto_find_batch_size parallelism_config
        """,
        APPLIED: """
            learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps num_train_epochs max_steps
            weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
            save_strategy save_steps save_total_limit save_only_model eval_strategy eval_steps eval_delay eval_on_start
            logging_strategy logging_steps load_best_model_at_end early_stopping_patience ignore_data_skip
        """,
        COMPARED: """
            model_name_or_path use_lora q_lora quant lora_weight_path lora_target_modules
            train_embeddings train_tokens use_dora use_rslora init_lora_weights loraplus_lr_ratio
            data_path eval_data_path eval_split bad_samples supervise long_samples allow_special multi_turn empty_thoughts model_max_length
            per_device_train_batch_size gradient_accumulation_steps seed optim bf16 fp16 bf16_weights deepspeed fsdp fsdp_config
        """,
        FREE: """
            max_tokens_per_pass lazy_preprocess per_device_eval_batch_size dry_run html gpu_memory
            output_dir overwrite_output_dir resume_from_checkpoint trust_checkpoint skip_self_tests stop_after cache_dir use_cpu local_rank
            gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
            torch_compile torch_compile_backend torch_compile_mode use_cache liger_kernel_config full_determinism
            report_to logging_dir logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen
            log_level log_level_replica disable_tqdm run_name project trackio_space_id trackio_bucket_id
            trackio_static_space_id debug skip_memory_metrics
            push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
            save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint
            accelerator_config dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
            dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
            ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
            do_train do_eval do_predict average_tokens_across_devices batch_eval_metrics bf16_full_eval fp16_full_eval
            eval_accumulation_steps eval_do_concat_batches eval_use_gather_object include_for_metrics label_names
            length_column_name prediction_loss_only remove_unused_columns torch_empty_cache_steps train_sampling_strategy
        """,
    }.items()
    for name in names.split()
}  # fmt: skip
# what decides the learning rate of each step
SCHEDULE = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps"}
# curves that follow the loss: their state cannot be computed from the number of a step
STATEFUL = ("reduce_lr_on_plateau", "greedy")
SECRETS = {"hub_token"}


class Change(NamedTuple):
    """A flag that is another one than before. before, now: as text."""

    flag: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"--{self.flag}: {self.before}, now {self.now}"


def flags_given(args) -> dict:
    """{flag: value} of all that differ from their defaults, as JSON can hold them. Of a secret only that it was given."""
    return {name: "given" if name in SECRETS else plain(value) for name, value in args.given.items()}


def plain(value):
    """A flag's value as JSON can hold it: infinite numbers as text."""
    value = json_text.finite(getattr(value, "value", value))  # of an Enum
    return value if value is None or isinstance(value, (bool, int, float, str, list, dict)) else str(value)


def changes(record: dict, args, rule: str) -> list[Change]:
    """The flags of a rule that are others than in a record of training.json; [] for a record that is older than this table."""
    before = record.get("flags")
    if not isinstance(before, dict):
        return []
    now, found = flags_given(args), []
    for name in dict.fromkeys([*before, *now]):
        values = [value_of(name, given, args.usual) for given in (before, now)]
        if RULES.get(name, RUN) == rule and values[0] != values[1]:
            found.append(Change(name, *map(str, values)))
    return found


def value_of(name: str, given: dict, usual: dict):
    """A flag's value where these were given. --data_seed is --seed where it is left out."""
    value = given.get(name, plain(usual.get(name)))
    return value_of("seed", given, usual) if name == "data_seed" and value is None else value


def same_command(out: Path, args) -> bool:
    """Whether the newest checkpoint in `out` is of this very command: every flag that matters to the result is as it was."""
    return why_another(out, args) == ""


def why_another(out: Path, args) -> str:
    """What makes this another command than that of the newest checkpoint in `out`, "" where nothing does."""
    every = checkpoints.complete(out)
    if not every:
        return "it is not complete"
    record = output_folder.read_record(every[-1])
    if not isinstance(record.get("flags"), dict):
        return f"it has no {output_folder.RECORD} with the flags of its run"
    return "; ".join(str(change) for rule in (RUN, APPLIED) for change in changes(record, args, rule))


def wish_of(args, out: Path) -> str | None:
    """--resume_from_checkpoint, or auto where it is left out and `out` holds checkpoints of the same command."""
    wish = args.training.resume_from_checkpoint
    if wish is None and not args.training.overwrite_output_dir and same_command(out, args):
        return "auto"
    return wish
