"""What the first seconds prove on this machine, with this model, its kernels and its engine, before hours are spent.

Whether the largest pass fits is shown by the first step, into which the plan lays it (plan.Plan.front).
"""

import time

import numpy as np
import torch
from transformers import TrainerCallback

from ..distributed import engines
from ..errors import Failed, note, warn
from ..model import kernels
from .batches import pack

# tokens of a sample that is tested with: on a GPU more than a kernel takes at once; on a CPU, where a model of 231M weights needs 9 ms of a
# core for a token, so few that all passes together take seconds
LONGEST = {"cuda": 256, "cpu": 64}
# of a sum of token losses of the two ways: how far they may be apart, by the precision of the passes
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class SelfTests(TrainerCallback):
    """Runs once everything is on its device and in its engine, before the first step; under ZeRO-3 kernels alone. All ranks do the same.

    Under ZeRO-3 DeepSpeed learns from the first passes in which order layers come, and fetches them ahead. From passes that go forward
    alone it learns another order; with evaluations in the run, it then gathers weights for the result that are still on their way, and
    ends the process (tests/steps/test_weighted_on_ranks.py, seen each time).

    dtype: the precision of the passes; skipped: names of tests that are left out (--skip_self_tests).
    """

    def __init__(self, trainer, dtype: torch.dtype, skipped=()):
        self.trainer, self.dtype, self.tolerance = trainer, dtype, TOLERANCES[dtype]
        self.tests = {name: test for name, test in TESTS.items() if name not in skipped}
        self.with_kernels = KERNELS not in skipped

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            return
        begin, model = time.perf_counter(), self.trainer.model_wrapped
        passed = [KERNELS] if self.with_kernels and self.check_kernels() else []
        if self.trainer.engine != engines.ZERO3:
            passed += self.check_passes(model)
        if passed:
            note(f"self-tests passed ({time.perf_counter() - begin:.1f} s): {', '.join(passed)}")

    def check_kernels(self) -> bool:
        """Compares kernels with plain torch, which takes the place of one that is wrong on any rank; whether there are any, all right."""
        sizes = kernels.Sizes.of(self.trainer.model)
        verdicts = gathered(kernels.check_all(self.trainer.args.device, self.dtype, sizes))
        for line in kernels.switch_off(verdicts):
            warn(f"{line}, and the run goes on - please report it, with the kernels in training.json")
        if verdicts and self.trainer.record is not None:
            # by name; what a wrong one has last stays
            self.trainer.record[KERNELS] = {one.kernel: one.as_record() for one in sorted(verdicts, key=lambda one: bool(one.why))}
        return bool(verdicts) and not any(one.why for one in verdicts)

    def check_passes(self, model) -> list[str]:
        """Runs the tests that take whole passes; their names."""
        model.eval()
        with torch.no_grad():
            for name, test in self.tests.items():
                self.compare(name, *test(samples_of(self.trainer), self.loss))
        return list(self.tests)

    def loss(self, *samples) -> float:
        """The sum of the token losses of (ids, labels) samples, packed into one row."""
        return self.trainer.loss_of(self.trainer.model_wrapped, pack([(ids.copy(), labels.copy()) for ids, labels in samples]), 1).item()

    def compare(self, name: str, one: float, other: float, what: str) -> None:
        if abs(one - other) <= self.tolerance * max(abs(one), abs(other)):
            return
        raise Failed(
            f"self-test {name}: {what} ({one:.6g} and {other:.6g}): the attention that runs here computes something else than "
            f"it should - bash tests/run.sh shows what fails; --skip_self_tests {name} starts without this test"
        )


def gathered(verdicts: list) -> list:
    """The verdicts of all ranks."""
    if not torch.distributed.is_initialized():
        return verdicts
    of_all = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, verdicts)
    return [verdict for of_one in of_all for verdict in of_one]


def samples_of(trainer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two samples of the first step, the same on all ranks, cut to LONGEST tokens; all of their tokens are labels."""
    longest = LONGEST["cpu" if trainer.args.device.type == "cpu" else "cuda"]
    members = [i for rank in trainer.plan.step(0, 0).passes for one in rank for i in one]
    chosen = (members * 2)[:2]
    return [(ids, ids) for ids in (trainer.samples[i][0][:longest] for i in chosen)]


def causality(samples, loss):
    """What comes later moves nothing before it."""
    ids, labels = samples[0]
    half = max(2, len(ids) // 2)
    labels = np.where(np.arange(len(ids)) < half, labels, -100)
    changed = ids.copy()
    changed[half:] = np.roll(ids, half)[half:]
    changed[-1] = ids[0]
    return loss((ids, labels)), loss((changed, labels)), "other words at the end of a sample change the loss of its beginning"


def packing(samples, loss):
    """Samples that lie in one row do not see each other: not even a sample its own copy, which would tell it everything."""
    one, other = samples
    together = loss(one, other, one)
    return together, 2 * loss(one) + loss(other), "samples have another loss packed in a row than one by one"


KERNELS = "kernels"  # the name of what check_kernels() does
TESTS = {"causality": causality, "packing": packing}
