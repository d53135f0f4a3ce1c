"""What a run writes about itself. (That a changed run is refused by it: test_resuming.py.)"""

from types import SimpleNamespace

import pytest

from finetune.flags import args as arguments
from finetune.folders import quant_settings
from finetune.lifecycle import run_record


@pytest.mark.parametrize("flags, quantization, more", [
    ([], None, set()),
    (["--use_lora", "--q_lora", "--quant", "nf4"], quant_settings.NF4, {"bitsandbytes"}),
    (["--optim", "paged_adamw_8bit"], None, {"bitsandbytes"}),
    (["--optim", "adamw_torch_8bit"], None, {"torchao"}),
])  # fmt: skip
def test_versions_are_those_of_the_packages_that_the_run_computes_with(flags, quantization, more, monkeypatch):
    monkeypatch.setattr(run_record.quantized_model, "installed", lambda package: True)
    monkeypatch.setattr(run_record.importlib.metadata, "version", lambda package: "1.0")
    found = run_record.versions(arguments.parse(flags).training, quantization)
    assert found.keys() == {"torch", "transformers", "peft", "accelerate", "tiktoken"} | more


@pytest.mark.parametrize("line, expected", [
    ("python finetune.py -m M --hub_token hf_1 -d 'a b'", "python finetune.py -m M --hub_token '***' -d 'a b'"),
    ("python finetune.py --hub-token=hf_1", "python finetune.py '--hub-token=***'"),
    ("python finetune.py --push_to_hub_token hf_1 --bf16", "python finetune.py --push_to_hub_token '***' --bf16"),
    ("bash x.sh -m $'a\\nb'", "bash x.sh -m $'a\\nb'"),  # bash's own quoting
])  # fmt: skip
def test_no_secret_of_the_command_is_kept(line, expected, monkeypatch):
    monkeypatch.setenv("FINETUNE_COMMAND", line)
    assert run_record.command() == expected


def test_without_a_script_the_command_is_the_programs(monkeypatch):
    monkeypatch.delenv("FINETUNE_COMMAND", raising=False)
    monkeypatch.setattr(run_record.sys, "argv", ["finetune.py", "-d", "a b"])
    assert run_record.command() == f"{run_record.sys.executable} finetune.py -d 'a b'"


def test_the_toolkit_is_known_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(run_record, "ROOT", tmp_path)
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "a.py").write_text("1")
    one = run_record.toolkit_version()
    (tmp_path / "finetune" / "a.py").write_text("2")
    assert one.startswith("sources ") and run_record.toolkit_version() != one
    (tmp_path / ".git").mkdir()  # which git refuses
    assert run_record.toolkit_version().startswith("sources ")


def test_losses_are_those_of_steps():
    log = [{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 0.1}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0}, {"step": 3}]
    first, best, last = ({"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)))
    assert run_record.losses(log) == {"first": first, "last": last, "best": best}
    assert run_record.losses([]) == {}


def test_times_go_on_over_resumes(monkeypatch):
    now = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr(run_record.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(run_record, "now", lambda: "2026-01-02")
    record = {}
    clock = run_record.Clock(record, {"start": "2026-01-01", "starts": ["2026-01-01"], "seconds_of_training": 100.0})
    clock.on_train_begin(None, None, None)
    clock.on_step_end(None, SimpleNamespace(num_input_tokens_seen=7), None)
    starts = ["2026-01-01", "2026-01-02"]
    assert record == {"start": "2026-01-01", "starts": starts, "seconds_of_training": 103.0, "tokens_seen": 7}
