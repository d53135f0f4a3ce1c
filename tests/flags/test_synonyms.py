"""Other programs' names for our flags lead to ours; every target is one."""

import dataclasses
import re

import pytest
from command_lines import only

from finetune.flags import args as arguments
from finetune.flags import synonyms, values
from finetune.flags.definitions import DataArguments, LookArguments, LoraArguments, ModelArguments
from finetune.flags.training_args import TrainingArguments

KINDS = (ModelArguments, DataArguments, LoraArguments, LookArguments, TrainingArguments)
OURS = {field.name for kind in KINDS for field in dataclasses.fields(kind) if field.init}


def test_every_target_is_a_flag():
    for name, target in synonyms.FLAGS.items():
        named = re.findall(r"--(\w+)", target)
        assert named or target.startswith("nothing: "), name
        assert {*named} <= OURS, (name, target)


def test_no_entry_is_a_flag_itself():
    assert not OURS & {*synonyms.FLAGS} and not {*arguments.OLD_FLAGS} & {*synonyms.FLAGS}


def test_every_word_leads_to_one_of_the_flag():
    for flag, words in synonyms.WORDS.items():
        assert {*words.values()} <= {*values.WORDS[flag]} and not {*words} & {*values.WORDS[flag]}, flag


@pytest.mark.parametrize("flags, advice", [
    ("--lr 1e-4", "did you mean --learning_rate?"),
    ("--LR=1e-4", "did you mean --learning_rate?"),
    ("--lora_rank 8", "did you mean --lora_r?"),
    ("--lora-rank 8", "did you mean --lora_r?"),
    ("--dataset x.json", "did you mean --data_path?"),
    ("--cutoff_len 512", "did you mean --model_max_length?"),
    ("--max_seq_length 512", "did you mean --model_max_length?"),
    ("--num_epochs 3", "did you mean --num_train_epochs?"),
    ("--micro_batch_size 2", "did you mean --per_device_train_batch_size?"),
    ("--model Qwen", "did you mean --model_name_or_path?"),
    ("--output out", "did you mean --output_dir?"),
    ("--lora_target all", "did you mean --lora_target_modules?"),
    ("--min_lr -1", "here it is --lr_scheduler_type cosine_with_min_lr"),
    ("--finetuning_type lora", "here it is --use_lora for LoRA; without it all parameters are trained"),
    ("--packing", "leave it out: samples are always packed, and --max_tokens_per_pass says how many tokens lie in a pass"),
    ("--eval_stratgy no", "did you mean --eval_strategy?"),
    ("--evaluation_stratgy no", "did you mean --eval_strategy?"),
    ("--per_gpu_train_batch_sizes 1", "did you mean --per_device_train_batch_size?"),
])  # fmt: skip
def test_what_people_mean(world, flags, advice):
    name = re.split("[ =]", flags)[0]
    expected = f"{name}: unknown flag - {advice}"
    assert only(world, *flags.split()) == expected
