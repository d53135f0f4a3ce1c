"""The best checkpoint is the one with the least, what was delivered is said, and a run that gets no better stops."""

import pytest
from trainers import Samples, make_trainer

from finetune.lifecycle import best

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def trainer_with(folder, values, patience=None, **settings):
    """A trainer whose evaluations find these perplexities, and losses that say the opposite."""
    stops = [best.StopEarly("eval_perplexity", patience)] if patience else []
    trainer = make_trainer(folder, eval_samples=Samples(4, seed=5), callbacks=stops, **EVALUATED, **settings)
    usual, left = trainer.evaluation_loop, iter(values)

    def evaluation_loop(*args, **kwargs):
        found, value = usual(*args, **kwargs), next(left)
        found.metrics.update(eval_perplexity=value, eval_loss=100 - value, eval_token_accuracy=value / 10)
        return found

    trainer.evaluation_loop = evaluation_loop
    return trainer


def test_it_stops_when_none_gets_better(tmp_path, capsys):
    trainer = trainer_with(tmp_path, [9.0, 5.0, 7.0, 5.0, 4.0, 3.0], patience=2)
    trainer.train()
    assert trainer.state.global_step == 4
    said = capsys.readouterr().err
    assert "stopping early behind step 4: the last 2 evaluations were no better than that of step 2 (perplexity 5.0000)" in said
    state = trainer.state
    training = type("Training", (), {"early_stopping_patience": 2, "metric_for_best_model": "perplexity"})
    assert best.stopped_early(state.log_history, training)
    training.early_stopping_patience = 3
    assert not best.stopped_early(state.log_history, training)


def test_patience_survives_a_resume(tmp_path):
    first = trainer_with(tmp_path, [5.0, 7.0, 7.0], max_steps=3)
    first.train()
    second = trainer_with(tmp_path, [8.0, 1.0, 1.0], patience=3)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.state.global_step == 4


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_delivered(tmp_path, asked):
    trainer = trainer_with(
        tmp_path, [9.0, 5.0, 7.0, 8.0, 8.0, 6.0], load_best_model_at_end=asked, metric_for_best_model="perplexity",
        greater_is_better=False, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    told, said = best.delivered(trainer.state, trainer.args), best.describe_delivered(trainer.state, trainer.args)
    assert "checkpoint-6" in kept, "a run that is killed now goes on from here"
    if asked:
        assert told == {"which": "best", "step": 2, "eval_loss": 95.0, "eval_perplexity": 5.0, "eval_token_accuracy": 0.5} and "checkpoint-2" in kept
        assert said == "delivered: the best step, 2 of 6 (perplexity 5.0000)"
    else:
        assert told == {"which": "last", "step": 6, "eval_loss": 94.0, "eval_perplexity": 6.0, "eval_token_accuracy": 0.6}
        assert said.startswith("delivered: the last step, 6 of 6 (perplexity 6.0000); step 2 was better (perplexity 5.0000): ")


def test_of_accuracy_the_most_is_the_best(tmp_path):
    training = type("Training", (), {"early_stopping_patience": 2, "metric_for_best_model": "token_accuracy"})
    log = [{"step": step, "eval_token_accuracy": value} for step, value in enumerate([0.2, 0.6, 0.5, 0.6], start=1)]
    assert best.since_best(log, "eval_token_accuracy") == (2, log[1]) and best.stopped_early(log, training)
    assert best.in_words("eval_token_accuracy", 0.6) == "token accuracy 0.6000"


def test_without_evaluation(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert best.delivered(trainer.state, trainer.args) == {"which": "last", "step": 6}
    assert best.describe_delivered(trainer.state, trainer.args) == "delivered: the last step, 6 of 6"
