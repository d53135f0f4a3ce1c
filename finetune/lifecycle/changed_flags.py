"""A run that goes on takes what its flags say now: learning rate and schedule, decay, betas, and when to save, evaluate and log.

transformers loads these with the optimizer, the schedule and its own state, so that a flag changed at a resume would do nothing.
"""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from qwen_model.compat import overrides

from ..errors import UserError, note
from ..flags.going_on import SCHEDULE
from .resuming import Way

OF_A_GROUP = ("initial_lr", "weight_decay", "betas", "eps")  # what flags decide of an optimizer's groups, as torch names it


class GoesOn:
    """Mixin for a Trainer. way: what there is to do; without one, and without a checkpoint, everything."""

    def __init__(self, *args, way: Way | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.way = way or Way()
        self.asked: list[dict] = []  # of each group of the optimizer, as the flags say it
        self.add_callback(TakesFlags(self))

    @overrides(Trainer, "num_training_steps", "optimizer")
    def create_scheduler(self, num_training_steps, optimizer=None):
        """Notes what the flags say, before a checkpoint's optimizer is loaded."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        groups = (self.optimizer if optimizer is None else optimizer).param_groups
        self.asked = [{key: kept(group[key]) for key in OF_A_GROUP if key in group} for group in groups]
        return scheduler

    @overrides(Trainer, "args", "dataloader")
    def set_initial_training_values(self, args, dataloader):
        """No epoch where no step is left: transformers would always make one more."""
        epochs, *others = super().set_initial_training_values(args, dataloader)
        return (0 if self.way.is_trained else epochs, *others)

    @overrides(Trainer, "logs", "start_time")
    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Nothing of a training that was none."""
        if not self.way.is_trained:
            super().log(logs, start_time)


class TakesFlags(TrainerCallback):
    """Once everything of a checkpoint is loaded, before the first step."""

    def __init__(self, trainer: GoesOn):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, way = self.trainer, self.trainer.way
        state.compute_steps(args, state.max_steps)  # when to save, evaluate and log
        longer = way.planned_before not in (None, way.total)
        if way.is_trained or not (way.changes or longer or way.flags_unknown):
            return
        before, groups = first_rate(trainer.optimizer), values_of(trainer.optimizer)
        take_groups(trainer.optimizer, trainer.asked)
        follows_loss = not isinstance(trainer.lr_scheduler, LambdaLR)
        if longer or any(change.flag in SCHEDULE for change in way.changes) or way.flags_unknown and not follows_loss:
            take_schedule(trainer.optimizer, trainer.lr_scheduler, trainer.asked)
        if not (way.changes or longer or groups != values_of(trainer.optimizer)):
            return
        told = ["flags that the checkpoint does not record"] if way.flags_unknown and not way.changes else []
        told += [str(change) for change in way.changes]
        told += [f"the curve of the learning rate is that of {way.total} steps, no longer of {way.planned_before}"] if longer else []
        rate = first_rate(trainer.optimizer)
        now = f"; the learning rate of step {state.global_step + 1} is {rate:.4g}" + (f", not {before:.4g}" if rate != before else "")
        note(f"changed from here on: {'; '.join(told)}{now}")


def values_of(optimizer) -> list[dict]:
    """What flags decide of each group of an optimizer."""
    names = (*OF_A_GROUP, "lr")
    return [{key: str(value if key == "betas" else float(value)) for key, value in group.items() if key in names} for group in optimizer.param_groups]


def first_rate(optimizer) -> float:
    """The learning rate of the next step, of the first group."""
    return float(optimizer.param_groups[0]["lr"])


def take_groups(optimizer, asked: list[dict]) -> None:
    """Gives each group of an optimizer what the flags say."""
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        for key, value in values.items():
            put(group, key, value)


def take_schedule(optimizer, scheduler, asked: list[dict]) -> None:
    """The learning rate as a run with the present flags would have it behind as many steps.

    The curve is the scheduler's own: torch leaves it out of what it stores, so it is of the present flags.
    """
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            f"the schedule ({type(scheduler).__name__}) cannot go on with other values: give --learning_rate, --lr_scheduler_type, "
            "--warmup_ratio, --warmup_steps, --num_train_epochs and --max_steps as they were, or another --output_dir"
        )
    highest = [values["initial_lr"] for values in asked]
    for group, rate, curve in zip(optimizer.param_groups, highest, scheduler.lr_lambdas, strict=True):
        put(group, "lr", rate * curve(scheduler.last_epoch))
    rates = [kept(group["lr"]) for group in optimizer.param_groups]
    scheduler.load_state_dict(scheduler.state_dict() | {"base_lrs": highest, "_last_lr": rates})


def put(group: dict, key: str, value) -> None:
    """torchao keeps learning rates in tensors, which a compiled step has taken hold of."""
    if isinstance(group.get(key), torch.Tensor):
        group[key].fill_(float(value))
    else:
        group[key] = value


def kept(value):
    """A copy that does not change with the group."""
    return value.clone() if isinstance(value, torch.Tensor) else value
