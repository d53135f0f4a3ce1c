"""Findings about the output folder: what it must not be, what a run goes on from there, and whether the disk has room."""

from collections import namedtuple

import pytest
from command_lines import (
    found,
    only,
    read,
    write_adapter,
    write_checkpoint,
)

from finetune.errors import UserError
from finetune.flags import checks, definitions
from finetune.steps import preparation


def test_output_over_an_input(world, tmp_path):
    assert "is the folder of --model_name_or_path" in only(world, "-o", str(world.model), "--overwrite_output_dir")
    assert "is the folder of --model_name_or_path" in only(world, "-o", str(world.model / ".." / world.model.name))
    adapter = write_adapter(tmp_path / "adapter")
    line = only(world, "--use_lora", "--lora_weight_path", str(adapter), "-o", str(adapter))
    assert "is the folder of --lora_weight_path" in line


def test_output_that_cannot_be_written(world, monkeypatch):
    assert only(world, "-o", str(world.data)).endswith("is a file - give a folder")
    assert "cannot be written to" in only(world, "-o", str(world.data / "below"))
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    assert f"{world.out.parent} cannot be written to" in only(world)


def test_output_that_is_a_link_to_nothing(world, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "link", tmp_path / "link" / "below"):
        line = only(world, "-o", str(out))
        assert line.startswith(f"--output_dir {out}: {tmp_path / 'link'} is a link to {tmp_path / 'nowhere'}, where nothing is - ")
    (tmp_path / "nowhere").mkdir()
    assert found(world, "-o", str(tmp_path / "link")) == []


def test_output_of_an_earlier_run(world):
    write_checkpoint(world.out / "checkpoint-9")
    write_checkpoint(world.out / "checkpoint-10")
    line = only(world)
    assert line.startswith(f"--output_dir {world.out}: has checkpoint-10 of another command (it has no training.json with the flags of its run) - ")
    assert "--resume_from_checkpoint auto" in line and "--overwrite_output_dir" in line
    assert found(world, "--overwrite_output_dir") == []
    assert found(world, "--resume_from_checkpoint", "auto") == []


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_output_that_holds_a_model(world, name):
    world.out.mkdir()
    (world.out / "notes.txt").write_text("mine")
    assert found(world) == []
    (world.out / name).write_text("{}")
    for flags in ([], ["--resume_from_checkpoint", "auto"]):
        assert only(world, *flags).startswith(f"--output_dir {world.out}: holds a finished model - ")
    assert found(world, "--overwrite_output_dir") == []


def test_no_checkpoint_to_resume_from(world):
    assert only(world, "--resume_from_checkpoint", "checkpoint-3").startswith(
        "--resume_from_checkpoint checkpoint-3: no "
    )
    line = only(world, "--resume_from_checkpoint", "True")
    assert line.startswith(f"--resume_from_checkpoint True: no checkpoint in {world.out} - ")
    assert found(world, "--resume_from_checkpoint", "auto") == []
    assert found(world, "--resume_from_checkpoint", "False") == []


def test_resuming_with_another_method(world):
    lora = write_checkpoint(world.out / "checkpoint-5", adapter={"r": 8})
    line = only(world, "--resume_from_checkpoint", str(lora))
    assert line.startswith(f"{lora} is LoRA r=8 alpha=16") and "this run is full-parameter - " in line
    line = only(world, "--resume_from_checkpoint", "auto", "--use_lora")
    assert "is LoRA r=8" in line and "this run is LoRA r=64" in line
    assert found(world, "--resume_from_checkpoint", "auto", "--use_lora", "--lora_r", "8") == []
    full = write_checkpoint(world.out / "checkpoint-6")
    line = only(world, "--resume_from_checkpoint", str(full), "--use_lora")
    assert line.startswith(f"{full} is full-parameter, this run is LoRA r=64")


def test_resuming_from_a_hubs_model_that_is_not_here_yet(world):
    """Its layers are not known before it is downloaded: then it is checked again. Another method is told at once."""
    write_checkpoint(world.out / "checkpoint-5", adapter={"r": 64})
    flags = ["-m", "Qwen/Qwen-7B-Chat", "--resume_from_checkpoint", "auto"]
    assert found(world, *flags, "--use_lora") == []
    assert "this run is full-parameter" in only(world, *flags)
    here = definitions.on_folder(read(world, *flags, "--use_lora", "--lora_r", "8"), world.model)
    with pytest.raises(UserError, match="this run is LoRA r=8"):
        checks.check_flags(here)


def test_a_hubs_run_goes_on(world, monkeypatch):
    """The whole way of preparation, with a hub that only has this model."""
    write_checkpoint(world.out / "checkpoint-2", adapter={"r": 64})
    monkeypatch.setattr("finetune.folders.hub.fetch", lambda name, cache_dir=None: world.model)
    args = read(world, "-m", "Qwen/Qwen-7B-Chat", "--resume_from_checkpoint", "auto", "--use_lora")
    assert preparation.check_and_download(args) == world.model


# ---- room on the disk

PARAMETERS = 300 * 32 * 2 + 3 * 32 + 96 * 32 + 96 + 32 * 32 + 2 * 48 * 32 + 32 * 48
LORA_PARAMETERS = 64 * ((96 + 32) + (32 + 32) + 2 * (48 + 32) + (32 + 48))


def beside(world) -> int:
    """Bytes of the tokenizer and the settings, which lie in a checkpoint, too."""
    return sum(path.stat().st_size for path in world.model.iterdir() if path.suffix != ".safetensors")


def with_room(monkeypatch, free: int) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))


@pytest.mark.parametrize(
    "flags, needed",
    [
        (["--bf16"], PARAMETERS * (4 + 8) + PARAMETERS * 2),  # float32 weights and two moments; the result in bfloat16
        ([], PARAMETERS * (4 + 8) + PARAMETERS * 4),
        (["--save_strategy", "no"], PARAMETERS * 4),
        (["--save_only_model"], PARAMETERS * 4 * 2),
        (["--use_lora", "--bf16"], LORA_PARAMETERS * (4 + 8) + LORA_PARAMETERS * 4),
        (
            ["--use_lora", "--train_embeddings", "all"],
            (LORA_PARAMETERS + 2 * 300 * 32) * (4 + 8) + (LORA_PARAMETERS + 2 * 300 * 32) * 4,
        ),
        (
            ["--use_lora", "--init_lora_weights", "pissa", "--lora_dropout", "0"],
            LORA_PARAMETERS * (4 + 8) + 2 * LORA_PARAMETERS * 4,
        ),
        (["--bf16", "--deepspeed", "ds_config_zero2.json"], PARAMETERS * (2 * 4 + 8) + PARAMETERS * 2),
        (
            ["--bf16", "--bf16_weights", "--optim", "adamw_torch_8bit"],
            PARAMETERS * (2 + 2) + PARAMETERS * 2,
        ),
    ],
)
def test_too_little_room(world, monkeypatch, flags, needed):
    monkeypatch.setenv("CC", "cc")  # torchao's optimizers ask for a compiler
    needed += (1 if "no" in flags else 2) * beside(world)
    with_room(monkeypatch, needed)
    assert found(world, *flags) == []
    with_room(monkeypatch, needed - 1)
    assert only(world, *flags).startswith(f"--output_dir {world.out}: too little room (a checkpoint takes about ")


def test_little_room_is_warned_of(world, monkeypatch, capsys):
    checkpoint, result = PARAMETERS * 12 + beside(world), PARAMETERS * 4 + beside(world)
    with_room(monkeypatch, 6 * checkpoint + result)
    assert found(world, "--save_total_limit", "5") == []
    assert "may not last" not in capsys.readouterr().err
    with_room(monkeypatch, 6 * checkpoint + result - 1)
    assert found(world, "--save_total_limit", "5") == []
    assert "with --save_total_limit 5 that may not last" in capsys.readouterr().err
