"""What is found in the output folder before a run: whose it is, what is left to do, and what is missing there."""

# ruff: noqa: F401, F811  (fixtures that are imported)

import hashlib
import json
import os
import re

import pytest
from prepared import asked, base, leave_checkpoint, write_talks

from finetune.errors import UserError
from finetune.folders import output_folder
from finetune.lifecycle import resuming
from finetune.steps import preparation

# ---- of this run?


RECORD = {"base": {"fingerprint": {"sha256": "a" * 64}}, "data": {"fingerprint": "b" * 64}, "samples_per_step": 16, "seed": 1}
METHOD = {"use_lora": True, "train_embeddings": "chat_rows", "train_tokens": [], "use_dora": False}
OPTIMIZER = {"precision": "bfloat16", "optim": "adamw_torch_fused", "bf16_weights": False}


@pytest.mark.parametrize("before, changed, line", [
    (
        {}, {"data": {"fingerprint": "c" * 64}, "samples_per_step": 8},
        "data as rendered: bbbbbbbbbbbb, now cccccccccccc; samples per step: 16, now 8",
    ),
    (
        {"method": METHOD}, {"method": METHOD | {"train_embeddings": "all", "use_dora": True}},
        "what trains: train_embeddings chat_rows, now train_embeddings all, use_dora True",
    ),
    (
        OPTIMIZER, {"precision": "float32", "optim": "adamw_torch_8bit", "bf16_weights": True},
        "precision: bfloat16, now float32; --bf16_weights: False, now True; --optim: adamw_torch_fused, now adamw_torch_8bit",
    ),
], ids=["data and batch", "other tensors", "optimizer and precision"])  # fmt: skip
def test_going_on_from_another_run_is_refused(tmp_path, before, changed, line):
    before = RECORD | before
    (tmp_path / output_folder.RECORD).write_text(json.dumps(before))
    resuming.check_same_run(tmp_path, before)
    with pytest.raises(UserError, match=line):
        resuming.check_same_run(tmp_path, before | changed)


def test_what_an_older_record_does_not_say_is_not_compared(tmp_path):
    (tmp_path / output_folder.RECORD).write_text(json.dumps(RECORD | {"precision": "bfloat16"}))
    resuming.check_same_run(tmp_path, RECORD | OPTIMIZER)


def test_flags_that_make_another_run_are_refused(asked, tmp_path):
    """With the flags, their values then and now, and the way out."""
    out, lora = tmp_path / "out", ["--use_lora", "--resume_from_checkpoint", "auto"]
    record = preparation.prepare(asked("--use_lora"), out).record
    leave_checkpoint(out, 1, record, [], {"r": 64})
    preparation.prepare(asked(*lora), out)
    with pytest.raises(UserError) as error:
        preparation.prepare(asked(*lora, "--lora_dropout", "0.2", "--data_seed", "7", "--seed", "1"), out)
    line = str(error.value)
    assert "--lora_dropout: 0.05, now 0.2" in line and "--data_seed: 42, now 7" in line and "seed: 42, now 1" in line
    assert "give the flags and files that it was started with, or another --output_dir" in line


def test_other_data_name_the_flags_that_made_them(asked, tmp_path):
    out = tmp_path / "out"
    leave_checkpoint(out, 1, preparation.prepare(asked(), out).record, [])
    with pytest.raises(UserError, match=r"data as rendered: \w+, now \w+ \(--supervise: assistant, now chatml\)"):
        preparation.prepare(asked("--supervise", "chatml", "--resume_from_checkpoint", "auto"), out)


def test_an_adapter_gone_on_from_must_be_the_same():
    before = {"base": {"fingerprint": {"sha256": "a"}, "adapter": "123"}, "data": {"fingerprint": "b"}, "samples_per_step": 1, "seed": 1}
    now = before | {"base": before["base"] | {"adapter": "none"}}
    assert resuming.differences(before, now) == ["adapter of --lora_weight_path: 123, now none"]


def test_flags_that_may_change_are_recorded_over_all_resumes(asked, tmp_path):
    out, auto = tmp_path / "out", ["--resume_from_checkpoint", "auto"]
    record = preparation.prepare(asked(), out).record
    leave_checkpoint(out, 1, record, [])
    job = preparation.prepare(asked(*auto, "--learning_rate", "1e-5"), out)
    assert job.way.kind == resuming.GO_ON and [change.flag for change in job.way.changes] == ["learning_rate"]
    first = {"after_step": 1, "flag": "learning_rate", "before": "5e-05", "now": "1e-05"}
    assert job.record["changes"] == [first] and job.record["flags"]["learning_rate"] == 1e-5
    leave_checkpoint(out, 2, job.record, [])
    job = preparation.prepare(asked(*auto, "--learning_rate", "1e-5", "--weight_decay", "0.1"), out)
    assert job.record["changes"] == [first, {"after_step": 2, "flag": "weight_decay", "before": "0.0", "now": "0.1"}]


def test_other_data_to_evaluate_on(asked, tmp_path):
    """May be, where nothing follows the evaluations."""
    out, auto = tmp_path / "out", ["--resume_from_checkpoint", "auto"]
    one, other = (["--eval_data_path", write_talks(tmp_path / f"{n}.json", count=n), "--eval_strategy", "epoch"] for n in (2, 3))
    leave_checkpoint(out, 1, preparation.prepare(asked(*one), out).record, [])
    way = preparation.prepare(asked(*auto, *other), out).way
    assert [change.flag for change in way.changes] == ["eval_data_path"]
    with pytest.raises(UserError, match="evaluations on other data cannot be compared"):
        preparation.prepare(asked(*auto, *other, "--early_stopping_patience", "2", "--save_strategy", "epoch"), out)


def test_a_curve_that_follows_the_loss_cannot_change(asked, tmp_path):
    out, held_out = tmp_path / "out", write_talks(tmp_path / "held_out.json", count=3)
    flags = ["--eval_data_path", held_out, "--eval_strategy", "epoch"]  # which it follows
    leave_checkpoint(out, 1, preparation.prepare(asked(*flags), out).record, [])
    flags += ["--resume_from_checkpoint", "auto"]
    with pytest.raises(UserError, match="--lr_scheduler_type reduce_lr_on_plateau: follows the loss, .*linear, now reduce_lr_on_plateau"):
        preparation.prepare(asked(*flags, "--lr_scheduler_type", "reduce_lr_on_plateau"), out)


# ---- the same command, typed again


def test_the_same_command_goes_on_by_itself(asked, tmp_path, capsys):
    out = tmp_path / "out"
    own = leave_checkpoint(out, 1, preparation.prepare(asked(), out).record, [])
    job = preparation.prepare(asked("--logging_dir", "elsewhere"), out)  # which does not matter
    assert job.resume_from == own and job.way.kind == resuming.GO_ON
    assert f"continuing from {own} (its run had this command; --overwrite_output_dir begins anew)" in capsys.readouterr().err


@pytest.mark.parametrize("flags, why", [
    (["--learning_rate", "1"], " of another command (--learning_rate: 5e-05, now 1.0)"),
    (["--data_seed", "3"], " of another command (--data_seed: 42, now 3)"),
    (["--resume_from_checkpoint", "False"], ""),
])  # fmt: skip
def test_another_command_does_not(asked, tmp_path, flags, why):
    out = tmp_path / "out"
    leave_checkpoint(out, 1, preparation.prepare(asked(), out).record, [])
    with pytest.raises(UserError, match=re.escape(f"has checkpoint-1{why} - continue with --resume_from_checkpoint auto")):
        preparation.prepare(asked(*flags), out)


def test_the_same_command_over_other_data_is_refused(asked, tmp_path):
    out = tmp_path / "out"
    leave_checkpoint(out, 1, preparation.prepare(asked(), out).record, [])
    args = asked()
    write_talks(tmp_path / "data.json", count=3)
    with pytest.raises(UserError, match=r"checkpoint-1: is of another run .data as rendered.* or --overwrite_output_dir") as caught:
        preparation.prepare(args, out)
    assert f"({tmp_path / 'data.json'} has changed: " in str(caught.value) and " samples then, 3 now)" in str(caught.value)


def test_which_files_of_data_are_others():
    """By their bytes, wherever they lie: a file that was moved is the same."""
    files = {name: {"path": name, "sha256": name * 64, "samples": 1_000} for name in "abc"}
    moved, changed = files["a"] | {"path": "z"}, files["b"] | {"sha256": "f" * 64, "samples": 7}
    said = resuming.changed_files({"files": [*files.values()]}, {"files": [moved, changed, {"path": "d", "sha256": "d" * 64, "samples": 2}]})
    assert said == ["b has changed: 1,000 samples then, 7 now", "c was part of them", "d is new"]
    assert resuming.changed_files({}, {"files": []}) == resuming.changed_files({"files": 3}, {"files": [3]}) == []


def test_a_checkpoint_that_was_renamed(asked, tmp_path):
    """By its name it is the newest; it holds an earlier step."""
    out = tmp_path / "out"
    record = preparation.prepare(asked(), out).record
    for step in (1, 2):
        leave_checkpoint(out, step, record, [])
    (out / "checkpoint-1").rename(out / "checkpoint-3")
    with pytest.raises(UserError, match=f"{out}/checkpoint-3: holds step 1, whatever its name says - name it checkpoint-1, or remove it"):
        preparation.prepare(asked("--resume_from_checkpoint", "auto"), out)
    point = (out / "checkpoint-3").rename(tmp_path / "a copy")
    assert preparation.prepare(asked("--resume_from_checkpoint", str(point)), out).way.done == 1


def test_overwriting_begins_anew(asked, tmp_path):
    out = tmp_path / "out"
    leave_checkpoint(out, 1, preparation.prepare(asked(), out).record, [])
    assert preparation.prepare(asked("--overwrite_output_dir"), out).way == resuming.Way(total=3)


# ---- what is left to do: four samples in one step an epoch, three epochs


def test_fewer_steps_than_are_done_are_refused(asked, tmp_path):
    out = tmp_path / "out"
    leave_checkpoint(out, 2, preparation.prepare(asked(), out).record, [])
    with pytest.raises(UserError, match="checkpoint-2: has done 2 steps, and this run would have 1 - give more with --num_train_epochs"):
        preparation.prepare(asked("--num_train_epochs", "1", "--resume_from_checkpoint", "auto"), out)


def test_a_run_at_its_end_has_its_result_to_write(asked, tmp_path, capsys):
    out = tmp_path / "out"
    last = leave_checkpoint(out, 3, preparation.prepare(asked(), out).record, [])
    job = preparation.prepare(asked(), out)
    assert job.way.kind == resuming.RESULT and job.way.is_trained
    assert f"nothing left to train: {last} is the end of this run (3 steps)" in capsys.readouterr().err
    preparation.prepare(asked("--learning_rate", "1", "--resume_from_checkpoint", "auto"), out)
    assert "this changes no step any more: --learning_rate: 5e-05, now 1" in capsys.readouterr().err


def leave_result(out, record):
    """Of three steps."""
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_text("weights")
    hashes = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")}
    (out / output_folder.RECORD).write_text(json.dumps(record | {"result": {"step": 3, "of_steps": 3}, "files": hashes}))


@pytest.mark.parametrize("damage, kind", [
    (None, resuming.NOTHING),
    (lambda out: (out / "config.json").unlink(), resuming.RESULT),
    (lambda out: (out / "model.safetensors").write_text("weightz"), resuming.RESULT),
    (lambda out: (out / output_folder.RECORD).unlink(), resuming.RESULT),
    (lambda out: os.truncate(out / output_folder.RECORD, 40), resuming.RESULT),
    (lambda out: (out / output_folder.RECORD).write_text("[]"), resuming.RESULT),
    (lambda out: change_record(out, result=3), resuming.RESULT),
    (lambda out: change_record(out, base={}), resuming.RESULT),
    (lambda out: change_record(out, data={"fingerprint": 3}), resuming.RESULT),
    (lambda out: change_record(out, files={"config.json": ["a", "b"]}), resuming.RESULT),
], ids=["whole", "no config", "a flipped bit", "no record", "a cut record", "a list", "a number", "no base", "no data", "two hashes"])  # fmt: skip
def test_a_finished_run_has_nothing_to_do(asked, tmp_path, damage, kind, capsys):
    out = tmp_path / "out"
    record = preparation.prepare(asked(), out).record
    leave_checkpoint(out, 3, record, [])
    leave_result(out, record)
    if damage:
        damage(out)
    assert preparation.prepare(asked(), out).way.kind == kind
    assert ("nothing to do: " in capsys.readouterr().err) == (damage is None)


def change_record(out, **changes):
    path = out / output_folder.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_result_of_fewer_steps_is_gone_on_from(asked, tmp_path):
    out = tmp_path / "out"
    record = preparation.prepare(asked(), out).record
    leave_checkpoint(out, 3, record, [])
    leave_result(out, record)
    way = preparation.prepare(asked("--num_train_epochs", "5", "--resume_from_checkpoint", "auto"), out).way
    assert (way.kind, way.done, way.total, way.planned_before) == (resuming.GO_ON, 3, 5, 3)


def test_a_run_that_stopped_early_is_at_its_end(asked, tmp_path):
    out, held_out = tmp_path / "out", write_talks(tmp_path / "held_out.json", count=3)
    flags = ["--eval_data_path", held_out, "--eval_strategy", "epoch", "--early_stopping_patience", "1"]
    log = [{"step": 1, "eval_loss": 1.0}, {"step": 2, "eval_loss": 2.0}]
    leave_checkpoint(out, 2, preparation.prepare(asked(*flags), out).record, [], log_history=log)
    assert preparation.prepare(asked(*flags), out).way.kind == resuming.RESULT


# ---- what is missing


def test_incomplete_checkpoints_are_named(asked, tmp_path, capsys):
    out = tmp_path / "out"
    record = preparation.prepare(asked(), out).record
    (leave_checkpoint(out, 2, record, []) / "optimizer.pt").unlink()
    auto = ["--resume_from_checkpoint", "auto"]
    assert preparation.prepare(asked(*auto), out).way.kind == resuming.START
    assert "checkpoint-2: not whole, " in (said := capsys.readouterr().err) and "starting from the beginning" in said
    whole = leave_checkpoint(out, 1, record, [])
    assert preparation.prepare(asked(*auto), out).resume_from == whole
    assert f"going on from {whole}" in capsys.readouterr().err


def test_what_a_checkpoint_lacks_is_told(asked, tmp_path, capsys):
    out, auto = tmp_path / "out", ["--resume_from_checkpoint", "auto"]
    point = leave_checkpoint(out, 1, preparation.prepare(asked(), out).record, [])
    preparation.prepare(asked(*auto), out)
    assert "has no rng_state.pth: dropout goes on with other random numbers" in capsys.readouterr().err
    (point / "rng_state.pth").write_text("")
    preparation.prepare(asked(*auto), out)
    assert "has no" not in capsys.readouterr().err
    record = json.loads((point / output_folder.RECORD).read_text())
    (point / output_folder.RECORD).write_text(json.dumps({key: value for key, value in record.items() if key != "flags"}))
    preparation.prepare(asked(*auto), out)
    assert "was written before flags were recorded, so which of them are others now cannot be told: learning" in capsys.readouterr().err
    (point / output_folder.RECORD).unlink()
    job = preparation.prepare(asked(*auto), out)
    assert "has no training.json: whether it is of this base" in capsys.readouterr().err
    assert job.plan.front == tuple(job.record["first_steps"]) != ()
