"""What a run writes about itself. (That a changed run is refused by it: tests/folders/test_checkpoint.py.)"""

import pytest

from finetune.flags import args as arguments
from finetune.folders import quant_settings
from finetune.steps import run_record


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
