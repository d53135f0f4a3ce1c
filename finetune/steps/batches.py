"""From a planned step to the tensors of its forward passes: packed rows, no padding."""

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from qwen_model.chatml import IGNORE

from .plan import Plan


def pack(samples: list[tuple[np.ndarray, np.ndarray]], weights: list[np.ndarray | None] | None = None) -> dict:
    """One packed row of (ids, labels) samples, T tokens together, R of them predicted.

    weights: of each sample, what its tokens weigh in the loss (float32, one for each token), or None where that is 1.

    input_ids, position_ids (1, T); cu_seq_lens_q and _k int32: where each sample begins, and the end; bounds: the same as a
    list, for which no GPU has to be waited for; max_length_q and _k; logits_to_keep (R,): the positions from which a supervised
    token is predicted; shift_labels (1, R): those tokens; shift_weights (1, R) float32: what they weigh, where a sample of the row
    says so, and no key where none does.
    All names but bounds and shift_weights are transformers' own. The first token of a sample is never a target: what stands
    before it is another sample.
    No samples at all make a row of one token that supervises nothing, for a rank that must keep step with the others.
    """
    if not samples:
        samples = [(np.zeros(1, np.int32), np.full(1, IGNORE, np.int32))]
    lengths = np.array([len(ids) for ids, _ in samples])
    bounds = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
    labels = np.concatenate([labels for _, labels in samples])
    labels[bounds[:-1]] = IGNORE
    targets = np.flatnonzero(labels != IGNORE)
    cu_seq_lens, longest = torch.from_numpy(bounds), int(lengths.max())
    row = {
        "input_ids": torch.from_numpy(np.concatenate([ids for ids, _ in samples]).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "bounds": bounds.tolist(),
        "max_length_q": longest,
        "max_length_k": longest,
        "logits_to_keep": torch.from_numpy(targets - 1),
        "shift_labels": torch.from_numpy(labels[targets].astype(np.int64))[None],
    }
    if weights is not None and any(given is not None for given in weights):
        every = [np.ones(length) if given is None else given for length, given in zip(lengths, weights, strict=True)]
        row["shift_weights"] = torch.from_numpy(np.concatenate(every)[targets].astype(np.float32))[None]
    return row


class StepBatch:
    """What one rank does in one step: its packed rows, and the counts of the whole step over all ranks (see plan.Step)."""

    def __init__(self, rows: list[dict], samples: int, tokens: int, supervised_tokens: int, loss_weight: float):
        self.rows, self.samples, self.tokens = rows, samples, tokens
        self.supervised_tokens, self.loss_weight = supervised_tokens, loss_weight

    def pin_memory(self):
        """Called by DataLoader: page-locked rows travel to the GPU while it computes."""
        for row in self.rows:
            row.update({key: value.pin_memory() for key, value in row.items() if isinstance(value, torch.Tensor)})
        return self


class Steps(Dataset):
    """The plan's steps as a data set: item (epoch, index) is a StepBatch for `rank`."""

    def __init__(self, samples, plan: Plan, rank: int = 0):
        self.samples, self.plan, self.rank = samples, plan, rank

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __getitem__(self, key: tuple[int, int]) -> StepBatch:
        step = self.plan.step(*key)
        rows = [self.row(members) for members in step.passes[self.rank]]
        return StepBatch(rows, step.samples, step.tokens, step.supervised_tokens, step.loss_weight)

    def row(self, members: tuple[int, ...]) -> dict:
        """The samples of one pass, packed."""
        return pack([self.samples[i] for i in members], [self.samples.token_weights(i) for i in members])


class StepSampler(BatchSampler):
    """Names the steps of the current epoch. Skipping some (to resume) skips names, not work."""

    def __init__(self, plan: Plan):
        self.plan, self.epoch, self.batch_size, self.drop_last = plan, 0, 1, False

    def __iter__(self):
        return iter([[(self.epoch, index)] for index in range(self.plan.steps_per_epoch)])

    def __len__(self) -> int:
        return self.plan.steps_per_epoch


def only(items: list):
    """Collates the one item of a batch."""
    return items[0]


def step_loader(samples, plan: Plan, rank: int = 0, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """One item a step; its `batch_sampler.epoch` says which epoch."""
    return DataLoader(
        Steps(samples, plan, rank),
        batch_sampler=StepSampler(plan),
        collate_fn=only,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # torch's default would draw from the global generator at each epoch, and with it move dropout
        generator=torch.Generator().manual_seed(plan.seed),
    )
