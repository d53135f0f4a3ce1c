"""What is saved loads, is whole, and knows its base."""

import json
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import small_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import qwen_model
from finetune.folders import fingerprints, output_folder, tensor_files
from finetune.model import loading
from finetune.steps import saving
from finetune.writing import durable

PROMPT = torch.tensor([[151644, 8948, 198, 9707, 151645]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small base checkpoint with the real vocabulary, in a folder with dots and spaces in its name."""
    return small_checkpoint(tmp_path_factory.mktemp("models") / "Qwen 1.8B v0.5")


@pytest.fixture
def adapter(base, tokenizer, tmp_path):
    """(a LoRA model with weights that do something, the folder it was saved to)"""
    lora = get_peft_model(
        load(base), LoraConfig(r=4, target_modules=["c_attn", "c_proj", "w1", "w2"], init_lora_weights=False)
    )
    loading.set_chat_settings(lora, tokenizer)
    record = {"base": {"name": str(base), "fingerprint": fingerprints.of_model(base)}}
    saving.save_final(lora, tokenizer, tmp_path / "adapter", record=record)
    return lora.eval(), tmp_path / "adapter"


def load(folder):
    qwen_model.register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_published_folder_opens_without_remote_code(base):
    qwen_model.register()
    assert json.loads((base / "config.json").read_text())["auto_map"]["AutoConfig"] == "configuration_qwen.QWenConfig"
    assert type(AutoConfig.from_pretrained(base)) is qwen_model.QWenConfig
    assert type(AutoTokenizer.from_pretrained(base)) is qwen_model.QWenTokenizer
    # also for a user who types the old flag: the folder has no code, and would fail if it were asked for
    assert type(AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)) is qwen_model.QWenLMHeadModel


@pytest.mark.parametrize("form", ["sharded", "bin", "bin_sharded"])
def test_every_published_form_of_weights(base, tmp_path, form):
    expected = load(base)
    folder = tmp_path / "other"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = expected.state_dict()
    if form == "sharded":
        expected.save_pretrained(folder, max_shard_size="8MB")
        assert len(tensor_files.weight_files(folder)) > 1
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, members in parts.items():
            torch.save({name: state[name].clone() for name in members}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, members in parts.items() for name in members}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = load(folder).state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert fingerprints.of_model(folder) == fingerprints.of_model(base)


def test_full_model_is_complete(base, tokenizer, tmp_path):
    trained = load(base)
    trained.config.use_cache = False
    loading.set_chat_settings(trained, tokenizer)
    saving.save_final(trained, tokenizer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    code = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer_config.json",
    } <= names
    assert {"configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "chatml.py"} <= code
    assert {"kv_cache.py", "kv_cache_kernels.py"} <= code
    assert not any(name.startswith(".") for name in names)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~durable.umask()}  # safetensors makes its own 0600: no server under another user could read them
    assert AutoConfig.from_pretrained(tmp_path / "out").use_cache is True
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.chat_format == "chatml" and settings.max_window_size == 6144
    assert settings.eos_token_id == [151645, 151644, 151643] and settings.pad_token_id == 151643
    torch.testing.assert_close(load(tmp_path / "out")(PROMPT).logits, trained(PROMPT).logits)


def test_saved_folder_loads_in_a_python_without_this_toolkit(base, tokenizer, tmp_path):
    trained = load(base)
    loading.set_chat_settings(trained, tokenizer)
    out = tmp_path / "my. model 2"
    saving.save_final(trained, tokenizer, out)
    program = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "qwen_model" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
print(model(torch.tensor([[151644, 8948, 198, 9707, 151645]])).logits.double().sum().item())
print(model.chat(tokenizer, "hello", max_new_tokens=3, do_sample=False)[0])
"""
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(out)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    total, answer = done.stdout.split("\n", 1)
    assert float(total) == pytest.approx(trained(PROMPT).logits.double().sum().item(), rel=1e-6)
    assert answer.removesuffix("\n") == trained.chat(tokenizer, "hello", max_new_tokens=3, do_sample=False)[0]


def test_adapter_folder_is_complete_and_opens_with_plain_peft(base, adapter):
    lora, folder = adapter
    names = {path.name for path in folder.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "qwen.tiktoken",
        "training.json",
    } <= names
    again = PeftModel.from_pretrained(load(base), folder).eval()
    torch.testing.assert_close(again(PROMPT).logits, lora(PROMPT).logits)
    assert GenerationConfig.from_pretrained(folder).chat_format == "chatml"
    assert output_folder.read_record(folder)["base"]["name"] == str(base)


def test_verify_finds_a_changed_a_missing_and_a_foreign_tensor(adapter):
    from safetensors.torch import load_file, save_file

    lora, folder = adapter
    saving.verify(folder, lora)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    name = next(iter(state))
    for broken, message in [
        (state | {name: state[name] + 1}, "was not written"),
        ({key: value for key, value in state.items() if key != name}, "1 tensors are missing"),
        (state | {"foreign": state[name].clone()}, "foreign was not written"),
    ]:
        save_file(broken, file)
        with pytest.raises(RuntimeError, match=message):
            saving.verify(folder, lora)


def test_a_save_that_fails_leaves_no_model(base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "verify", lambda *args: (_ for _ in ()).throw(RuntimeError("disk")))
    with pytest.raises(RuntimeError, match="disk"):
        saving.save_final(load(base), tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished"]


def test_a_new_result_takes_the_place_of_an_old_one(base, tokenizer, adapter):
    """A full model saved over an adapter: transformers would put the old adapter onto the new model."""
    _, folder = adapter
    saving.save_final(load(base), tokenizer, folder)
    assert not list(folder.glob("adapter_*"))
    assert not hasattr(load(folder), "peft_config")


def test_adapters_are_told_apart_by_tensors_and_settings(adapter):
    lora, folder = adapter
    before = fingerprints.of_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    assert fingerprints.of_adapter(folder) == before
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert fingerprints.of_adapter(folder) != before
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with torch.no_grad():
        next(p for name, p in lora.named_parameters() if "lora_A" in name).add_(1)
    lora.save_pretrained(folder, save_embedding_layers=False)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert fingerprints.of_adapter(folder) != before
