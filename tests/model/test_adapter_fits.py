"""An adapter whose settings mean no layer of its base, or others than its file has: refused before a weight of the base is loaded."""

import contextlib
import io
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import small_checkpoint, tiny_gptq, tiny_later_qwen

from finetune.ask import __main__ as ask
from finetune.compare import __main__ as compare
from finetune.errors import UserError
from finetune.merge import __main__ as merge
from finetune.model import adapter_fits, whole_base

LAYERS = {"qwen": ["c_attn", "w1"], "qwen2": ["q_proj", "up_proj"], "gptq": ["c_attn", "mlp.c_proj"]}
# settings of adapter_config.json that are right in themselves: what is said
MISFITS = {
    "a pattern": ({"target_modules": r".*\.layers\.\d+\.zzz"}, "cannot be put onto {base} (Target modules .*"),
    "a name": ({"target_modules": ["query"]}, "cannot be put onto {base} (Target modules {'query'} not found"),
    "layers by number": ({"layers_to_transform": [7]}, "cannot be put onto {base} (Target modules"),
    "fewer layers": ({"layers_to_transform": [1]}, "has model.layers.0.mlp.up_proj.lora_A.weight, for which {base} has no place"),
    "more layers": ({"target_modules": ["q_proj", "up_proj", "k_proj"]}, "misses model.layers.0.self_attn.k_proj.lora_A.weight, which {base}"),
    "blocks of another name": ({"layers_to_transform": [0, 1], "layers_pattern": "zz"}, "cannot be put onto {base} (Target modules"),
    "all left out": ({"exclude_modules": ["q_proj", "up_proj"]}, "cannot be put onto {base} (No modules were targeted"),
    "some left out": ({"exclude_modules": r".*q_proj"}, "has model.layers.0.self_attn.q_proj.lora_A.weight, for which {base} has no place"),
    "another rank": ({"r": 8}, "does not fit {base} (model.layers.0.mlp.up_proj.lora_A.weight is [4, 32], not [8, 32])"),
    "ranks by pattern": ({"rank_pattern": {"up_proj": 2}}, "does not fit {base} (model.layers.0.mlp.up_proj.lora_A.weight is [4, 32], not [2, 32])"),
    "no pattern of ranks": ({"rank_pattern": {"(": 2}}, "cannot be put onto {base} ("),
}


def make(place, kind):
    """(a base, an adapter on it as other hands make it: without a record)"""
    makers = {"qwen": small_checkpoint, "gptq": tiny_gptq}
    base = makers[kind](place / "base") if kind in makers else tiny_later_qwen(place / "base", kind)
    settings = LoraConfig(r=4, target_modules=LAYERS[kind], task_type="CAUSAL_LM", init_lora_weights=False)
    if kind == "gptq":  # of the same names and shapes; what is asked here reads no weight
        settings.base_model_name_or_path = str(base)
    get_peft_model(whole_base.without_weights(base).to_empty(device="cpu"), settings).save_pretrained(place / "adapter")
    tensors = load_file(place / "adapter/adapter_model.safetensors")
    save_file({name: torch.ones_like(tensor) for name, tensor in tensors.items()}, place / "adapter/adapter_model.safetensors", {"format": "pt"})
    return base, place / "adapter"


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    return make(tmp_path_factory.mktemp("later"), "qwen2")


def with_settings(adapter, place, changes):
    shutil.copytree(adapter, place)
    path = place / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return place


@pytest.mark.parametrize("kind", LAYERS)
def test_what_fits_passes(tmp_path, kind):
    base, adapter = make(tmp_path, kind)
    adapter_fits.check(base, adapter)
    older = load_file(adapter / "adapter_model.safetensors")  # peft before 0.6, and patterns that mean the same
    pattern = {"target_modules": f".*({'|'.join(name.replace('.', '[.]') for name in LAYERS[kind])})$"}
    save_file({name.replace(".base_layer", ""): tensor for name, tensor in older.items()}, adapter / "adapter_model.safetensors")
    adapter_fits.check(base, with_settings(adapter, tmp_path / "pattern", pattern))


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit(later, tmp_path, case):
    base, adapter = later
    changes, said = MISFITS[case]
    misfit = with_settings(adapter, tmp_path / "adapter", changes)
    with pytest.raises(UserError, match=re.escape(said.replace("{base}", str(base)).removesuffix(".*"))) as failure:
        adapter_fits.check(base, misfit)
    line = str(failure.value)
    assert "\n" not in line and len(line) < 900
    if "cannot be put" in line:
        assert "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in line


def test_programs_refuse_before_weights(later, tmp_path, monkeypatch):
    base, adapter = later
    misfit = with_settings(adapter, tmp_path / "adapter", {"target_modules": r".*\.zzz"})
    monkeypatch.setattr("finetune.model.loading.load_weights", lambda *_, **__: pytest.fail("weights are loaded"))
    monkeypatch.setattr("finetune.merge.__main__.write", lambda *_, **__: pytest.fail("it is written"))
    words = {ask: [misfit, "hi", "--base", base], compare: [misfit, base, "--base", base], merge: [misfit, tmp_path / "out", "--base", base]}
    for program, arguments in words.items():
        with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
            program.main([str(word) for word in arguments])
        errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(errors) == 1 and f"cannot be put onto {base}" in errors[0], said.getvalue()
        assert "Traceback" not in said.getvalue() and not (tmp_path / "out").exists()
