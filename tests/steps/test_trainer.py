"""The trainer against a loop written by hand: losses, learning rates, precision, resuming, evaluation."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_model
from trainers import Samples, losses, make_trainer, stop_after

from finetune.distributed.ranks import meeting
from finetune.steps import saving


def by_hand(model, trainer, learning_rates):
    """The same steps, sample by sample, with plain logits, plain cross-entropy and torch's AdamW."""
    model.train()
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2]
    others = [p for name, p in model.named_parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    found, step = [], 0
    for epoch in range(2):
        order = trainer.plan.order(epoch)
        for begin in range(0, len(order), 8):
            rows = [trainer.samples[i] for i in order[begin : begin + 8]]
            count = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
            optimizer.zero_grad()
            total = 0.0
            for ids, labels in rows:
                logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
                labels = torch.from_numpy(labels[1:].astype(np.int64))
                loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[step]
            optimizer.step()
            found.append(total)
            step += 1
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 2 epochs x 3 steps, in many passes."""
    trainer = make_trainer(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return trainer


def test_equals_a_loop_written_by_hand(straight):
    rates = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    expected = by_hand(tiny_model(), straight, rates)
    assert losses(straight) == pytest.approx(expected, rel=2e-5)


def test_layout_changes_no_loss(straight, tmp_path):
    one_pass = make_trainer(tmp_path, max_tokens_per_pass=10_000)
    one_pass.train()
    assert [len(one_pass.plan.step(0, 0).passes[0]), len(straight.plan.step(0, 0).passes[0])] == [1, 4]
    assert losses(one_pass) == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_the_learning_rate_is_the_asked_curve(tmp_path, kind):
    trainer = make_trainer(tmp_path, lr_scheduler_type=kind, warmup_steps=2)
    trainer.train()
    warm = [0.0, 0.5]  # of the rate each step was made with
    curve = {
        "cosine": [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)],
        "linear": [1 - k / 4 for k in range(4)],
        "constant_with_warmup": [1.0] * 4,
    }[kind]
    logged = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert logged == pytest.approx([1e-2 * factor for factor in warm + curve], abs=1e-9)


def test_log_has_the_figures(straight):
    line = straight.state.log_history[0]
    step = straight.plan.step(0, 0)
    assert line["tokens_per_second"] / line["supervised_tokens_per_second"] == pytest.approx(
        step.tokens / step.supervised_tokens, rel=0.01
    )
    assert 0.05 < line["memory_gb"] < 20
    assert json.dumps(line)


def test_a_line_counts_the_tokens_that_were_right(tmp_path):
    """Of the steps since the line before it, each by the weights that it began with; the same in one pass and in four, and resumed."""
    told, model = {}, tiny_model()
    make_trainer(tmp_path / "first", model=model, max_steps=12).train()  # random weights are never right
    for tokens in (10_000, 60):
        trainer = make_trainer(tmp_path / str(tokens), model=model, max_tokens_per_pass=tokens, logging_steps=2, learning_rate=0.0, warmup_steps=0)
        trainer.train()
        told[tokens] = [line["token_accuracy"] for line in trainer.state.log_history if "loss" in line]
    by_step = []
    with torch.no_grad():
        for index in range(trainer.plan.steps_per_epoch):
            members = [i for one in trainer.plan.step(0, index).passes[0] for i in one]
            rows = [[torch.from_numpy(part.astype(np.int64)) for part in trainer.samples[i]] for i in members]
            hits = sum((trainer.model(ids[None]).logits[0, :-1].argmax(-1) == labels[1:]).sum().item() for ids, labels in rows)
            by_step.append((hits, sum((labels[1:] != -100).sum().item() for _, labels in rows)))
    hits, tokens = (sum(some) for some in zip(*by_step[:2]))
    assert hits and told[60][0] == pytest.approx(hits / tokens, abs=1e-4) and told[60] == told[10_000] and len(told[60]) == 3


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_resuming_is_bit_equal(tmp_path, stop_at):
    """Stopped in the first epoch, between the two, and in the second; with dropout, so that random numbers count."""

    def make(folder, **settings):
        return make_trainer(folder, model=tiny_model(attn_dropout_prob=0.3, emb_dropout_prob=0.1), **settings)

    whole = make(tmp_path / "whole")
    whole.train()
    first = make(tmp_path / "parts", save_strategy="steps", save_steps=stop_at)
    stop_after(first, stop_at)
    first.train()
    second = make(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{stop_at}"))
    assert losses(second) == losses(whole)
    for a, b in zip(second.model.parameters(), whole.model.parameters()):
        assert torch.equal(a, b)


def test_evaluation_is_the_mean_over_supervised_tokens(tmp_path):
    held_out = Samples(12, seed=9)
    trainer = make_trainer(tmp_path, eval_samples=held_out, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    trainer.model.eval()
    total, right = 0.0, 0
    with torch.no_grad():
        for ids, labels in held_out.rows:
            logits = trainer.model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].double()
            labels = torch.from_numpy(labels[1:].astype(np.int64))
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
    assert logged[-1]["eval_loss"] == pytest.approx(total / held_out.supervised.sum(), rel=1e-5)
    assert logged[-1]["eval_perplexity"] == pytest.approx(math.exp(logged[-1]["eval_loss"]))
    assert logged[-1]["eval_token_accuracy"] == pytest.approx(right / held_out.supervised.sum(), abs=1e-4) and right
    assert logged[-1]["eval_supervised_tokens"] == held_out.supervised.sum()


def test_evaluating_changes_no_training(straight, tmp_path):
    trainer = make_trainer(tmp_path, eval_samples=Samples(5, seed=9), eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert losses(trainer) == losses(straight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32(straight, tmp_path, precision):
    trainer = make_trainer(tmp_path, **{precision: True})
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(straight), rel=0.02)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses(trainer) != losses(straight)  # the passes really were in half precision
    if precision == "fp16":
        assert trainer.accelerator.scaler.is_enabled()


def test_a_small_learning_rate_moves_the_weights_under_bf16(tmp_path):
    """1e-6 on a weight of 0.05 is a hundredth of bf16's spacing: lost without float32 masters."""
    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    make_trainer(tmp_path, model=model, bf16=True, learning_rate=1e-6).train()
    moved = (model.lm_head.weight.detach() - before).abs()
    assert (moved > 0).float().mean() > 0.9
    assert moved.max() < 1e-5


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1: the norm of its gradient is nan .*look at these samples"):
        make_trainer(tmp_path, model=model).train()


def test_checkpoints_are_whole_or_not_there(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    } <= files

    def fail(*args):
        raise OSError("disk full")

    again = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    monkeypatch.setattr(again, "_save_rng_state", fail)
    with pytest.raises(OSError, match="disk full"):
        again.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    """Best by the highest loss, so that it is not the last one."""
    trainer = make_trainer(
        tmp_path, eval_samples=Samples(12, seed=9), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    evaluations = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = max(evaluations, key=evaluations.get)
    assert best < 6 and trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], rel=1e-6)


def test_nobody_waits_inside_a_collective_while_a_model_is_written(tmp_path, monkeypatch):
    """Writing may take longer than --ddp_timeout: the ranks that do not write wait at the store."""
    waited, written = [], []
    monkeypatch.setattr(meeting, "wait", waited.append)
    monkeypatch.setattr(meeting, "exchange", lambda what, value: (waited.append(what), [value])[1])
    monkeypatch.setattr(saving, "save_final", lambda model, tokenizer, folder, **_: written.append(folder))
    trainer = make_trainer(tmp_path, num_train_epochs=1, save_strategy="epoch")
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: pytest.fail("a collective operation"))
    trainer.train()
    names = ["there is room for a checkpoint", "a model is written", "a checkpoint is written"]
    assert waited == [*names, "a checkpoint is in its place"]
    trainer.save_result()
    assert written == [tmp_path] and waited[4:] == ["the result is written"]
