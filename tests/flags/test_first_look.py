"""The first look finds what check_flags() finds, without torch; says each line once; and reads the beginning of large files."""

import json

import pytest
from command_lines import read, write_config

from finetune.compat import on_transformers
from finetune.conversations import reading
from finetune.errors import UserError, note
from finetune.flags import checks, first_look

GOOD = {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
BAD = {"conversations": [{"from": "user", "value": "a"}, {"from": "narrator", "value": "b"}]}


def usual(world, *flags: str) -> list[str]:
    words = ["--model_name_or_path", world.model, "--data_path", world.data, "--output_dir", world.out]
    return [*map(str, words), "--model_max_length", "64", *flags]


def seen(world, *flags: str, alone: bool = True) -> list[str]:
    try:
        first_look.take(usual(world, *flags), alone)
    except UserError as error:
        return error.findings
    return []


@pytest.mark.parametrize("flags", [
    ["--use_lora"], ["--lora_r", "0", "--use_lora"], ["--use_lorra"], ["-m", "nowhere"], ["-d", "nowhere.json"], ["word"],
    ["--eval_data_path", "nowhere.json"], ["--deepspeed", "nowhere.json"], ["--deepspeed", "ds_config_zero2.json", "--fsdp", "True"],
    ["--fsdp"], ["--bf16", "--fp16"], ["--gradient_checkpointing", "maybe"], ["--max_tokens_per_pass", "many"],
    ["--lora_weight_path", "nowhere", "--use_lora"], ["--q_lora"], ["--resume_from_checkpoint", "nowhere"], ["--debug", "a", "b"],
    ["--label_smoothing_factor", "0.1"], ["--neftune_noise_alpha", "5"], ["--adafactor"], ["--optim", "adamw_8bit"],
    ["--lora_target_modules", "nothing", "--use_lora", "--bf16_weights"],
], ids=" ".join)  # fmt: skip
def test_it_finds_what_the_checks_find(world, flags):
    """But for --debug, whose words only transformers knows."""
    if flags == ["--debug", "a", "b"]:
        assert seen(world, *flags) == []
        return
    with pytest.MonkeyPatch.context() as patch:  # the rest of the checks, alone
        patch.setattr(checks, "LATER", ())
        try:
            checks.check_flags(read(world, *flags))
            wanted = []
        except UserError as error:
            wanted = error.findings
    assert seen(world, *flags) == wanted


@pytest.mark.parametrize("changes", [
    {"kv_channels": 7}, {"rotary_pct": 0.25}, {"hidden_size": None}, {"bf16": True, "fp16": True},
], ids=str)  # fmt: skip
def test_values_that_only_the_config_class_checks_come_later(world, changes):
    write_config(world.model, **changes)
    assert seen(world) == []
    with pytest.raises(UserError) as refused:
        checks.check_flags(read(world))
    assert len(refused.value.findings) == 1 and "take the file of the published checkpoint" in refused.value.findings[0]


def test_an_unknown_model_type_is_told_without_the_import(world):
    write_config(world.model, model_type="quen")
    assert 'model_type "quen", which transformers does not know' in seen(world)[0]
    write_config(world.model, model_type="llama")
    assert "is of model type llama, and trained are" in seen(world)[0]


def test_without_the_names_of_flags_there_is_no_first_look(world, monkeypatch):
    monkeypatch.setattr(on_transformers, "source", lambda file: None)
    assert seen(world, "--use_lorra") == []


def test_a_wrong_value_ends_it_at_once(world):
    assert seen(world, "--lora_r", "x", "-m", "nowhere") == ["--lora_r: invalid int value: 'x' - python finetune.py --help explains the flag"]


def test_notes_are_said_where_it_ends(world, capsys):
    assert seen(world, "--lazy_preprocess", "True") == []
    assert capsys.readouterr().err == ""  # the checks that follow say it
    assert len(seen(world, "--lazy_preprocess", "True", "--use_ipex", "--use_lorra")) == 1
    printed = capsys.readouterr().err
    assert printed.count("--lazy_preprocess has no effect") == 1 and printed.count("--use_ipex has no effect") == 1
    note("what comes later is said")
    assert "what comes later" in capsys.readouterr().err


def test_several_processes_check_together_later(world):
    assert seen(world, "-m", "nowhere", "--use_lorra", alone=False) == []


def test_all_of_a_file_is_told_and_all_files(world):
    world.data.write_text(json.dumps([BAD, GOOD, BAD]))
    (world.data.parent / "eval.json").write_text(json.dumps([GOOD, BAD]))
    lines = seen(world, "--eval_data_path", "eval.json", "--eval_strategy", "epoch")
    assert [line.split(" turn")[0] for line in lines] == [f"{world.data}: sample 1", "eval.json: sample 2"]
    assert "sample 1 turn 2, sample 3 turn 2: role" in lines[0]


@pytest.mark.parametrize("layout", ["list", "lines"])
def test_of_a_large_file_it_reads_the_beginning(world, monkeypatch, layout):
    """The window that a file is read through is a megabyte."""
    monkeypatch.setattr(reading, "BEGINNING_BYTES", 1 << 20)
    long = {"conversations": [GOOD["conversations"][0], {"from": "assistant", "value": "word " * 100}]}
    write = json.dumps if layout == "list" else lambda samples: "\n".join(map(json.dumps, samples))
    world.data.write_text(write([long] * 10000 + [BAD]))
    assert seen(world) == []
    monkeypatch.setattr(reading, "BEGINNING_BYTES", 16 << 20)
    assert [line.split(" turn")[0].split(" (line")[0] for line in seen(world)] == [f"{world.data}: sample 10001"]
    monkeypatch.setattr(reading, "BEGINNING_BYTES", 1 << 20)
    assert len(seen(world, "-m", "nowhere")) == 2  # the program ends anyway: then all of it
