"""Packing against the definition, written out by hand."""

import numpy as np
import torch
from accelerate.data_loader import skip_first_batches

from finetune.steps.batches import pack, step_loader
from finetune.steps.plan import Plan


def row(ids, labels):
    return np.array(ids, np.int32), np.array(labels, np.int32)


def test_pack_by_hand():
    batch = pack([row([5, 6, 7], [5, -100, 7]), row([8, 9], [8, 9]), row([4], [4])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 6]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    # the labels at positions 0, 3 and 5 open their samples: nothing of the same sample stands before them
    assert batch["logits_to_keep"].tolist() == [1, 3]
    assert batch["shift_labels"].tolist() == [[7, 9]]


def test_packing_leaves_the_samples_as_they_are():
    sample = row([5, 6], [5, 6])
    pack([sample, sample])
    assert sample[1].tolist() == [5, 6]


def test_no_samples_make_a_row_that_supervises_nothing():
    batch = pack([])
    assert batch["input_ids"].shape == (1, 1) and batch["shift_labels"].shape == (1, 0)


def test_weights_are_those_of_the_targets():
    """Of a row that mixes samples with weights and without; position 0 is no target, whatever it weighs."""
    samples = [row([5, 6, 7], [5, -100, 7]), row([8, 9], [8, 9]), row([1, 2, 3], [-100, 2, 3])]
    batch = pack(samples, [np.float32([9, 8, 0.3]), None, np.float32([0.1, 0.2, 4])])
    assert batch["shift_labels"].tolist() == [[7, 9, 2, 3]]
    assert batch["shift_weights"].dtype == torch.float32
    assert batch["shift_weights"].tolist() == [np.float32([0.3, 1, 0.2, 4]).tolist()]


def test_a_row_of_samples_without_weights_has_none():
    samples = [row([5, 6, 7], [5, -100, 7]), row([8, 9], [8, 9])]
    assert "shift_weights" not in pack(samples, [None, None]) and "shift_weights" not in pack([], [])
    assert pack(samples, [None, None]).keys() == pack(samples).keys()


class Listed(list):
    """Samples in memory, with the interface of finetune/samples'; every fifth weighs 0.5."""

    def token_weights(self, i):
        return None if i % 5 else np.full(2, 0.5, np.float32)


def loader_of(count=10, per_step=3):
    samples = Listed(row([i, i], [i, i]) for i in range(count))
    weights = np.array([1.0 if i % 5 else 0.5 for i in range(count)])
    plan = Plan(np.full(count, 2), np.full(count, 1), weights=weights, samples_per_step=per_step, max_tokens_per_pass=4)
    return step_loader(samples, plan), plan


def test_loader_yields_the_steps_of_its_epoch():
    loader, plan = loader_of()
    loader.batch_sampler.epoch = 3
    for index, batch in enumerate(loader):
        step = plan.step(3, index)
        for name in ("samples", "tokens", "supervised_tokens", "loss_weight"):
            assert getattr(batch, name) == getattr(step, name), name
        weights = [one["shift_weights"].tolist()[0] for one in batch.rows if "shift_weights" in one]
        members = [one for one in step.passes[0] if any(i % 5 == 0 for i in one)]
        assert weights == [[1.0 if i % 5 else 0.5 for i in one] for one in members]
        assert [one["input_ids"][0, ::2].tolist() for one in batch.rows] == [
            list(members) for members in step.passes[0]
        ]
    assert index == 3


def test_skipping_steps_reads_no_sample():
    loader, plan = loader_of()
    read = []

    class Counted(Listed):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    loader.dataset.samples = Counted(loader.dataset.samples)
    rest = list(skip_first_batches(loader, 3))
    assert len(rest) == 1 and len(read) == plan.step(0, 3).samples == 1
