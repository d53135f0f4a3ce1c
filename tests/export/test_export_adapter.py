"""An adapter of one layout computes the same in the other: with peft, on the bundled model and transformers' Qwen2."""

import json
import shutil

import pytest
import torch
from exports import change_json, lively_checkpoint, published_gptq, refused, some_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import qwen_model
from finetune.errors import UserError
from finetune.export import __main__ as export
from finetune.export import export_adapter, layouts
from finetune.export.converted_adapter import ConvertedAdapter
from finetune.folders import adapter_base, fingerprints
from finetune.merge import __main__ as merge
from finetune.merge import formulas
from finetune.model import loading
from finetune.steps import saving

ALL = {
    "qwen": ["c_attn", "c_proj", "w1", "w2"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj"],
}
IDS = some_ids(20, seed=3)
ROWS = [5, 151644, 151645]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{layout: folder}: a model and its export."""
    qwen_model.register()
    place = tmp_path_factory.mktemp("bases")
    lively_checkpoint(place / "qwen")
    export.export(place / "qwen", place / "qwen2", "qwen2")
    return {"qwen": place / "qwen", "qwen2": place / "qwen2"}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(some_model):
    with torch.no_grad():
        return some_model(torch.cat([IDS, torch.tensor([ROWS])], 1)).logits


def trained(base, **settings):
    """A LoRA model on `base`, all of whose trained tensors do something."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | settings
    lora = get_peft_model(loaded(base), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return lora


def moved(adapter, base, layout, folder):
    """The adapter's folder of `layout` in the other one, as far as ConvertedAdapter makes it. -> its config"""
    converted = ConvertedAdapter(formulas.Adapter(adapter), layout, blocks=2)
    folder.mkdir()
    config = converted.config(str(base))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(converted.stored(), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return config


def saved(lora, folder):
    """As the toolkit saves it."""
    lora.save_pretrained(folder, save_embedding_layers=False)
    return folder


FIRST = {
    "all": {"target_modules": ALL["qwen"], "bias": "all"},
    "attention's c_proj": {"target_modules": ["attn.c_proj"]},
    "the MLP's c_proj": {"target_modules": r".*\.mlp\.c_proj"},
    "one block": {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    "not in one block": {"target_modules": ["c_attn", "w1"], "exclude_modules": ["h.0.attn.c_attn"], "bias": "all"},
    "patterns": {
        "target_modules": ALL["qwen"],
        "rank_pattern": {"c_attn": 2, "h.1.mlp.c_proj": 6, "attn.c_proj": 3},
        "alpha_pattern": {"w1": 10, r"h\.0\.attn\.c_attn": 5},
    },
    "dora": {"target_modules": ALL["qwen"], "use_dora": True, "bias": "lora_only"},
    "rslora": {"target_modules": ALL["qwen"], "use_rslora": True},
    "rows": {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": ROWS, "lm_head": [5]}},
    "embeddings": {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head", "ln_f"]},
    "rows of the embedding": {"target_modules": ["w2"], "trainable_token_indices": ROWS},
    "the head": {"target_modules": ["w2", "lm_head"]},
}


@pytest.mark.parametrize("case", FIRST)
def test_from_first_generation_and_back(bases, tmp_path, case):
    """Exactly the layers that were adapted are adapted, and the way back gives the same tensors."""
    lora = trained(bases["qwen"], **FIRST[case])
    adapter = saved(lora, tmp_path / "qwen")
    expected = logits(lora)
    with lora.disable_adapter():
        assert (logits(lora) - expected).abs().max() > 0.05
    moved(adapter, bases["qwen2"], "qwen", tmp_path / "qwen2")
    there = PeftModel.from_pretrained(loaded(bases["qwen2"]), tmp_path / "qwen2").eval()
    torch.testing.assert_close(logits(there), expected, atol=2e-5, rtol=1e-5)
    moved(tmp_path / "qwen2", bases["qwen"], "qwen2", tmp_path / "back")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    back = PeftModel.from_pretrained(loaded(bases["qwen"]), tmp_path / "back").eval()
    assert torch.equal(logits(back), expected)
    adapted = [{name for name, _ in found.named_parameters() if "lora" in name} for found in (lora, back)]
    assert adapted[0] == adapted[1]


LATER = {
    "all": {"target_modules": "all-linear", "bias": "all"},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "q and v of one block": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    "ranks and scales": {
        "target_modules": ALL["qwen2"],
        "rank_pattern": {"q_proj": 2, "v_proj": 7},
        "alpha_pattern": {"k_proj": 1, r"layers\.1\.self_attn\.v_proj": 20},
    },
    "dora": {"target_modules": ALL["qwen2"], "use_dora": True, "bias": "lora_only"},
    "rslora": {"target_modules": ["q_proj", "k_proj", "down_proj"], "use_rslora": True},
    "embeddings": {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "rows": {"target_modules": ["o_proj"], "trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
}


@pytest.mark.parametrize("case", LATER)
def test_from_qwen2(bases, tmp_path, case):
    lora = trained(bases["qwen2"], **LATER[case])
    expected = logits(lora)
    with lora.disable_adapter():
        assert (logits(lora) - expected).abs().max() > 0.05
    moved(saved(lora, tmp_path / "qwen2"), bases["qwen"], "qwen2", tmp_path / "qwen")
    there = PeftModel.from_pretrained(loaded(bases["qwen"]), tmp_path / "qwen").eval()
    torch.testing.assert_close(logits(there), expected, atol=2e-5, rtol=1e-5)


def test_the_rank_of_a_diagonal(bases, tmp_path):
    """Three As make three times the rank, at the same scale; q and v alone twice, with rows of zeros for k."""
    for names, rank in ((["q_proj", "k_proj", "v_proj", "up_proj"], 12), (["q_proj", "v_proj", "up_proj"], 8)):
        folder = saved(trained(bases["qwen2"], target_modules=names), tmp_path / f"{rank}")
        config = moved(folder, bases["qwen"], "qwen2", tmp_path / f"{rank}-qwen")
        sizes = {config["r"]: config["lora_alpha"], rank: 6 * rank // 4, 4: 6}
        assert sizes == {rank: 6 * rank // 4, 4: 6} and set(config["target_modules"]) == {"c_attn", "w1"}
        tensors = load_file(tmp_path / f"{rank}-qwen" / "adapter_model.safetensors")
        B = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
        assert B.shape == (48, rank) and B[16:32].any() == (rank == 12) and not B[:16, 4:].any()


def test_one_A_at_different_scales(bases, tmp_path):
    """An exported adapter whose query somebody has made stronger is no longer one layer's."""
    folder = saved(trained(bases["qwen"], target_modules=["c_attn"]), tmp_path / "first")
    moved(folder, bases["qwen2"], "qwen", tmp_path / "qwen2")
    change_json(tmp_path / "qwen2" / "adapter_config.json", alpha_pattern={"q_proj": 30})
    expected = logits(PeftModel.from_pretrained(loaded(bases["qwen2"]), tmp_path / "qwen2").eval())
    config = moved(tmp_path / "qwen2", bases["qwen"], "qwen2", tmp_path / "qwen")
    there = PeftModel.from_pretrained(loaded(bases["qwen"]), tmp_path / "qwen").eval()
    torch.testing.assert_close(logits(there), expected, atol=2e-5, rtol=1e-5)
    assert config["r"] == 12


def test_names_that_mean_one_c_proj(bases, tmp_path):
    lora = trained(bases["qwen2"], target_modules=["o_proj"])
    config = moved(saved(lora, tmp_path / "a"), bases["qwen"], "qwen2", tmp_path / "b")
    assert config["target_modules"] == ["attn.c_proj"]
    there = PeftModel.from_pretrained(loaded(bases["qwen"]), tmp_path / "b")
    adapted = {name.split(".lora_")[0] for name, _ in there.named_parameters() if ".lora_" in name}
    assert len(adapted) == 2 and all(name.endswith("attn.c_proj") for name in adapted)


# ---- what cannot be one layer


@pytest.mark.parametrize(
    "settings,line",
    [
        ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, "vector of block 0 is trained for q_proj, v_proj"),
        ({"target_modules": ["k_proj"], "bias": "lora_only"}, "bias of block 0 is trained for k_proj only"),
        ({"target_modules": ["k_proj"], "modules_to_save": ["q_proj"]}, "of block 0 is trained for q_proj only"),
        ({"target_modules": ["k_proj", "embed_tokens"]}, "holds model.embed_tokens.lora_embedding_A, which the layout"),
    ],
)
def test_what_c_attn_cannot_hold(bases, tmp_path, settings, line):
    folder = saved(trained(bases["qwen2"], **settings), tmp_path / "a")
    with pytest.raises(UserError, match=line):
        ConvertedAdapter(formulas.Adapter(folder), "qwen2", blocks=2)


def test_biases_that_qwen2_does_not_have(bases, tmp_path):
    folder = saved(trained(bases["qwen"], target_modules=["w1"]), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.0.mlp.w1.base_layer.bias"
    for value in (0.0, 1.0):
        save_file(tensors | {name: torch.full((48,), value)}, folder / "adapter_model.safetensors")
        if value:
            with pytest.raises(UserError, match=r"mlp.up_proj.bias \(not zero\), which the layout of qwen2 does not have"):
                ConvertedAdapter(formulas.Adapter(folder), "qwen", blocks=2)
        else:
            converted = ConvertedAdapter(formulas.Adapter(folder), "qwen", blocks=2)
            assert not any("bias" in name for name in converted.tensors)


# ---- the whole way: python -m finetune.export ADAPTER OUT --to qwen2 --base EXPORTED_BASE


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory, tokenizer):
    """(a LoRA model, the folder that a run saves of it)"""
    lora = trained(bases["qwen"], target_modules=ALL["qwen"], use_dora=True, trainable_token_indices={"wte": ROWS})
    loading.set_chat_settings(lora, tokenizer)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    base = {"name": str(bases["qwen"]), "fingerprint": fingerprints.of_model(bases["qwen"])}
    saving.save_final(lora, tokenizer, folder, record={"base": base, "seed": 7})
    return lora, folder


FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "training.json",
}  # fmt: skip


def test_the_whole_way_and_back(bases, adapter, tmp_path, capsys):
    lora, folder = adapter
    out, back = tmp_path / "out", tmp_path / "back"
    export.main([str(folder), str(out), "--to", "qwen2", "--base", str(bases["qwen2"])])
    assert "both layouts, computed in float32 on 4 prompts" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == FILES and not any(path.is_symlink() for path in out.iterdir())
    there = PeftModel.from_pretrained(loaded(bases["qwen2"]), out).eval()
    torch.testing.assert_close(logits(there), logits(lora), atol=2e-5, rtol=1e-5)
    assert GenerationConfig.from_pretrained(out).eos_token_id == [151645, 151644, 151643]
    record = json.loads((out / "training.json").read_text())
    assert record["base"]["fingerprint"] == fingerprints.of_model(bases["qwen2"]) and record["seed"] == 7
    assert merge.merge(out, tmp_path / "merged") < 1e-4  # finds its base, and takes it for the right one
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(lora), atol=1e-4, rtol=1e-4)
    export.export(out, back, "qwen", base=str(bases["qwen"]))
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    settings = [json.loads((place / "generation_config.json").read_text()) for place in (folder, back)]
    assert settings[0] == settings[1] and settings[1]["chat_format"] == "chatml"
    assert adapter_base.find(back) == bases["qwen"].resolve()


@pytest.mark.parametrize(
    "arguments,line",
    [
        (
            ["{adapter}", "{tmp}/o", "--to", "qwen2"],
            "{adapter}: an adapter is exported for an exported base - export its base first (python -m finetune.export {qwen} "
            "EXPORTED_BASE --to qwen2), then add --base EXPORTED_BASE",
        ),
        (
            ["{adapter}", "{tmp}/o", "--to", "qwen2", "--base", "{qwen}"],
            "--base {qwen}: is in the layout of qwen, not qwen2 - export it (python -m finetune.export {qwen} EXPORTED_BASE --to",
        ),
        (["{adapter}", "{tmp}/o", "--to", "qwen", "--base", "{qwen}"], "{adapter}: is in that layout already - use i"),
        (["{adapter}", "{tmp}/o", "--to", "qwen2", "--base", "{tmp}"], "--base {tmp}: no config.json there - give th"),
        (["{adapter}", "{qwen2}/o", "--to", "qwen2", "--base", "{qwen2}"], "lies in {qwen2}, which is read - give a n"),
    ],
)
def test_arguments_that_cannot_work(bases, adapter, tmp_path, capsys, arguments, line):
    places = bases | {"adapter": adapter[1], "tmp": tmp_path}
    assert line.format(**places) in refused(capsys, *(word.format(**places) for word in arguments))
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused(bases, adapter, tmp_path, capsys):
    """One value in the first row of one tensor is other; sizes are the same."""
    other = shutil.copytree(bases["qwen2"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, adapter[1], tmp_path / "out", "--to", "qwen2", "--base", other)
    assert "the adapter was made for another base (qwen, hidden size 16" in line
    assert f"{other} is an export of qwen, hidden size 16" in line and "give the export of the adapter's own" in line
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_adapters_that_no_export_can_take(bases, adapter, tmp_path):
    folder = shutil.copytree(adapter[1], tmp_path / "adapter")
    arguments = (tmp_path / "out", "qwen2", str(bases["qwen2"]))
    (folder / "pissa_start.safetensors").touch()
    with pytest.raises(UserError, match="a checkpoint of PiSSA, .* - export the run's result instead"):
        export_adapter.check_adapter(merging_adapter(folder), "qwen2")
    (folder / "pissa_start.safetensors").unlink()
    (folder / "training.json").unlink()  # which has the hashes of what changes here
    change_json(folder / "adapter_config.json", peft_type="IA3")
    with pytest.raises(UserError, match="an adapter of type IA3, not LoRA"):
        export.export(folder, *arguments)
    change_json(folder / "adapter_config.json", peft_type="LORA")
    save_file({"base_model.model.h.0.fc.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds h.0.fc.lora_A.weight, which belongs to no layer of first-generation Qwen"):
        export.export(folder, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def merging_adapter(folder):
    found = formulas.Adapter.__new__(formulas.Adapter)
    found.folder, found.tensors = folder, {}
    return found


def test_an_adapter_over_gptq_knows_its_exported_base(tmp_path, tokenizer, capsys):
    """Also where biases of zero were left out; and its 16-bit sibling passes for it by its sizes, as for a merge."""
    qwen_model.register()
    published_gptq(tmp_path / "int", 4, twin=tmp_path / "twin")
    lora = trained(tmp_path / "twin", target_modules=["c_attn"])
    base = {"name": str(tmp_path / "int"), "fingerprint": fingerprints.of_model(tmp_path / "int")}
    saving.save_final(lora, tokenizer, tmp_path / "lora", record={"base": base})
    for name in ("int", "twin"):
        export.export(tmp_path / name, tmp_path / f"{name}-q2", "qwen2")
        capsys.readouterr()
        export.export(tmp_path / "lora", tmp_path / f"lora-{name}", "qwen2", base=str(tmp_path / f"{name}-q2"))
        assert ("taken for its 16-bit sibling" in capsys.readouterr().err) == (name == "twin")
    there = PeftModel.from_pretrained(loaded(tmp_path / "twin-q2"), tmp_path / "lora-int").eval()
    torch.testing.assert_close(logits(there), logits(lora), atol=2e-5, rtol=1e-5)


def test_an_adapter_that_computes_something_else_is_not_written(bases, adapter, tmp_path, monkeypatch):
    """The third of the rows that is the key's goes to the query."""
    split = layouts.split
    monkeypatch.setattr(layouts, "split", lambda tensor, part: split(tensor, part)[::-1])
    with pytest.raises(RuntimeError, match="the logits of the two layouts differ"):
        export.export(adapter[1], tmp_path / "out", "qwen2", base=str(bases["qwen2"]))
    assert not list(tmp_path.iterdir())


def test_until_it_is_proven_it_does_not_load(bases, adapter, tmp_path, monkeypatch):
    """Its config is a link into the memory of this process, as new_folder's test shows of a kill."""
    seen = []
    monkeypatch.setattr(export_adapter, "prove", lambda staging, *_: seen.append((staging, is_link(staging))) or 0.0)
    export.export(adapter[1], tmp_path / "out", "qwen2", base=str(bases["qwen2"]))
    assert seen == [(tmp_path / "out.unfinished", True)] and not is_link(tmp_path / "out")


def is_link(folder) -> bool:
    return (folder / "adapter_config.json").is_symlink()
