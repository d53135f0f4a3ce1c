"""What every rank does by itself before training: where a run goes on from, and what all ranks must have alike."""

# ruff: noqa: F401, F811  (fixtures that are imported)

import json
import shutil

import pytest
from prepared import asked, base, leave_checkpoint, write_talks
from talks import talk, write

from finetune.errors import UserError
from finetune.folders import hub
from finetune.model import loading
from finetune.steps import preparation

# ---- a run that is started again


def test_a_new_start_takes_no_earlier_runs_checkpoints_for_its_own(asked, tmp_path):
    """A worker that dies while it loads the model is started again, with the old run's checkpoints still there."""
    out, flags = tmp_path / "out", ["--overwrite_output_dir"]
    record = preparation.prepare(asked(*flags), out).record
    old = leave_checkpoint(out, 9, record, ["old"])
    args = asked(*flags)
    job = preparation.prepare(args, out, restarted=True, launches=["mine"])
    assert job.resume_from is None and job.record["launches"] == ["mine"]
    preparation.make_room(args, job, out)
    assert not old.exists()
    own = leave_checkpoint(out, 3, record, ["mine", "of another machine"])
    args = asked(*flags)
    job = preparation.prepare(args, out, restarted=True, launches=["mine"])
    preparation.make_room(args, job, out)
    assert job.resume_from == own and own.exists()


def test_a_machine_0_that_comes_back_counts_no_restart(asked, tmp_path):
    """The agents begin to count anew; of the run's own checkpoints nothing is removed, and it goes on."""
    out, flags = tmp_path / "out", ["--overwrite_output_dir"]
    record = preparation.prepare(asked(*flags), out).record
    own = leave_checkpoint(out, 3, record, ["gone", "stayed"])
    args = asked(*flags)
    job = preparation.prepare(args, out, restarted=False, launches=["came back", "stayed"])
    preparation.make_room(args, job, out)
    assert job.resume_from == own and own.exists()


def test_a_run_of_another_command_is_another_one(asked, tmp_path):
    out = tmp_path / "out"
    record = preparation.prepare(asked("--learning_rate", "1e-4"), out).record
    assert "launches" not in record
    leave_checkpoint(out, 9, record, ["old"])
    with pytest.raises(UserError, match="has checkpoint-9 of another command .* - continue with"):
        preparation.prepare(asked(), out, restarted=True, launches=["mine"])
    with pytest.raises(UserError, match="has checkpoint-9 of another command .* - continue with"):
        preparation.prepare(asked(), out)


def test_samples_longer_than_the_model_was_trained_on_are_counted(asked, base, tmp_path, capsys):
    """Those, and not what --model_max_length would let through."""
    short = shutil.copytree(base, tmp_path / "trained on 64 tokens")
    config = json.loads((short / "config.json").read_text()) | {"seq_length": 64}
    (short / "config.json").write_text(json.dumps(config))
    preparation.prepare(asked("--model_max_length", "2048", name=short), tmp_path / "out")
    assert "than the" not in capsys.readouterr().err
    long = [talk("q " * 40, "a " * 40), *(talk(f"q{i}", f"a{i}") for i in range(9))]
    args = asked("--model_max_length", "2048", "--data_path", str(write(tmp_path, long)), name=short)
    preparation.prepare(args, tmp_path / "out")
    assert "1 of 14 samples are longer than the 64 tokens that the model was trained on (config.json)" in capsys.readouterr().err


# ---- what all ranks must have alike


def different(one: dict, other: dict) -> set[str]:
    return {key for key in {**one, **other} if one.get(key) != other.get(key)}


def card(args, out) -> dict:
    made = preparation.consistency_record(args, preparation.prepare(args, out))
    return json.loads(json.dumps(made))  # as it goes through the store


def test_evaluation_data_must_be_alike(asked, tmp_path):
    held_out = [write_talks(tmp_path / f"{count}.json", count) for count in (2, 3)]
    cards = [card(asked("--eval_data_path", path, "--eval_strategy", "epoch"), tmp_path / "out") for path in held_out]
    assert different(*cards) == {"evaluation data as rendered"}


def test_the_content_of_deepspeeds_file_must_be_alike(asked, tmp_path):
    cards = []
    for stage in (2, 3):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        cards.append(card(asked("--deepspeed", tmp_path / "ds.json"), tmp_path / "out"))
    assert different(*cards) == {"engine", "content of --deepspeed"}
    assert "deepspeed" in cards[0]["versions"]


def test_packages_of_the_run_must_be_alike(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "cc")  # torchao's optimizers ask for a compiler
    usual, torchao = card(asked(), tmp_path / "out"), card(asked("--optim", "adamw_torch_8bit"), tmp_path / "out")
    assert torchao["versions"].keys() - usual["versions"].keys() == {"torchao"}


def test_an_adapter_to_go_on_from_must_be_alike(asked, base, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    import qwen_model

    qwen_model.register()
    adapter, cards = tmp_path / "adapter", []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loaded = loading.AutoModelForCausalLM.from_pretrained(base)
        lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "w1", "w2"])
        get_peft_model(loaded, lora).save_pretrained(adapter, save_embedding_layers=False)
        cards.append(card(asked("--use_lora", "--lora_weight_path", adapter), tmp_path / "out"))
    assert different(*cards) == {"adapter of --lora_weight_path"}


def test_an_output_folder_that_is_not_shared_is_named(monkeypatch):
    told = [["rank 0 on a", {preparation.CHECKPOINT: "checkpoint-3"}], ["rank 1 on b", {preparation.CHECKPOINT: None}]]
    monkeypatch.setattr(preparation.ranks.meeting, "exchange", lambda what, card: told)
    with pytest.raises(UserError, match="checkpoint-3 for rank 0 on a, none for rank 1 on b - give an --output_dir on"):
        preparation.ranks.agree({}, preparation.REMEDIES)


# ---- what is said


def test_a_model_of_a_hub_is_checked_twice_and_each_line_said_once(asked, base, monkeypatch, capsys):
    monkeypatch.setattr(hub, "find_folder", lambda name, cache_dir: base)
    for _ in range(2):  # another run in the same process says it again
        preparation.check_and_download(asked("--lazy_preprocess", name="Qwen/Qwen-7B"))
        assert capsys.readouterr().err.count("--lazy_preprocess has no effect") == 1


# ---- what tokens weigh


def test_the_plans_know_what_the_samples_weigh(asked, tmp_path):
    """In training and in evaluation."""
    held_out = write_talks(tmp_path / "held_out.json", count=3)
    job = preparation.prepare(asked("--eval_data_path", held_out, "--eval_strategy", "epoch"), tmp_path / "out")
    assert job.plan.weights is job.samples.weight_sums and job.eval_plan.weights is job.eval_samples.weight_sums
    assert job.plan.step(0, 0).loss_weight == job.samples.weight_sums.sum()
