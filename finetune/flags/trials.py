"""The optimizer and the schedule that flags ask for, tried on a layer of a few numbers before weights are loaded.

Which names there are and what they take is told without torch (schedules.py, model/optimizers.py); here it is seen whether they work.
"""

import copy
import math
from collections.abc import Iterator

from ..compat.on_transformers import word
from ..errors import shortened
from ..model import optimizers
from . import schedules, values

STEPS = 20  # of the trial: warm-up, what lies between, and the end
SHAPE = (64, 128)  # of the layer: large enough that bitsandbytes holds its state in 8 bits


def optimizer(args) -> Iterator[str]:
    """A step of --optim with --optim_args."""
    training = args.training
    name = word(training.optim)
    if args.findings or name not in values.WORDS["optim"] or any(optimizers.problems(training)) or optimizers.is_slow_to_try(name):
        return
    try:
        model, made = made_for(training)
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.1
        made.step()
    except Exception as error:  # of other packages, and of whatever kind
        yield f"--optim {name}{with_args(training)}: does not work here ({why(error)}) - {optimizers.remedy(name)}"
        return
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        yield f"--optim {name}{with_args(training)}: its first step makes numbers that are none - give other values"


def schedule(args) -> Iterator[str]:
    """All of --lr_scheduler_type with --lr_scheduler_kwargs, over a few steps."""
    training = args.training
    if args.findings:  # those of schedules.py among them
        return
    import torch
    from transformers import get_scheduler

    name, given = word(training.lr_scheduler_type), values.json_object(training.lr_scheduler_kwargs)
    toy = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=training.learning_rate)
    try:
        made = get_scheduler(name, toy, training.get_warmup_steps(STEPS), STEPS, given)
        rates = [rate_after(made, toy, name) for _ in range(STEPS + 1)]
    except Exception as error:
        yield f"--lr_scheduler_type {name}{schedules.with_kwargs(training)}: does not work ({why(error)}) - {schedules.advice(name)}"
        return
    if not all(isinstance(rate, (int, float)) and 0 <= rate < math.inf for rate in rates):
        wrong = next(rate for rate in rates if not (isinstance(rate, (int, float)) and 0 <= rate < math.inf))
        what = f"--lr_scheduler_type {name}{schedules.with_kwargs(training)}: makes a learning rate of {shortened(wrong)}"
        yield f"{what} - {schedules.advice(name)}"


def backends(args) -> Iterator[str]:
    """--ddp_backend and --torch_compile_backend are there."""
    training = args.training
    import torch

    if training.ddp_backend and not torch.distributed.is_backend_available(training.ddp_backend):
        yield f"--ddp_backend {training.ddp_backend}: this torch is built without it - give gloo, or leave it out"
    elif training.ddp_backend == "nccl" and training.use_cpu:
        yield "--ddp_backend nccl: is for GPUs - give gloo, or leave it out"
    if training.torch_compile_backend not in (None, "inductor"):
        known = torch.compiler.list_backends(exclude_tags=())
        if training.torch_compile_backend not in known:
            yield f"--torch_compile_backend {shortened(training.torch_compile_backend)}: unknown - give {', '.join(known)}, or leave it out"


def rate_after(made, toy, name: str):
    """The learning rate, and a step more of the schedule."""
    rate = toy.param_groups[0]["lr"]
    toy.step()
    made.step(1.0) if name in schedules.BY_EVALUATION else made.step()
    return rate


def made_for(training) -> tuple:
    """(a layer, its optimizer), made as the trainer makes it."""
    import torch
    from transformers import Trainer

    settings = copy.copy(training)
    optimizers.prepare(settings)
    model = torch.nn.Linear(*SHAPE, device="meta").to_empty(device=training.device)  # draws no random number
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    kind, given = Trainer.get_optimizer_cls_and_kwargs(settings, model)
    groups = [{"params": [model.weight], "weight_decay": training.weight_decay}, {"params": [model.bias], "weight_decay": 0.0}]
    return model, kind(given.pop("params", groups), **given)


def with_args(training) -> str:
    """The settings behind an optimizer's name, as they were given."""
    return f" --optim_args {shortened(training.optim_args)}" if training.optim_args else ""


def why(error: Exception) -> str:
    """An error of another package in a few words."""
    return shortened(f"{type(error).__name__}: {error}", 160)
