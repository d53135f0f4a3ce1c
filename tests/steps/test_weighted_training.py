"""Training and evaluating on samples whose tokens weigh, against a loop over the samples with sums in float64."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_model
from trainers import Samples, losses, make_trainer

IGNORE = -100


class Weighted(Samples):
    """Tokens of every second sample weigh from nearly nothing to 5; of the others 1."""

    def __init__(self, count=20, seed=0, constant=None):
        super().__init__(count, seed)
        generator = np.random.default_rng(seed)
        self.weights = [
            None if i % 2 else generator.uniform(1e-3, 5, len(ids)).astype(np.float32) for i, (ids, _) in enumerate(self.rows)
        ]
        if constant is not None:
            self.weights = [np.full(len(ids), constant, np.float32) for ids, _ in self.rows]
        self.weight_sums = np.array([self.of_targets(i).sum(dtype=np.float64) for i in range(count)])

    def token_weights(self, i):
        return self.weights[i]

    def of_targets(self, i):
        ids, labels = self.rows[i]
        weights = np.ones(len(ids), np.float32) if self.weights[i] is None else self.weights[i]
        return weights[1:][labels[1:] != IGNORE]


def weighted_sum(model, samples, i):
    """Sum of w times loss over the targets of a sample, from plain logits."""
    ids, labels = (torch.from_numpy(values.astype(np.int64)) for values in samples[i])
    log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    places = (labels[1:] != IGNORE).nonzero().flatten()
    weights = torch.from_numpy(samples.of_targets(i)).double()
    return -(weights * log_p[places, labels[1:][places]]).sum()


def by_hand(trainer, samples, rate: float) -> list[float]:
    """Two epochs with plain SGD, a sample at a time: not Adam, which hides gradients of a wrong scale."""
    model, found = tiny_model().train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for epoch in range(2):
        order = trainer.plan.order(epoch)
        for begin in range(0, len(order), 8):
            members = order[begin : begin + 8]
            weight = sum(float(samples.of_targets(i).sum(dtype=np.float64)) for i in members)
            parts = [weighted_sum(model, samples, i) / weight for i in members]
            sum(parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(sum(parts).item())
    return found


SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}


@pytest.mark.parametrize("max_tokens_per_pass", [60, 10_000])
def test_equals_a_loop_written_by_hand(tmp_path, max_tokens_per_pass):
    samples = Weighted()
    trainer = make_trainer(tmp_path, samples=samples, max_tokens_per_pass=max_tokens_per_pass, **SGD)
    trainer.train()
    expected = by_hand(trainer, samples, 0.1)
    assert losses(trainer) == pytest.approx(expected, rel=2e-5)
    assert expected[0] - expected[3] > 0.05  # it learns
    plain = make_trainer(tmp_path, max_tokens_per_pass=max_tokens_per_pass, **SGD)
    plain.train()
    assert losses(trainer) != pytest.approx(losses(plain), rel=1e-3)


def test_weights_of_one_are_no_weights(tmp_path):
    runs = [make_trainer(tmp_path, samples=samples) for samples in (Weighted(constant=1), Samples())]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == losses(runs[1])
    assert all(torch.equal(*pair) for pair in zip(*(trainer.model.parameters() for trainer in runs)))


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}], ids=["float32", "fp16", "bf16"])
@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_the_unit_of_the_weights_is_nothing(tmp_path, precision, unit):
    runs = [make_trainer(tmp_path, samples=samples, **SGD, **precision) for samples in (Weighted(constant=unit), Samples())]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5 if not precision else 1e-3)


def test_evaluation_is_the_weighted_mean(tmp_path):
    held_out = Weighted(12, seed=9)
    trainer = make_trainer(tmp_path, eval_samples=held_out, eval_strategy="epoch")
    trainer.train()
    logged = [line for line in trainer.state.log_history if "eval_loss" in line]
    trainer.model.eval()
    with torch.no_grad():
        total = sum(weighted_sum(trainer.model, held_out, i).item() for i in range(12))
    weight = sum(float(held_out.of_targets(i).sum(dtype=np.float64)) for i in range(12))
    assert logged[-1]["eval_loss"] == pytest.approx(total / weight, rel=1e-5)
    assert logged[-1]["eval_perplexity"] == pytest.approx(math.exp(logged[-1]["eval_loss"]))
    assert logged[-1]["eval_supervised_tokens"] == held_out.supervised.sum() != round(weight)


def test_where_nothing_counts_nobody_divides_by_zero(tmp_path):
    """Which the reader of the data refuses before: it would be our mistake."""
    with pytest.raises(AssertionError, match="a step in which nothing is learned"):
        make_trainer(tmp_path, samples=Weighted(constant=0)).train()
    trainer = make_trainer(tmp_path, eval_samples=Weighted(5, constant=0))
    with pytest.raises(AssertionError, match="evaluation data of which nothing counts"):
        trainer.evaluate()
