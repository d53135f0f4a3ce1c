"""Activation checkpointing in some of a model's blocks, and a check of the memory estimate against what the run takes."""

from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from ..memory.memory_model import Estimate
from ..memory.memory_plan import compare
from ..memory.peak_memory import memory_gb


def install(trainer, blocks: int | None, memory: Estimate) -> None:
    """blocks: how many are checkpointed, from the first on; None: as transformers' flag says, all or none."""
    if blocks is not None:
        trainer.add_callback(FirstBlocks(blocks))
    if trainer.args.device.type == "cuda":
        trainer.add_callback(CompareMemory(memory))


class FirstBlocks(TrainerCallback):
    """When training begins, transformers switches activation checkpointing on in all blocks; this switches later ones off."""

    def __init__(self, count: int):
        self.count = count

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for number, block in enumerate(blocks):
            block.gradient_checkpointing = number < self.count


class CompareMemory(TrainerCallback):
    """Compares after the second step: by then the largest pass has run with the optimizer's state in memory (see plan.py)."""

    def __init__(self, memory: Estimate):
        self.memory, self.steps = memory, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.steps == 2:
            compare(self.memory, memory_gb() * 1e9)
