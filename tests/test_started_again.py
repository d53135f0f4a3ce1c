"""Through finetune.py: a command typed again, flags changed at a resume, a finished run started again, and what training.json says."""

import datetime
import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import base, log, own_cache, run, write  # noqa: F401

SAVING = ["--save_strategy", "steps", "--save_steps", "2"]
LORA = ["--use_lora", "--lora_r", "4"]
FINISHED = ["--max_steps", "3", *SAVING]  # in the midst of the second epoch of two steps


def record_of(folder) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "training.json").read_text(), parse_constant=refuse)


def state_of(folder) -> dict:
    """Every file below a folder, and when it was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", [[], LORA], ids=["full", "LoRA"])
def test_a_finished_run_is_not_trained_on(run, tmp_path, method):  # noqa: F811
    out, name = tmp_path / "out", "adapter_model.safetensors" if method else "model.safetensors"
    assert run(*method, *FINISHED)[0] == 0
    before, lines, result = state_of(out), log(out), load_file(out / name)
    code, printed = run(*method, *FINISHED)
    assert code == 0 and f"nothing to do: {out} holds the result of this run, of all its 3 steps" in printed, printed
    assert state_of(out) == before
    # killed while the result was written
    for path in (out / name, out / "adapter_config.json", out / "config.json"):
        path.unlink(missing_ok=True)
    code, printed = run(*method, *FINISHED)
    assert code == 0 and f"nothing left to train: {out / 'checkpoint-3'} is the end" in printed, printed
    again = load_file(out / name)
    assert again.keys() == result.keys() and all(torch.equal(again[key], result[key]) for key in again)
    assert log(out) == lines and not (out / "checkpoint-4").exists()
    record = record_of(out)
    assert record["result"] == {"which": "last", "step": 3, "steps": 3, "of_steps": 3} and len(record["starts"]) == 2
    code, printed = run(*method, "--max_steps", "2", *SAVING, "--resume_from_checkpoint", "auto")
    assert code == 2 and "has done 3 steps, and this run would have 2 - give more" in printed, printed


def test_a_killed_run_goes_on_when_its_command_is_typed_again(run, tmp_path):  # noqa: F811
    assert run(*LORA, out="straight")[0] == 0
    assert run(*LORA, *SAVING)[0] == 0
    out = tmp_path / "out"
    shutil.rmtree(out / "checkpoint-4")
    for path in list(out.iterdir()):
        if path.is_file() and path.name != "training_log.jsonl":
            path.unlink()
    code, printed = run(*LORA, *SAVING)
    assert code == 0 and f"continuing from {out / 'checkpoint-2'} (its run had this command" in printed, printed
    assert log(out) == log(tmp_path / "straight")


def test_a_lower_learning_rate_works(run, tmp_path):  # noqa: F811
    """As advised behind a loss that is no number. Four steps; linear to 0."""
    assert run(*LORA, *SAVING)[0] == 0
    out, auto = tmp_path / "out", ["--resume_from_checkpoint", "auto"]
    shutil.rmtree(out / "checkpoint-4")
    (out / "adapter_config.json").unlink()
    code, printed = run(*LORA, *SAVING, *auto, "--lora_dropout", "0")
    assert code == 2 and "is of another run (--lora_dropout: 0.05, now 0.0) - give the flags" in printed, printed
    code, printed = run(*LORA, *SAVING, *auto, "--learning_rate", "1e-3")
    said = "changed from here on: --learning_rate: 0.01, now 0.001; the learning rate of step 3 is 0.0005, not 0.005"
    assert code == 0 and said in printed, printed
    assert log(out, "learning_rate") == pytest.approx([1e-2, 7.5e-3, 5e-4, 2.5e-4])
    change = {"after_step": 2, "flag": "learning_rate", "before": "0.01", "now": "0.001"}
    assert record_of(out)["changes"] == [change] == record_of(out / "checkpoint-4")["changes"]


def test_training_json_says_how_to_do_it_again_and_what_came_out(run, base, tmp_path):  # noqa: F811
    held_out = write(tmp_path / "held_out.json", count=5, offset=50)
    flags = [*LORA, "--eval_data_path", held_out, "--eval_strategy", "epoch", "--load_best_model_at_end", "--hub_token", "hf_secret"]
    code, printed = run(*flags, "--save_strategy", "epoch")
    assert code == 0, printed
    out, data = tmp_path / "out", tmp_path / "data.json"
    record, losses = record_of(out), log(out)
    sha = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (data, held_out)}
    assert record["data"]["files"] == [{"path": str(data), "sha256": sha[data], "samples": 12}] and record["data"]["samples"] == 12
    assert record["evaluation_data"]["files"] == [{"path": str(held_out), "sha256": sha[held_out], "samples": 5}]
    typed = {"learning_rate": 0.01, "use_lora": True, "lora_r": 4, "hub_token": "given", "num_train_epochs": 2.0}
    assert typed.items() <= record["flags"].items() and "weight_decay" not in record["flags"]
    assert "finetune.py --model_name_or_path " in record["command"] and record["started_in"] == os.getcwd()
    assert "--hub_token '***'" in record["command"] and str(base) in record["command"]
    assert "hf_secret" not in (out / "training.json").read_text()
    schedule = {"learning_rate": 0.01, "lr_scheduler_type": "linear", "warmup_steps": 0, "epochs": 2.0, "steps": 4}
    assert schedule.items() <= record["schedule"].items() and record["samples_per_step"] == 6
    steps = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    assert record["losses"] == {"first": steps[0], "last": steps[-1], "best": min(steps, key=lambda line: line["loss"])}
    evaluations = log(out, "eval_loss")
    best = min(range(2), key=lambda i: evaluations[i])
    delivered = {"which": "best", "step": 2 * (best + 1), "eval_loss": evaluations[best], "of_steps": 4}
    assert delivered.items() <= record["result"].items()
    tokens = int(re.search(r"12 samples, ([0-9,]+) tokens", printed)[1].replace(",", ""))
    assert record["tokens_seen"] == 2 * tokens and record["seconds_of_training"] > 0 and record["peak_memory_gb"] > 0.05
    times = [datetime.datetime.fromisoformat(record[name]) for name in ("start", "end")]
    assert times[0] <= times[1] and all(time.utcoffset() == datetime.timedelta(0) for time in times)
    assert record["toolkit"] and record["device"] and record["starts"] == [record["start"]]
