"""python -m finetune.export: the same numbers in the other layout, without our code; there and back; refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import TRAINED, change_json, lively_checkpoint, published_gptq, refused, some_ids
from safetensors.torch import load_file, save_file
from tiny import SAVED_CODE, tiny_gptq, tiny_later_qwen
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

import qwen_model
from finetune.errors import UserError
from finetune.export import __main__ as export
from finetune.export import export_config, export_proof, layouts
from finetune.folders import gptq_format, shards
from finetune.folders.shards import Shards
from finetune.model import loading
from qwen_model import chatml
from qwen_model.configuration_qwen import QWenConfig

GOLDEN = Path(__file__).parent.parent / "golden"
CHAT = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144, "top_p": 0.5}
QWEN2_FILES = {
    "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training.json",
}  # fmt: skip
QWEN_FILES = SAVED_CODE | {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json", "training.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """chat, a chat model; chat-q2, its export; chat-back, the way back."""
    qwen_model.register()
    place = tmp_path_factory.mktemp("export")
    lively_checkpoint(place / "chat")
    (place / "chat" / "generation_config.json").write_text(json.dumps(CHAT))
    export.main([str(place / "chat"), str(place / "chat-q2"), "--to", "qwen2"])
    export.main([str(place / "chat-q2"), str(place / "chat-back"), "--to", "qwen", "--max_shard_size", "8MB"])
    return place


def tensors(folder):
    return dict(shards.read_tensors(folder))


def logits(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- the numbers


def test_the_published_codes_numbers():
    """Golden logits of the published code, from the golden checkpoint's tensors in the other layout."""
    config = QWenConfig.from_pretrained(GOLDEN / "nano_checkpoint")
    with Shards(GOLDEN / "nano_checkpoint") as shards:
        converted = layouts.ConvertedTensors(shards, "qwen")
        weights = {name: converted[name] for name in converted}
    qwen2 = Qwen2ForCausalLM(export_config.to_qwen2(config, GOLDEN)).eval()
    qwen2.load_state_dict(weights, strict=True)
    golden = load_file(GOLDEN / "nano.safetensors")
    with torch.no_grad():
        found = qwen2(golden["short.input_ids"]).logits
    torch.testing.assert_close(found, golden["short.logits"], atol=1e-4, rtol=0)


def test_logits_are_equal_up_to_the_length_that_is_stated_and_not_beyond(place):
    config = read(place / "chat-q2" / "config.json")
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert config["max_position_embeddings"] == TRAINED
    ids = some_ids(TRAINED)
    expected = logits(place / "chat", ids)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits(place / "chat-q2", ids), expected, atol=1e-5, rtol=1e-5)
    ids = some_ids(TRAINED + 8)
    assert (logits(place / "chat-q2", ids) - logits(place / "chat", ids)).abs().max() > 0.01


def test_without_ntk_and_logn_every_length_is_exact(tmp_path, capsys):
    off = {"use_dynamic_ntk": False, "use_logn_attn": False, "max_position_embeddings": 96, "rotary_emb_base": 1e6}
    lively_checkpoint(tmp_path / "base", **off)
    export.export(tmp_path / "base", tmp_path / "out", "qwen2")
    config = read(tmp_path / "out" / "config.json")
    assert config["max_position_embeddings"] == 96
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6  # transformers 4 and 5
    ids = some_ids(100)
    torch.testing.assert_close(logits(tmp_path / "out", ids), logits(tmp_path / "base", ids), atol=1e-5, rtol=1e-5)
    assert "max_position_embeddings" not in capsys.readouterr().err


@pytest.mark.parametrize("left_out", ["use_dynamic_ntk", "use_logn_attn"])
def test_either_of_ntk_and_logn_limits_what_is_exact(left_out):
    both = {"use_dynamic_ntk": True, "use_logn_attn": True, "seq_length": 64, "max_position_embeddings": 96}
    assert export_config.exact_length(QWenConfig(**both | {left_out: False})) == 64


def test_the_norms_epsilon_goes_along():
    """Both layouts' default is the same, so that a lost one would show nowhere else."""
    made = export_config.to_qwen2(QWenConfig(layer_norm_epsilon=3e-5), None)
    assert made.rms_norm_eps == 3e-5


FRESH = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

def answer(folder, **code):
    tokenizer = AutoTokenizer.from_pretrained(folder, **code)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **code)
    asked = [{"role": "user", "content": "你好, who are you?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    return [prompt["input_ids"].tolist(), answer.tolist()]

sys.modules["tiktoken"] = None  # as if it were not installed
plain = answer(sys.argv[1])
del sys.modules["tiktoken"]
print(json.dumps([plain, answer(sys.argv[2], trust_remote_code=True)]))
assert not {"finetune", "qwen_model"} & set(sys.modules)
"""


def test_a_fresh_python_without_this_toolkit_gives_the_same_answer(place, tmp_path, tokenizer):
    """The export without any remote code; what came back with its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH, str(place / "chat-q2"), str(place / "chat-back")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prompt = chatml.render_prompt(tokenizer, [{"role": "user", "content": "你好, who are you?"}])
    base = AutoModelForCausalLM.from_pretrained(place / "chat", dtype=torch.float32).eval()
    expected = base.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12).tolist()
    assert len(expected[0]) > len(prompt) + 1
    assert json.loads(done.stdout) == [[[prompt], expected]] * 2


# ---- the folder


def test_the_files(place):
    assert {path.name for path in (place / "chat-q2").iterdir()} == QWEN2_FILES | {"model.safetensors"}
    shards = {path.name for path in (place / "chat-back").glob("model*")}
    assert {path.name for path in (place / "chat-back").iterdir()} == QWEN_FILES | shards
    assert "model.safetensors.index.json" in shards and len(shards) > 3
    assert not any(path.is_symlink() for path in (place / "chat-q2").iterdir())
    assert "chat, in the layout of qwen2" in (place / "chat-q2" / "README.md").read_text()
    assert read(place / "chat-q2" / "training.json")["exported"]["from"] == str(place / "chat")


def test_what_generation_config_says(place, tmp_path):
    chat = read(place / "chat-q2" / "generation_config.json")
    stops = {"eos_token_id": [151645, 151644, 151643], "pad_token_id": 151643}
    assert chat == stops | {"top_p": 0.5}
    assert read(place / "chat-q2" / "config.json")["eos_token_id"] == 151645
    assert read(place / "chat-q2" / "tokenizer_config.json")["eos_token"] == "<|im_end|>"
    assert read(place / "chat-back" / "generation_config.json") == CHAT
    settings = {"do_sample": True, "top_k": 0, "repetition_penalty": 1.1, "chat_format": "raw", "max_new_tokens": 512}
    base = export_config.generation_config(settings | {"eos_token_id": 151643}, tmp_path, "qwen", {})
    kept = {"do_sample": True, "top_k": 0, "repetition_penalty": 1.1}
    assert base == kept | {"eos_token_id": 151643, "pad_token_id": 151643}


def test_settings_that_changed_since_the_export_are_not_undone(place):
    record, settings = read(place / "chat-q2" / "training.json"), read(place / "chat-q2" / "generation_config.json")
    again = export_config.generation_config(settings | {"top_p": 0.9}, place / "chat-q2", "qwen2", record)
    assert (again["top_p"], again["chat_format"], again["eos_token_id"]) == (0.9, "chatml", [151645, 151644, 151643])
    assert (again["max_window_size"], again["max_new_tokens"]) == (TRAINED, 512)


def test_there_and_back_is_the_same(place):
    expected, found = tensors(place / "chat"), tensors(place / "chat-back")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    there, back = (place / name / "qwen.tiktoken" for name in ("chat", "chat-back"))
    assert there.read_bytes() == back.read_bytes()
    config = read(place / "chat-back" / "config.json")
    assert {key: config[key] for key in read(place / "chat" / "config.json")} == read(place / "chat" / "config.json")
    assert config["use_dynamic_ntk"] and config["seq_length"] == TRAINED


def test_bits_and_types_stay(tmp_path, capsys):
    """bfloat16 and a .bin file; and what is said on the way."""
    folder = lively_checkpoint(tmp_path / "base", use_logn_attn=False, max_position_embeddings=96)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    export.export(folder, tmp_path / "out", "qwen2")
    said = capsys.readouterr().err
    what = f"Qwen2 has no use_dynamic_ntk, in effect beyond {TRAINED} tokens"
    assert f"{what}: max_position_embeddings is set to {TRAINED}, up to which both compute the same" in said
    assert "both layouts, computed in float32 on 4 prompts: logits differ by at most" in said
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    config = read(tmp_path / "out" / "config.json")
    assert (config["dtype"], config["max_position_embeddings"]) == ("bfloat16", TRAINED)
    fused = weights["transformer.h.1.attn.c_attn.weight"]
    assert torch.equal(found["model.layers.1.self_attn.k_proj.weight"], fused[16:32])
    assert torch.equal(found["model.layers.1.mlp.gate_proj.weight"], weights["transformer.h.1.mlp.w2.weight"])
    (tmp_path / "out" / "training.json").unlink()  # of other hands
    export.export(tmp_path / "out", tmp_path / "back", "qwen")
    back, config = tensors(tmp_path / "back"), read(tmp_path / "back" / "config.json")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    assert (config["bf16"], config["use_dynamic_ntk"], config["seq_length"]) == (True, False, TRAINED)
    assert read(tmp_path / "back" / "generation_config.json")["chat_format"] == "raw"


# ---- GPTQ


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_there_and_back(tmp_path, bits):
    published_gptq(tmp_path / "int", bits, twin=tmp_path / "twin")
    export.export(tmp_path / "int", tmp_path / "q2", "qwen2")
    found, plain = tensors(tmp_path / "q2"), tensors(tmp_path / "twin")
    for i in range(2):
        block, fused = f"model.layers.{i}", plain[f"transformer.h.{i}.attn.c_attn.weight"]
        expected = dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), fused.split(32)))
        for old, new in {"w1": "up_proj", "w2": "gate_proj", "c_proj": "down_proj"}.items():
            expected[f"mlp.{new}"] = plain[f"transformer.h.{i}.mlp.{old}.weight"]
        for layer, weight in expected.items():
            parts = {part: found[f"{block}.{layer}.{part}"] for part in gptq_format.PARTS}
            assert torch.equal(gptq_format.dequantize(**parts, bits=bits), weight)
        assert torch.equal(
            found[f"{block}.self_attn.v_proj.bias"].float(), plain[f"transformer.h.{i}.attn.c_attn.bias"][64:]
        )
        assert f"{block}.mlp.up_proj.bias" not in found
    config, stated = read(tmp_path / "q2" / "config.json"), read(tmp_path / "int" / "quantize_config.json")
    assert config["quantization_config"] == {"quant_method": "gptq"} | stated and config["dtype"] == "float16"
    assert read(tmp_path / "q2" / "quantize_config.json") == stated
    export.export(tmp_path / "q2", tmp_path / "back", "qwen")
    before, after = tensors(tmp_path / "int"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()  # biases of zero, too
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.slow
def test_an_exported_gptq_folder_loads_and_answers(tmp_path):
    published_gptq(tmp_path / "int", 4, twin=tmp_path / "twin")
    export.export(tmp_path / "int", tmp_path / "q2", "qwen2")
    quantized = loading.load_weights(tmp_path / "q2", torch.float32, half_on_cuda=False).eval()
    assert type(quantized.model.layers[0].self_attn.q_proj).__name__ == "FrozenLinear"
    with torch.no_grad():
        found = quantized(some_ids(40)).logits
    torch.testing.assert_close(found, logits(tmp_path / "twin", some_ids(40)), atol=1e-4, rtol=1e-4)


def test_the_settings_of_gptq_name_the_new_layers(tmp_path):
    groups = [["attn.c_attn"], ["mlp.w1", "mlp.w2"], ["mlp.c_proj"]]
    found = export_config.quantization_config({"bits": 4, "modules_in_block_to_quantize": groups}, "qwen", tmp_path)
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    new = [qkv, ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]
    assert found == {"bits": 4, "modules_in_block_to_quantize": new}
    assert export_config.quantization_config(found, "qwen2", tmp_path)["modules_in_block_to_quantize"] == groups
    with pytest.raises(UserError, match=r"rules for single layers \(dynamic\)"):
        export_config.quantization_config({"dynamic": {"-:.*": {}}}, "qwen", tmp_path)


# ---- refusals: a line, exit code 2, and no folder


@pytest.mark.parametrize(
    "arguments,line",
    [
        (["{chat-q2}", "{tmp}/o", "--to", "qwen2"], "{chat-q2}: is in that layout already (model_type qwen2) - use it"),
        (["{chat}", "{tmp}/o", "--to", "qwen"], "{chat}: is in that layout already (model_type qwen) - use it"),
        (["{tmp}", "{tmp}-o", "--to", "qwen2"], "no config.json there - give the folder of a model, or of a LoRA"),
        (["{chat}", "{chat-q2}", "--to", "qwen2"], "exists and is not empty - give a new folder for what is exported"),
        (["{chat}", "{chat}/o", "--to", "qwen2"], "lies in {chat}, which is read - give a new folder"),
        (["{chat}", "{tmp}/o", "--to", "qwen2", "--base", "x"], "--base x: {chat} is a whole model, which has none"),
        (["{chat}", "{tmp}/o", "--to", "qwen2", "--max_shard_size", "2"], '--max_shard_size: "2" is no size'),
    ],
)
def test_arguments_that_cannot_work(place, tmp_path, capsys, arguments, line):
    places = {"chat": place / "chat", "chat-q2": place / "chat-q2", "tmp": tmp_path}
    assert line.format(**places) in refused(capsys, *(word.format(**places) for word in arguments))
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_one_file(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    words = [str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "qwen2", "--max_shard_size", "1GB"]
    assert f"--max_shard_size 1GB: {tmp_path}/adapter is an adapter, which is written as one file - leave" in refused(capsys, *words)


QWEN2_ONLY = {
    "use_sliding_window": ({"use_sliding_window": True, "layer_types": None}, "some layers use sliding-window attention"),
    "tied": ({"tie_word_embeddings": True}, "embedding and head are tied (tie_word_embeddings)"),
    "act": ({"hidden_act": "gelu"}, "hidden_act is gelu, and first-generation Qwen has silu"),
    "rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type is linear, and first-generation Qwen has default",
    ),
    "qwen3": ({"model_type": "qwen3"}, "model_type is qwen3, and only Qwen1.5, or an export of"),
    "size": ({"intermediate_size": 32}, "mlp.gate_proj.weight is [48, 16], not [32, 16] (and 5 more) - take weights and config.json of one checkpoint"),
}


@pytest.mark.parametrize("case", QWEN2_ONLY)
def test_what_first_generation_qwen_does_not_have(place, tmp_path, capsys, case):
    changes, line = QWEN2_ONLY[case]
    folder = shutil.copytree(place / "chat-q2", tmp_path / "model")
    change_json(folder / "config.json", **changes)
    assert line in refused(capsys, folder, tmp_path / "out", "--to", "qwen")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_grouped_queries_and_another_vocabulary(tmp_path, capsys):
    grouped = tiny_later_qwen(tmp_path / "grouped")
    assert "4 query heads share 2 key/value heads" in refused(capsys, grouped, tmp_path / "out", "--to", "qwen")
    later = tiny_later_qwen(tmp_path / "qwen3", "qwen3")
    line = refused(capsys, later, tmp_path / "out", "--to", "qwen2")
    assert "only first-generation Qwen can be exported to qwen2 - use it as it is: servers support it" in line


@pytest.mark.parametrize("case", ["bias", "unknown", "missing", "third", "scaling", "awq"])
def test_what_qwen2_has_no_place_for(place, tmp_path, capsys, case):
    folder = shutil.copytree(place / "chat-q2" if case == "third" else place / "chat", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    if case == "bias":
        layers = [name for name in weights if name.endswith(("c_proj.weight", "w1.weight", "w2.weight"))]
        weights |= {name.replace("weight", "bias"): torch.zeros(len(weights[name])) for name in layers}
        weights["transformer.h.0.mlp.w1.bias"] = torch.tensor([0.0] * 47 + [1e-3])
        change_json(folder / "config.json", no_bias=False)
        line = "transformer.h.0.mlp.w1.bias is not zero, and the layout of qwen2 has no bias there - it cannot be exported"
    elif case == "unknown":
        weights["transformer.h.0.attn.scale"] = torch.ones(1)
        line = "holds transformer.h.0.attn.scale, which has no name in the layout of qwen2 - give a checkpoint as"
    elif case == "missing":
        del weights["transformer.h.1.ln_2.weight"]
        line = "misses transformer.h.1.ln_2.weight of 19 tensors - download it again"
    elif case == "third":
        del weights["model.layers.1.self_attn.k_proj.weight"]
        line = "misses model.layers.1.self_attn.k_proj.weight of 27 tensors - download it again"
    elif case == "scaling":
        change_json(folder / "config.json", scale_attn_weights=False)
        line = "scale_attn_weights is false, and Qwen2 always scales"
    else:
        change_json(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
        line = "is quantized (awq) - give another checkpoint"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert line in refused(capsys, folder, tmp_path / "out", "--to", "qwen" if case == "third" else "qwen2")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_biases_of_gptq_that_count_are_refused(tmp_path, capsys):
    tiny_gptq(tmp_path / "int", 4)
    line = refused(capsys, tmp_path / "int", tmp_path / "out", "--to", "qwen2")
    assert ".bias is not zero, and the layout of qwen2 has no bias there" in line


@pytest.mark.parametrize("mistake", ["gate", "thirds"])
def test_an_export_that_computes_something_else_is_not_written(place, tmp_path, monkeypatch, mistake):
    """The proof finds w1 in the place of w2, and key in the place of query."""
    if mistake == "gate":
        wrong = layouts.TO_QWEN2 | {"mlp.w1": ("mlp.gate_proj",), "mlp.w2": ("mlp.up_proj",)}
    else:
        wrong = layouts.TO_QWEN2 | {layouts.FUSED: (layouts.QKV[1], layouts.QKV[2], layouts.QKV[0])}
    monkeypatch.setitem(layouts.KINDS, "qwen", wrong)
    with pytest.raises(RuntimeError, match="the logits of the two layouts differ by .* nothing was written"):
        export.export(place / "chat", tmp_path / "out", "qwen2")
    assert not list(tmp_path.iterdir())


def test_tokens_that_differ_are_found(tokenizer):
    class Other:
        def __call__(self, text):
            return {"input_ids": [0]}

    with pytest.raises(RuntimeError, match="the two tokenizers differ on .* nothing was written"):
        export_proof.check_tokens(tokenizer, Other())


def test_help_explains(capsys):
    with pytest.raises(SystemExit):
        export.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "for an adapter: its base, exported to the same layout" in said and "no dynamic NTK and no LogN" in said
