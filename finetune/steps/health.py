"""Numbers that are none are found before anything of them is saved, and told with the step and the samples that they came from."""

import math
from pathlib import Path

import torch
from transformers import Trainer

from qwen_model.compat import overrides

from ..distributed.ranks import meeting
from ..errors import listed, note, warn
from ..folders import checkpoints, finite

SKIPPED_IN_A_ROW = 20  # steps that fp16's loss scaling may leave out before the run stops: by then the scale is 2^-20 of its start
ZERO_NORMS = 10  # steps in a row without any gradient, before that is told
FIRST_STEPS, TOO_EASY = 5, 0.01  # a loss (nats a token) below that in the first steps is told
SAMPLES_TOLD = 8  # of a step that went wrong


class Norm:
    """The norm of a step's gradient, all ranks together. On a GPU it is copied to the CPU behind the step, for which nobody waits.

    step: counted from 1; loss: this rank's share of the step's loss, on the device.
    """

    def __init__(self, step: int, norm, loss: torch.Tensor | None):
        self.step, self.loss, self.copied = step, loss, None
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's lies in shards
        self.value = norm
        if isinstance(norm, torch.Tensor) and norm.is_cuda:
            self.value = torch.empty((), dtype=torch.float32, pin_memory=True)
            self.value.copy_(norm.detach(), non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> float:
        """As a number; waits for what was enqueued before it, not for what came after."""
        if self.copied is not None:
            self.copied.synchronize()
        return float(self.value)


class WatchesNumbers:
    """Mixin for a Trainer: looks at the norm of each step's gradient, which is computed anyway and holds what any rank found.

    Where it can be read at once, before the optimizer's step; on a GPU a step late, but always before something is saved. So a
    checkpoint holds finite numbers, and the one before it is removed only when the step after it went well, too.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm: Norm | None = None  # not looked at yet
        self.step_loss = None  # of training_step
        self.skipped, self.skipped_in_a_row, self.without_gradient = 0, 0, 0
        self.told_easy = False
        self.untidy = False  # there may be more checkpoints than --save_total_limit

    @overrides(Trainer, "model", "grad_norm")
    def _get_grad_norm(self, model, grad_norm=None):
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.look_at_norm()  # of the step before
        if found is not None:
            self.norm = Norm(self.state.global_step + 1, found, self.step_loss)
            if self.norm.copied is None:
                self.look_at_norm()
        return found

    def look_at_norm(self) -> None:
        """Raises FloatingPointError where the last norm is no number; with fp16 only when too many steps were skipped."""
        last, self.norm = self.norm, None
        if last is None:
            return
        value = last.read()
        if not math.isfinite(value):
            if self.accelerator.mixed_precision != "fp16":
                raise FloatingPointError(self.not_finite(last.step, f"the norm of its gradient is {value}", last.loss))
            self.count_skipped(last)
            return
        self.skipped_in_a_row = 0
        self.without_gradient = self.without_gradient + 1 if value == 0 else 0
        if self.without_gradient == ZERO_NORMS:
            warn(
                f"the gradient of the last {ZERO_NORMS} steps is exactly 0: nothing is learned - look at the data with "
                "python -m finetune.data, and at what trains"
            )
        if self.untidy:
            self.tidy_up()

    def count_skipped(self, last: Norm) -> None:
        """fp16: the loss scale was too high for a step, which changed nothing; the scale is halved. Some are usual at the start."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row == SKIPPED_IN_A_ROW:
            what = f"fp16 has skipped the last {SKIPPED_IN_A_ROW} steps, whatever the loss scale"
            raise FloatingPointError(self.not_finite(last.step, what, last.loss, "train with --bf16 instead of --fp16"))

    def not_finite(self, step: int, what: str, loss=None, remedy: str = "") -> str:
        """The line for a step whose numbers are none: the step, what is wrong, the samples, the last good checkpoint, what to do.

        All ranks come here, since the norm is the same on all. Where the loss tells whose share it was, only its samples are named.
        """
        shares = meeting.exchange("losses of a step", None if loss is None else loss.item())
        wrong = [rank for rank, share in enumerate(shares) if share is not None and not math.isfinite(share)]
        if loss is not None:
            whose = f", of rank {' and '.join(map(str, wrong))}" if 0 < len(wrong) < len(shares) else ""
            what += f" (its loss: {sum(shares) / len(shares):.4g}{whose})"
        every = checkpoints.complete(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {every[-1]}" if every else "there is no checkpoint before it"
        begin = getattr(self, "_initial_global_step", 0)  # steps done before this start
        remedies = {
            begin: "go on from an earlier checkpoint, or lower --learning_rate",
            0: "look at these samples, or train with --bf16 instead of --fp16",
        }
        again = "go on with --resume_from_checkpoint auto" if every else "start again"
        remedy = remedy or remedies.get(step - 1, f"lower --learning_rate or lengthen --warmup_ratio, and {again}")
        return f"step {step}: {what}; nothing of it is saved, and {kept} - samples: {self.samples_of(step, wrong)} - {remedy}"

    def samples_of(self, step: int, ranks=()) -> str:
        """ "a.json 3, 7; b.json 1": the conversations of a step, of these ranks or of all, by their numbers in the files, from 1."""
        epoch, index = divmod(step - 1, self.plan.steps_per_epoch)
        passes = [one for rank, some in enumerate(self.plan.step(epoch, index).passes) if not ranks or rank in ranks for one in some]
        found: dict[str, list[int]] = {}
        for path, number in sorted(self.samples.origin(i) for members in passes for i in members):
            found.setdefault(path, []).append(number)
        return "; ".join(f"{path} {listed(numbers, SAMPLES_TOLD)}" for path, numbers in found.items())

    def check_log(self, logs: dict) -> dict:
        """A line of the log in which every number is one. Raises FloatingPointError for a loss that is none."""
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                self.look_at_norm()  # it knows the step; the loss of a line is the mean of several
                kind = "evaluation loss" if name == "eval_loss" else "loss"
                raise FloatingPointError(self.not_finite(max(1, self.state.global_step), f"the {kind} is {logs[name]}"))
        if not self.told_easy and self.state.global_step <= FIRST_STEPS and logs.get("loss", 1.0) < TOO_EASY:
            self.told_easy = True
            warn(
                f"the loss is {logs['loss']:.2g} in the first steps: the model knows these answers already, or they stand in their "
                "questions - look at the data with python -m finetune.data"
            )
        if self.skipped and "loss" in logs:
            logs["skipped_steps"] = self.skipped
        return {name: value for name, value in logs.items() if not isinstance(value, float) or math.isfinite(value)}

    def tell_skipped(self) -> None:
        if self.skipped:
            note(f"fp16 skipped {self.skipped} steps, in which the gradients were too large for the loss scale")

    def tidy_up(self) -> None:
        """--save_total_limit: the newest checkpoint counts as good when a step behind it went well, or the run is over."""
        self.untidy = False
        if self.args.should_save:
            folder, limit = Path(self.args.output_dir), self.args.save_total_limit
            checkpoints.keep_newest(folder, limit, self.state.best_model_checkpoint)


def check_tensors(tensors) -> None:
    """Raises FloatingPointError for the first of (name, tensor) that is not finite."""
    if (name := finite.first_not_finite(tensors)) is not None:
        raise FloatingPointError(f"{name} is not finite: nothing of it is saved - lower --learning_rate, and start again")
