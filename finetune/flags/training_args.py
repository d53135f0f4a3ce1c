"""transformers' TrainingArguments with our flags and defaults, and without what this trainer cannot honour."""

import dataclasses
import functools
import math
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

from qwen_model.compat import require

from ..distributed import engines, ranks
from ..errors import UserError, note, shortened
from . import training_values
from .definitions import TrainingFlags


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
        self.recompute = training_values.RECOMPUTING[str(self.gradient_checkpointing).lower()] if given is None else bool(given)
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
        """The engine's name, one of engines.py."""
        return engines.name_of(vars(self))

    @functools.cached_property
    def _setup_devices(self) -> torch.device:
        """This rank's device. transformers would join the process group here, before the data is read: connect() does."""
        self.accelerator_config.pop("use_configured_state", None)  # consumed here, as transformers does
        self._n_gpu = 0 if self.use_cpu else 1  # never several: DataParallel cannot split a packed row
        if self.use_cpu:
            return torch.device("cpu")
        return torch.device(torch.accelerator.current_accelerator().type, ranks.gpu(torch.accelerator.device_count()))

    @property
    def world_size(self) -> int:
        return ranks.count()

    @property
    def process_index(self) -> int:
        return ranks.rank()

    @property
    def local_process_index(self) -> int:
        return ranks.local_rank()

    def seconds_to_stop(self) -> int | None:
        """--stop_after in seconds."""
        return None if self.stop_after is None else training_values.seconds_of(self.stop_after)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """--warmup_steps, or the share --warmup_ratio of all steps, rounded up."""
        if self.warmup_steps == 0 and self.warmup_ratio:
            return math.ceil(num_training_steps * self.warmup_ratio)
        return super().get_warmup_steps(num_training_steps)


for _name in ("_setup_devices", "world_size", "process_index", "local_process_index", "get_warmup_steps"):
    require(transformers.TrainingArguments, _name)  # else transformers would go on without ours, in silence


def build(values: dict):
    """(training arguments, findings) from the value of every flag.

    Where there are findings, the first is a plain object with the flags as attributes, for the other checks to read.
    """
    usual = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.default is not dataclasses.MISSING}
    values, findings = training_values.checked(values, usual)
    findings += of_gpu(values)
    if not findings:
        try:
            return TrainingArguments(**values), []
        except UserError as error:
            findings = error.findings
        except (ValueError, TypeError, KeyError, OverflowError, OSError, ImportError, NotImplementedError, RuntimeError) as error:
            if is_our_fault(error):
                raise
            findings = [f"{shortened(error, 400)} - change or leave out the flag"]
    return SimpleNamespace(**values), findings


def is_our_fault(error: Exception) -> bool:
    """Whether our own code raised it, or what that called, and not transformers: then no flag is to blame."""
    ours, theirs = Path(__file__).parents[1], Path(transformers.__file__).parent
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    at = next((file for file in reversed(files) if file.is_relative_to(ours) or file.is_relative_to(theirs)), ours)
    return at.is_relative_to(ours)


def of_gpu(values: dict) -> list[str]:
    """Findings for a GPU that this torch was not built for, and for --bf16 on one without bf16."""
    if values["use_cpu"] or not torch.cuda.is_available() or torch.version.hip:
        return []
    major, minor = torch.cuda.get_device_capability()
    findings, gpu = [], f"this GPU (sm_{major}{minor})"
    if not runs_on((major, minor), torch.cuda.get_arch_list()):
        how = "one built for CUDA 12.6, the last with it" if (5, 0) <= (major, minor) < (7, 5) else "a newer one"
        findings.append(
            f"torch {torch.__version__} has no code for {gpu}, only for {', '.join(torch.cuda.get_arch_list())} - install {how} (see "
            "https://pytorch.org/get-started), or add --use_cpu True"
        )
    if values["bf16"] and not values["fp16"] and major < 8:
        findings.append(f"--bf16: {gpu} has no bf16 - use --fp16")
    return findings


def runs_on(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a torch built for these (sm_86, compute_120, ...) runs on a GPU: sm_86 does on 8.6 and later of the 8, compute_120, which
    the driver compiles, on all from 12.0 on."""
    for word in built:
        kind, _, number = word.partition("_")
        major, minor = divmod(int(number.rstrip("af")), 10)
        if (kind == "compute" and capability >= (major, minor)) or (major == capability[0] and minor <= capability[1]):
            return True
    return not built
