"""What each flag means at a resume: every flag is in the table, and what changed is told by it."""

import dataclasses
import json

import pytest

from finetune.flags import args as arguments
from finetune.flags import going_on
from finetune.flags.definitions import DataArguments, LookArguments, LoraArguments, ModelArguments
from finetune.flags.training_args import TrainingArguments


def every_flag() -> set[str]:
    kinds = (ModelArguments, DataArguments, LoraArguments, LookArguments, TrainingArguments)
    return {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}


def test_every_flag_has_a_rule_and_every_rule_a_flag():
    flags = every_flag()
    assert not flags - going_on.RULES.keys(), "flags that are not in flags/going_on.py: RULES"
    assert not going_on.RULES.keys() - flags, "no flags, but in flags/going_on.py: RULES"


def test_each_flag_has_one_rule():
    source = (arguments.__file__.replace("args.py", "going_on.py"))
    lines = open(source).read().split("RULES = {")[1].split(".items()")[0]
    words = [word for block in lines.split('"""')[1::2] for word in block.split()]
    assert len(words) == len(set(words)) == len(going_on.RULES)
    assert going_on.SCHEDULE <= going_on.RULES.keys() and going_on.SECRETS <= going_on.RULES.keys()
    assert all(going_on.RULES[name] == going_on.APPLIED for name in going_on.SCHEDULE)


def given(*flags):
    return arguments.parse(["-m", "M", "-d", "D", *flags])


def changed(before: list[str], now: list[str], rule: str) -> list[str]:
    record = json.loads(json.dumps({"flags": going_on.flags_given(given(*before))}, allow_nan=False))
    return [str(change) for change in going_on.changes(record, given(*now), rule)]


@pytest.mark.parametrize("before, now, rule, expected", [
    ([], [], going_on.RUN, []),
    (["--lora_dropout", "0.1"], ["--lora_dropout", "0"], going_on.RUN, ["--lora_dropout: 0.1, now 0.0"]),
    (["--lora_dropout", "0.05"], [], going_on.RUN, []),  # its default
    (["--learning_rate", "1e-4"], [], going_on.APPLIED, ["--learning_rate: 0.0001, now 5e-05"]),
    ([], ["--max_grad_norm", "0.3", "--report_to", "tensorboard"], going_on.APPLIED, ["--max_grad_norm: 1.0, now 0.3"]),
    (["--seed", "3"], ["--seed", "3", "--data_seed", "3"], going_on.RUN, []),  # left out, it is the seed
    (["--seed", "3", "--data_seed", "4"], ["--seed", "3"], going_on.RUN, ["--data_seed: 4, now 3"]),
    (["--optim_args", "a=1"], [], going_on.RUN, ["--optim_args: a=1, now None"]),
])  # fmt: skip
def test_changes_are_told_by_their_rule(before, now, rule, expected):
    assert changed(before, now, rule) == expected


def test_an_older_record_says_nothing():
    assert going_on.changes({}, given("--learning_rate", "1"), going_on.APPLIED) == []


def test_a_flag_without_a_rule_is_part_of_the_run(monkeypatch):
    monkeypatch.delitem(going_on.RULES, "learning_rate")
    assert changed([], ["--learning_rate", "1"], going_on.RUN) == ["--learning_rate: 5e-05, now 1.0"]


def test_of_a_secret_only_that_it_was_given():
    assert "hf_1234" not in json.dumps(going_on.flags_given(given("--hub_token", "hf_1234")))
    assert going_on.flags_given(given("--hub_token", "hf_1234"))["hub_token"] == "given"


def test_numbers_that_json_cannot_hold_are_text():
    assert going_on.plain({"a": [float("inf"), 1.5]}) == {"a": ["inf", 1.5]}
