"""python -m finetune.merge: the merged folder is the adapter's model, or there is no folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SAVED_CODE, small_checkpoint, tiny_later_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import qwen_model
from finetune.errors import UserError
from finetune.flags.definitions import LoraArguments
from finetune.folders import fingerprints, model_writer, shards
from finetune.lora import adapters
from finetune.merge import __main__ as merge
from finetune.merge import formulas, requantize
from finetune.model import loading
from finetune.steps import saving


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """(a LoRA model with weights that do something, its folder, its base's folder)"""
    qwen_model.register()
    place = tmp_path_factory.mktemp("merge")
    base = small_checkpoint(place / "base")
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "w1", "w2"], bias="all", init_lora_weights=False)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1)
    loading.set_chat_settings(lora, tokenizer)
    record = {"base": {"name": str(base), "fingerprint": fingerprints.of_model(base)}}
    saving.save_final(lora, tokenizer, place / "adapter", record=record)
    return lora, place / "adapter", base


@pytest.mark.parametrize("to,tolerance", [("auto", 1e-4), ("bfloat16", 0.05)])
def test_merged_folder_gives_the_adapters_logits(trained, tmp_path, to, tolerance, capsys):
    lora, adapter, _ = trained
    merge.main([str(adapter), str(tmp_path / "out"), "--to", to])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == (torch.float32 if to == "auto" else torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer("你好，who are you?")["input_ids"]])
    torch.testing.assert_close(merged(ids).logits.float(), lora(ids).logits, atol=tolerance, rtol=0)
    assert GenerationConfig.from_pretrained(tmp_path / "out").chat_format == "chatml"
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["merged"]["adapter"] == str(adapter.resolve())
    assert "against the merged model, on a few answers: perplexity" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.unfinished"))


BESIDE = {
    "rows": {"train_embeddings": "chat_rows", "use_dora": True},
    "all": {"train_embeddings": "all", "lora_bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa_niter_4", "train_embeddings": "chat_rows"},
    "rslora": {"use_rslora": True, "use_dora": True, "lora_alpha": 5},
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", BESIDE)
def test_what_trained_beside_the_adapters_is_merged(trained, tmp_path, tokenizer, method, checkpointed):
    """Embedding and head, rows of them, PiSSA: from a result, and from a checkpoint of the same run."""
    _, _, base = trained
    lora = LoraArguments(use_lora=True, lora_r=4, lora_dropout=0.0, **{"train_embeddings": "none"} | BESIDE[method])
    rows = adapters.trained_rows(tokenizer, lora.train_embeddings, [])
    adapted = adapters.add(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora, rows).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save = saving.save_model if checkpointed else saving.save_final
    save(adapted, tokenizer, tmp_path / "adapter")
    assert merge.merge(tmp_path / "adapter", tmp_path / "out", base=str(base)) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[151644, 8948, 198, 9707, 151645, 40]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changed = (merged.lm_head.weight != plain.lm_head.weight).any(1).nonzero().flatten().tolist()
    assert changed == rows if rows or method == "rslora" else len(changed) > 100_000


def test_the_adapter_does_something(trained):
    """Else the test above could not fail."""
    lora, _, _ = trained
    ids = torch.tensor([[151644, 8948, 198]])
    with lora.disable_adapter():
        plain = lora(ids).logits
    assert (lora(ids).logits - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["{base}", "{tmp}/out"], "no adapter_config.json there"),
        (["{adapter}", "{adapter}"], "exists and is not empty"),
        (["{adapter}", "{tmp}/out", "--base", "{tmp}/nowhere"], "--base {tmp}/nowhere: no model was found there - give "),
        (["{adapter}", "{tmp}/out", "--base", "{other}"], "made for another base"),
        (["{adapter}", "{base}/out"], "lies in {base}, which is read - give a new folder for the merged model"),
        (
            ["{adapter}", "{tmp}/out", "--max_shard_size", "2"],
            '--max_shard_size: "2" is no size - give for example 2GB',
        ),
    ],
)
def test_refusals_name_the_place_and_the_remedy(trained, tmp_path, capsys, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, adapter, base = trained
    other = small_checkpoint(tmp_path / "other", seed=5)
    places = {"base": base, "adapter": adapter, "tmp": tmp_path, "other": other}
    with pytest.raises(SystemExit) as stopped:
        merge.main([argument.format(**places) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_merge_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    """A scale that is off by a hundredth: more than float32 explains."""
    _, adapter, _ = trained
    right = formulas.Adapter.scale
    monkeypatch.setattr(formulas.Adapter, "scale", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(RuntimeError, match="which float32 does not explain: nothing was written"):
        merge.merge(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rounding_hides_no_merge_that_was_not_made(trained, tmp_path, monkeypatch):
    """A mild adapter: what is missing is less than what bfloat16 makes of the logits."""
    _, adapter, base = trained
    mild = tmp_path / "mild"
    mild.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 0.02, "bias": "none"}
    (mild / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "lora_" in name}, mild / "adapter_model.safetensors")
    assert merge.merge(mild, tmp_path / "right", base=str(base), to="bfloat16") < 5e-2

    def base_alone(self, name, tensor):
        self.unused.clear()
        return tensor

    monkeypatch.setattr(formulas.Adapter, "merged", base_alone)
    with pytest.raises(RuntimeError, match="by .* of the largest, which float32, before they are rounded, does not explain"):
        merge.merge(mild, tmp_path / "wrong", base=str(base), to="bfloat16")
    assert not (tmp_path / "wrong").exists()


def test_what_was_written_otherwise_is_found_whatever_the_type(trained, tmp_path, monkeypatch):
    _, adapter, _ = trained
    right = shards.ShardWriter.add
    off = {"transformer.ln_f.weight": 1.004}  # the next number of bfloat16
    monkeypatch.setattr(shards.ShardWriter, "add", lambda self, name, x: right(self, name, x * off.get(name, 1)))
    with pytest.raises(RuntimeError, match="transformer.ln_f.weight is not what was written; the disk or its quota"):
        merge.merge(adapter, tmp_path / "out", to="bfloat16")


def test_values_that_the_type_cannot_hold(trained, tmp_path):
    _, adapter, base = trained
    large = tmp_path / "large"
    shutil.copytree(base, large)
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.wte.weight"][77, 3] = 1e5  # a token that no question has
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, foreign)
    with pytest.raises(UserError, match="wte.weight: has values up to 1e.05, which float16 cannot hold - give --to bfloat16"):
        merge.merge(foreign, tmp_path / "out", base=str(large), to="float16")
    assert merge.merge(foreign, tmp_path / "out", base=str(large), to="bfloat16") < 5e-2


@pytest.mark.parametrize("to,flag", [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_config_says_one_type(trained, tmp_path, to, flag):
    merge.merge(trained[1], tmp_path / "out", to=to)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == to and [name for name in ("fp32", "bf16", "fp16") if config[name]] == [flag]


@pytest.mark.parametrize("flag", [["--data_path", "x.json"], ["--samples", "9"], ["--seed", "1"]])
def test_flags_of_requantize_alone_are_not_lost(trained, tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        merge.main([str(trained[1]), str(tmp_path / "out"), *flag])
    assert f"error: {' '.join(flag)}: only --requantize calibrates - add it, or leave" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


WISHES = [
    ({}, "--requantize needs conversations to calibrate on - give them with --data_path"),
    ({"data_path": "x.json", "samples": 0}, "--samples 0: nothing to calibrate on - give 64 to 512"),
]


@pytest.mark.parametrize("wish,message", WISHES)
def test_what_requantizing_needs(wish, message):
    with pytest.raises(UserError, match=message):
        requantize.read_calibration_data(requantize.RequantizeOptions(**wish))


def test_requantizing_takes_every_setting_of_the_base(monkeypatch, tmp_path, tokenizer):
    from finetune.folders.quant_settings import Quantization
    from finetune.gptq import calibration, pipeline

    small_checkpoint(tmp_path / "merged")
    given = []
    monkeypatch.setattr(pipeline, "quantize", lambda *arguments: given.append(arguments[3]))
    monkeypatch.setattr(calibration, "draw", lambda *arguments: calibration.Calibration("", [([0], [0])], 1, 0, 8, 0, []))
    for symmetric, desc_act in ((True, False), (False, True)):
        to = Quantization("gptq", 8, 16, symmetric=symmetric, desc_act=desc_act)
        requantize.requantize(tmp_path / "merged", tmp_path, None, requantize.RequantizeOptions("x.json"), to, "name", 10**6)
    kept = [(found.bits, found.group_size, found.symmetric, found.desc_act, found.max_shard_bytes) for found in given]
    assert kept == [(8, 16, True, False, 10**6), (8, 16, False, True, 10**6)]


@pytest.mark.parametrize("over,said", [(None, "weights that are not quantized"), ("nf4", "NF4, which is made while a model")])
def test_nothing_to_go_back_to(trained, tmp_path, over, said):
    _, adapter, base = trained
    record = {"method": {"quantization": {"method": over, "bits": 4}}} if over else {}
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"was trained over {said}.* - leave it out; python run_gptq.py quantizes"):
        requantize.earlier(tmp_path, base)


@pytest.mark.parametrize("memory", ["enough", "little"])
def test_a_head_of_its_own_over_a_tied_base_is_refused_before_anything_is_written(tmp_path, monkeypatch, memory):
    base = tiny_later_qwen(tmp_path / "base", "qwen2", True)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(model_writer, "write_weights", lambda *arguments: pytest.fail("written"))
    if memory == "little":
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**5))
    with pytest.raises(UserError, match="trained the head .lm_head.weight. apart from the embedding, and in this base both"):
        merge.merge(tmp_path / "adapter", tmp_path / "out", base=str(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merge_of_a_merge_is_refused(trained, tmp_path):
    _, adapter, _ = trained
    merge.merge(adapter, tmp_path / "out")
    with pytest.raises(UserError, match="no adapter_config.json there - .* a full model needs no merge"):
        merge.merge(tmp_path / "out", tmp_path / "again")


FILES = SAVED_CODE | {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json", "training.json",
}  # fmt: skip


@pytest.mark.parametrize("size,weights", [("2GB", {"model.safetensors"}), ("8MB", None)])
def test_the_files_of_a_merged_folder(trained, tmp_path, size, weights):
    """In shards, too; and the README says what it is."""
    _, adapter, _ = trained
    merge.merge(adapter, tmp_path / "out", max_shard_size=size)
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == FILES | (weights or shards | {"model.safetensors.index.json"})
    assert "The LoRA adapter adapter merged into base" in (tmp_path / "out" / "README.md").read_text()
    assert all(not path.is_symlink() for path in (tmp_path / "out").iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float32 and loaded.config.use_cache


def test_an_adapter_of_other_hands_chats(trained, tmp_path):
    """No record, no chat settings, and peft's older file; its base is a base model."""
    _, adapter, base = trained
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    torch.save(load_file(adapter / "adapter_model.safetensors"), foreign / "adapter_model.bin")
    assert GenerationConfig.from_pretrained(base).chat_format == "raw"
    assert merge.merge(foreign, tmp_path / "out") < 1e-4
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.chat_format == "chatml" and 151645 in settings.eos_token_id


def test_a_model_that_memory_does_not_hold_is_compared_block_by_block(trained, tmp_path, monkeypatch, capsys):
    """And what was written wrong is found."""
    _, adapter, _ = trained
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**7))
    assert merge.merge(adapter, tmp_path / "out") < 1e-5
    assert "on a few questions, block by block: perplexity" in capsys.readouterr().err
    right = shards.ShardWriter.add
    monkeypatch.setattr(shards.ShardWriter, "add", lambda self, name, tensor: right(self, name, tensor * 1.01))
    with pytest.raises(RuntimeError, match="is not what was written; the disk or its quota may be at fault"):
        merge.merge(adapter, tmp_path / "wrong")


FRESH = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32")
prompt = tokenizer.apply_chat_template(json.loads(sys.argv[2]), add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, do_sample=False, max_new_tokens=8)
assert not {"finetune", "qwen_model"} & set(sys.modules)
print(json.dumps(answer.tolist()))
"""


def test_a_fresh_python_without_this_toolkit_gives_the_adapters_answer(trained, tmp_path, tokenizer):
    lora, adapter, _ = trained
    merge.merge(adapter, tmp_path / "out")
    asked = [{"role": "user", "content": "你好, who are you?"}]
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "out"), json.dumps(asked)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    expected = lora.generate(**prompt, do_sample=False, max_new_tokens=8).tolist()
    assert json.loads(done.stdout) == expected and len(expected[0]) > prompt["input_ids"].shape[1]


KILLED = """
import os, signal, sys
from pathlib import Path
from finetune.folders import model_writer
from finetune.merge import __main__ as merge
replace = os.replace
def kill(*arguments, **settings):
    if sys.argv[1] == "proof" and not str(arguments[1]).endswith("config.json"):
        return replace(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
module, name = {"frame": (model_writer, "write_weights"), "weights": (merge, "prove"), "proof": (os, "replace")}[sys.argv[1]]
setattr(module, name, kill)
merge.merge(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("moment", ["frame", "weights", "proof"])
def test_a_killed_merge_leaves_nothing_that_loads(trained, tmp_path, moment):
    _, adapter, _ = trained
    command = [warm.python(), "-c", KILLED, moment, str(adapter), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    assert (tmp_path / "out.unfinished" / "model.safetensors").exists() == (moment != "frame")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out.unfinished")


def test_refused_folders_raise_user_errors(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        merge.check_folders(tmp_path, tmp_path / "out")
