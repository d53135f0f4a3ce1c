"""What a program does without, told by its flags and folders."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.compat import on_transformers, unused
from finetune.flags import args as arguments
from finetune.flags.definitions import TrainingFlags
from finetune.model import packages

ALL = {"datasets", "deepspeed", "torchao", "bitsandbytes", "peft"}


@pytest.mark.parametrize("flags, needed", [
    ([], set()), (["--use_lora"], {"peft"}), (["--q_lora"], {*ALL}), (["--q_lora", "--quant", "nf4"], {"peft", "bitsandbytes"}),
    (["--optim", "paged_adamw_8bit"], {"bitsandbytes"}), (["--optim", "adamw_torch_8bit"], {"torchao"}),
    (["--deepspeed", "ds_config_zero2.json"], {"deepspeed"}), (["--report_to", "wandb"], {"datasets"}), (["-m", "adapter"], {"peft"}),
])  # fmt: skip
def test_a_run(flags, needed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text("{}")
    args = arguments.parse_as(on_transformers.training_flags(TrainingFlags), flags)
    args.training = SimpleNamespace(**args.training)
    assert ALL - packages.unused_in_run(args) == needed


@pytest.fixture
def folders(tmp_path):
    """A model, its quantized sibling, and adapters: on each, over NF4, and on a hub's model."""
    for name, config in (("plain", {}), ("int4", {"quantization_config": {"quant_method": "gptq", "bits": 4}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "qwen"} | config))
    bases = {"lora": tmp_path / "plain", "on int4": tmp_path / "int4", "nf4": tmp_path / "plain", "hub": "Qwen/Qwen-7B"}
    for name, base in bases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (tmp_path / "nf4" / "training.json").write_text('{"method": {"quantization": {"method": "nf4", "bits": 4}}}')
    return tmp_path


@pytest.mark.parametrize("names, needed", [
    (["plain"], set()), (["lora"], {"peft"}), (["plain", "lora"], {"peft"}), (["int4"], ALL), (["on int4"], ALL), (["nf4"], ALL),
    (["hub"], ALL), (["plain", "int4"], ALL),
])  # fmt: skip
def test_folders(folders, names, needed):
    """Over few bits, and where it is not known, all may be used."""
    assert ALL - packages.unused_with([folders / name for name in names]) == needed
    assert ALL - packages.unused_with([folders / "hub"], folders / "plain") == {"peft"}


def test_a_process_that_has_imported_transformers_keeps_all():
    unused.leave_out({"a package that is not there"})
    assert "a package that is not there" not in sys.modules
