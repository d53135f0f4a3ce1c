"""Every value that a flag takes has a rule, and what breaks it is one line before anything is loaded."""

import dataclasses
import math
import re
from typing import get_origin, get_type_hints

import pytest
from command_lines import found, only
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from finetune.flags import training_values, values
from finetune.flags.definitions import DataArguments, LookArguments, LoraArguments, ModelArguments
from finetune.flags.parser import one_type
from finetune.flags.training_args import TrainingArguments

KINDS = (ModelArguments, DataArguments, LoraArguments, LookArguments, TrainingArguments)
# text that may be anything: names, folders, services, and what other checks read
FREE = {
    "model_name_or_path", "lora_weight_path", "html", "output_dir", "resume_from_checkpoint", "logging_dir", "cache_dir", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_token", "hub_model_id", "hub_revision",
    "metric_for_best_model", "optim_args", "optim_target_modules", "lora_bias", "init_lora_weights", "max_tokens_per_pass",
    "gradient_checkpointing", "fsdp", "fsdp_config", "deepspeed", "accelerator_config", "torch_compile_backend", "ddp_backend", "debug",
    "include_num_input_tokens_seen", "stop_after",
}  # fmt: skip


def flags_of(*types) -> set[str]:
    """The flags of a type."""
    return {
        field.name
        for kind in KINDS
        for field in dataclasses.fields(kind)
        if field.init and one_type(get_type_hints(kind)[field.name]) in types
    }


def test_every_number_has_a_rule():
    assert flags_of(int, float) == {*values.NUMBERS} - {"max_tokens_per_pass"}


def test_every_text_has_its_words_or_may_be_anything():
    known = {*values.WORDS, *values.OBJECTS, *training_values.NO_EFFECT, *training_values.REFUSED}
    enums = (IntervalStrategy, HubStrategy)
    listed = {field.name for field in dataclasses.fields(TrainingArguments) if "choices" in field.metadata}  # the parser knows these
    assert flags_of(str, *enums) - FREE - listed <= known, flags_of(str, *enums) - FREE - listed - known
    for kind in KINDS:
        for field in dataclasses.fields(kind):
            if field.init and get_origin(one_type(get_type_hints(kind)[field.name])) is dict:
                assert field.name in known | FREE, field.name


@pytest.mark.parametrize("flag, kind", [
    ("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType), ("eval_strategy", IntervalStrategy),
    ("logging_strategy", IntervalStrategy), ("save_strategy", SaveStrategy), ("hub_strategy", HubStrategy),
])  # fmt: skip
def test_words_are_those_of_transformers(flag, kind):
    assert {choice.value for choice in kind} == {*values.WORDS[flag]}


def test_defaults_are_allowed():
    for kind in KINDS:
        for field in dataclasses.fields(kind):
            if field.name in values.NUMBERS and field.default not in (None, "auto"):
                assert values.NUMBERS[field.name].allows(field.default), field.name


@pytest.mark.parametrize("name", sorted(values.NUMBERS))
def test_no_number_takes_what_is_not_finite_or_below_it(world, name):
    """One line each, and no exception on the way; --max_tokens_per_pass and whole numbers are refused by their type."""
    more = ["--use_lora"] if name in values.OF_LORA else ["--dry_run"] if name in values.OF_LOOK else []
    for value in ("inf", "nan", "-2", "1e400"):
        lines = found(world, *more, f"--{name}", value)
        assert lines and lines[0].startswith(f"--{name}"), (value, lines)
        assert all(len(line) < 300 and "\n" not in line for line in lines)


@pytest.mark.parametrize("flags", [
    "--num_train_epochs inf", "--save_steps inf", "--logging_steps inf", "--eval_steps nan", "--data_seed -1", "--adam_epsilon nan",
    "--adam_epsilon 0", "--eval_delay -1", "--learning_rate inf", "--max_grad_norm nan", "--weight_decay inf", "--warmup_steps -1",
    "--warmup_steps 2.5", "--save_steps 7.5", "--ddp_timeout 0", "--dataloader_num_workers -1", "--max_steps -2", "--seed 4294967296",
    "--save_total_limit -1", "--per_device_train_batch_size 9999999999", "--model_max_length 99999999999999999999",
])  # fmt: skip
def test_numbers_that_were_taken_or_broke(world, flags):
    name, value = flags.split()
    assert re.match(rf"{name} {value}(\.0)?: out of range - give ", only(world, name, value))


@pytest.mark.parametrize("flags", ["--warmup_steps 0.5", "--warmup_steps 3", "--save_steps 0.25", "--max_steps 1", "--eval_delay 2"])
def test_numbers_that_are_right(world, flags):
    assert found(world, *flags.split()) == []


def test_rules_in_words():
    assert values.SHARE.words() == "a value from 0 up to, not including, 1"
    assert values.NOT_NEGATIVE.words() == "a value at least 0, and no infinite one"
    assert values.Number(0, 5, above=True).words() == "a value above 0 and below 5"
    assert not values.NOT_NEGATIVE.allows(math.nan) and not values.NOT_NEGATIVE.allows(math.inf)


def test_an_output_folder_without_a_name(world):
    assert found(world, "-o", "") == found(world, "--output_dir", " ") == ['--output_dir "": is empty - give a folder']


@pytest.mark.parametrize("flags, line", [
    ("--optim adamw", "--optim adamw: unknown - did you mean adamw_torch?"),
    ("--optim adamw_troch", "--optim adamw_troch: unknown - did you mean adamw_torch or "),
    ("--optim zzz", "--optim zzz: unknown - give adamw_torch, adamw_torch_fused, "),
    ("--lr_scheduler_type cosine_annealing", "--lr_scheduler_type cosine_annealing: unknown - did you mean cosine?"),
    ("--lr_scheduler_type cosin", "--lr_scheduler_type cosin: unknown - did you mean cosine?"),
    ("--save_strategy epochs", "--save_strategy epochs: unknown - did you mean epoch?"),
    ("--save_strategy x", "--save_strategy x: unknown - give no, steps, epoch, best"),
    ("--log_level loud", "--log_level: invalid choice: 'loud' (choose from"),
    ("--lr_scheduler_kwargs {", "--lr_scheduler_kwargs {: is not JSON ("),
    ("--lr_scheduler_kwargs [1]", "--lr_scheduler_kwargs [1]: is no JSON object - give one, as "),
    ("--activation_checkpointing_kwargs {\"use_reentrent\":1}", "--activation_checkpointing_kwargs: use_reentrent is nothing that "),
    ("--lr_scheduler_kwargs " + "[" * 100_000, "--lr_scheduler_kwargs [[["),
])  # fmt: skip
def test_words_and_objects(world, flags, line):
    told = only(world, *flags.split(" ", 1))
    assert told.startswith(line) and len(told) < 400
