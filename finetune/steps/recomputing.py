"""Gradient checkpointing in some of a model's blocks, and whether the run takes the memory that was computed for it."""

from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from .memory_model import Estimate
from .memory_plan import compare
from .trainer import memory_gb


def install(trainer, blocks: int | None, memory: Estimate) -> None:
    """blocks: how many are computed again, from the first on; None: as transformers' flag says, all or none."""
    if blocks is not None:
        trainer.add_callback(FirstBlocks(blocks))
    if trainer.args.device.type == "cuda":
        trainer.add_callback(CompareMemory(memory))


class FirstBlocks(TrainerCallback):
    """transformers switches recomputing on in all blocks when training begins; here it is switched off in the later ones."""

    def __init__(self, count: int):
        self.count = count

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for number, block in enumerate(blocks):
            block.gradient_checkpointing = number < self.count


class CompareMemory(TrainerCallback):
    """After the second step, the largest pass with the optimizer's state in place is behind: see plan.py."""

    def __init__(self, memory: Estimate):
        self.memory, self.steps = memory, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.steps == 2:
            compare(self.memory, memory_gb() * 1e9)
