"""The flags of the best checkpoint and of stopping: what they mean together, and what cannot be."""

import pytest
from command_lines import only

from finetune.flags import args as arguments
from finetune.flags import training_values

EVALUATED = ["--eval_data_path", "e.json", "--eval_strategy", "steps", "--eval_steps", "20"]


def training_of(*words):
    args = arguments.parse([*EVALUATED, *words])
    assert not args.findings, args.findings
    return args.training


@pytest.mark.parametrize("metric", [None, "loss", "eval_loss", "perplexity", "eval_perplexity"])
def test_less_is_better(metric):
    """transformers takes a perplexity for something of which more is better."""
    given = ["--metric_for_best_model", metric] if metric else []
    training = training_of("--load_best_model_at_end", *given)
    assert training.greater_is_better is False
    assert training.metric_for_best_model == (metric or "loss").removeprefix("eval_")


def test_of_accuracy_more_is_better():
    training = training_of("--load_best_model_at_end", "--metric_for_best_model", "eval_token_accuracy")
    assert training.greater_is_better is True and training.metric_for_best_model == "token_accuracy"


def test_checkpoints_are_written_where_is_evaluated():
    training = training_of("--load_best_model_at_end")
    assert (training.save_strategy, training.save_steps) == ("steps", 20)
    training = training_of("--load_best_model_at_end", "--eval_strategy", "epoch")
    assert (training.save_strategy, training.eval_strategy) == ("epoch", "epoch")
    assert training_of("--save_steps", "7").save_steps == 7


@pytest.mark.parametrize("given", [["--save_steps", "1000"], ["--save_steps", "7"], ["--save_strategy", "epoch"], ["--save_strategy", "no"]], ids=" ".join)
def test_and_there_alone(given, capsys):
    """The scripts' 1000 steps are more than most runs have: nothing was there to be delivered, and the last step was, in silence."""
    training = training_of("--load_best_model_at_end", "--save_strategy", "steps", *given)
    assert (training.save_strategy, training.save_steps) == ("steps", 20)
    shown = " ".join(given)
    said = f"note: --load_best_model_at_end: a checkpoint is written at each evaluation, which takes the place of {shown}\n"
    assert capsys.readouterr().err.count(said) == 1
    training_of("--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", "20")
    assert capsys.readouterr().err == ""


def test_the_best_alone_is_saved():
    training = training_of("--save_strategy", "best")
    assert (training.save_strategy, training.metric_for_best_model) == ("best", "loss")


def test_patience_delivers_the_best():
    training = training_of("--early_stopping_patience", "3")
    assert training.load_best_model_at_end and training.early_stopping_patience == 3


@pytest.mark.parametrize(
    "words, line",
    [
        ("--metric_for_best_model accuracy", "--metric_for_best_model accuracy: no evaluation has it - give loss, perplexity, token_accuracy"),
        ("--greater_is_better True", "--greater_is_better True: of loss less is better - leave it out"),
        (
            "--metric_for_best_model token_accuracy --greater_is_better False",
            "--greater_is_better False: of token_accuracy more is better - leave it out",
        ),
        ("--early_stopping_patience 2", "--early_stopping_patience: nothing is evaluated - give --eval_data_path"),
        ("--load_best_model_at_end", "--load_best_model_at_end: nothing is evaluated - give --eval_data_path"),
        ("--save_strategy best", "--save_strategy best: nothing is evaluated - give --eval_data_path"),
        ("--stop_after soon", "--stop_after soon: is no time - give for example 3h50m"),
        ("--stop_after 0h", "--stop_after 0h: is no time"),
    ],
)
def test_what_cannot_be(world, words, line):
    assert only(world, *words.split()).startswith(line)


def test_a_patience_of_none(world):
    found = arguments.parse([*EVALUATED, "--early_stopping_patience", "0"]).findings
    assert found == ["--early_stopping_patience 0: out of range - give how many evaluations in a row may be no better, as 3"]


@pytest.mark.parametrize(
    "text, seconds",
    [("3h50m", 13800), ("90m", 5400), ("300s", 300), ("300", 300), ("1h", 3600), ("2h30min", 9000), ("1h1m1s", 3661)],
)
def test_times(text, seconds):
    assert training_values.seconds_of(text) == seconds
