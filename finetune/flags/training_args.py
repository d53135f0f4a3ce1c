"""transformers' TrainingArguments with our flags and defaults, and without what this trainer cannot honour."""

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers

from ..distributed import deepspeed_file, engines, ranks
from ..errors import note
from .definitions import TrainingFlags

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
    "auto_find_batch_size": "it would change the samples of a step - lower --max_tokens_per_pass instead",
}


@dataclass
class TrainingArguments(TrainingFlags, transformers.TrainingArguments):
    """Everything transformers' TrainingArguments takes; the defaults of TrainingFlags win.

    gradient_accumulation_steps, per_device_train_batch_size: of samples, as users know them; the step plan reads them.
    """

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise transformers refuses --bf16 where there is no GPU
        self.resolve_checkpointing()
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = 0.1  # transformers would take logging_steps: with ours, at every step
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir  # where transformers looks for it today
        self.remove_unused_columns = False  # our items are no data set's columns
        # all that trains takes part in every pass, and no buffer changes: DDP need not look for either
        self.ddp_find_unused_parameters = bool(self.ddp_find_unused_parameters)
        self.ddp_broadcast_buffers = bool(self.ddp_broadcast_buffers)
        self.distributed_state = None  # of accelerate, from engines.connect() on
        super().__post_init__()
        if self.deepspeed:  # what it finds to differ is the batch, which the step plan has taken over
            self.hf_deepspeed_config.mismatches.clear()
        if self.engine == engines.ONE and not self.use_cpu and torch.cuda.device_count() > 1:
            note(
                f"{torch.cuda.device_count()} GPUs are visible, and one process uses the first; CUDA_VISIBLE_DEVICES=N takes "
                "another, and the scripts *_ds.sh take all"
            )

    def resolve_checkpointing(self) -> None:
        """Sets `recompute` to "auto", True or False. transformers knows only yes and no: auto is yes to it.

        recomputed_blocks: how many of the model's blocks, from the first on, are checkpointed; None: not decided, or all.
        """
        self.recomputed_blocks = None
        given = getattr(self, "activation_checkpointing", None)  # its name from transformers 5.23 on, which warns of the old one
        self.recompute = RECOMPUTING[str(self.gradient_checkpointing).lower()] if given is None else bool(given)
        self.recompute_blocks(bool(self.recompute))
        if getattr(self, "activation_checkpointing_kwargs", 0) is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs

    def recompute_blocks(self, count: int | bool) -> None:
        """Activation checkpointing in no block (0), all of them (True), or the first `count`."""
        self.recomputed_blocks = None if isinstance(count, bool) else count
        self.gradient_checkpointing = bool(count)
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = bool(count)

    @property
    def engine(self) -> str:
        """Of engines.py."""
        return engines.name_of(vars(self))

    @functools.cached_property
    def _setup_devices(self) -> torch.device:
        """This rank's device. transformers would join the process group here, before the data is read: connect() does."""
        self.accelerator_config.pop("use_configured_state", None)  # consumed here, as transformers does
        self._n_gpu = 0 if self.use_cpu else 1  # never several: DataParallel cannot split a packed row
        if self.use_cpu:
            return torch.device("cpu")
        return torch.device(torch.accelerator.current_accelerator().type, ranks.local_rank())

    @property
    def world_size(self) -> int:
        return ranks.count()

    @property
    def process_index(self) -> int:
        return ranks.rank()

    @property
    def local_process_index(self) -> int:
        return ranks.local_rank()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """--warmup_steps, or the share --warmup_ratio of all steps, rounded up."""
        if self.warmup_steps == 0 and self.warmup_ratio:
            return math.ceil(num_training_steps * self.warmup_ratio)
        return super().get_warmup_steps(num_training_steps)


# the words of --gradient_checkpointing
RECOMPUTING = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "auto": "auto"}


def build(values: dict):
    """(training arguments, findings) from the value of every flag.

    Where there are findings, the first is a plain object with the flags as attributes, for the other checks to read.
    """
    defaults = {
        f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.default is not dataclasses.MISSING
    }
    changed = {name for name, value in values.items() if value != defaults.get(name, value)}
    findings = [f"--{name} {values[name]}: {why}" for name, why in REFUSED.items() if name in changed and values[name]]
    if str(values["gradient_checkpointing"]).lower() not in RECOMPUTING:
        wrong = values["gradient_checkpointing"]
        findings.append(f"--gradient_checkpointing {wrong}: unknown - give auto, True or False")
    findings += precision(values)
    values, more = with_engine(values)
    findings += more
    if idle := changed & set(NO_EFFECT):
        listed = ", ".join(f"--{name}" for name in sorted(idle))
        note(f"no effect in this trainer (packed samples, evaluated by their loss): {listed}")
    if values["torch_compile"]:
        note("--torch_compile: steps differ in length, and the first ones are compiled anew, for a minute each on few cores")
    if not findings:
        try:
            return TrainingArguments(**values), []
        except (ValueError, OSError) as error:
            findings = [" ".join(str(error).split()) + " - change or leave out the flag"]
    return SimpleNamespace(**values), findings


def with_engine(values: dict) -> tuple[dict, list[str]]:
    """(the flags with --deepspeed read and --fsdp in transformers' form, findings)."""
    values, findings = engines.fsdp_settings(values)
    if values.get("deepspeed") and values["fsdp"]:
        return values, [*findings, "--deepspeed and --fsdp: two engines for one run - leave out one"]
    if values.get("deepspeed"):
        config, more = deepspeed_file.deepspeed_config(values["deepspeed"], values)
        return values | {"deepspeed": config}, findings + more
    return values, findings


def precision(values: dict) -> list[str]:
    """What stands against --bf16 and --fp16."""
    if values["bf16"] and values["fp16"]:
        return ["--bf16 and --fp16: only one of them can be - leave out one; bf16 where the GPU has it"]
    if not values["bf16"] or values["use_cpu"] or not torch.cuda.is_available() or torch.version.hip:
        return []
    major, minor = torch.cuda.get_device_capability()
    return [] if major >= 8 else [f"--bf16: this GPU (sm_{major}{minor}) has no bf16 - use --fp16"]
