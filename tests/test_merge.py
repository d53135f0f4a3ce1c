"""python -m finetune.merge: the merged folder is the adapter's model, or there is no folder."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import small_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import qwen_model
from finetune import adapters, checkpoint, merge, model
from finetune.args import LoraArguments
from finetune.errors import UserError


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
    model.set_chat_settings(lora, tokenizer)
    record = {"base": {"name": str(base), "fingerprint": checkpoint.fingerprint(base)}}
    checkpoint.save_final(lora, tokenizer, place / "adapter", record=record)
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
    assert "logits differ from the adapter's by at most" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.unfinished"))


BESIDE = {
    "rows": {"train_embeddings": "chat_rows", "use_dora": True},
    "all": {"train_embeddings": "all", "lora_bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa_niter_4", "train_embeddings": "chat_rows"},
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
    save = checkpoint.save_model if checkpointed else checkpoint.save_final
    save(adapted, tokenizer, tmp_path / "adapter")
    assert merge.merge(tmp_path / "adapter", tmp_path / "out", base=str(base)) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[151644, 8948, 198, 9707, 151645, 40]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changed = (merged.lm_head.weight != plain.lm_head.weight).any(1).nonzero().flatten().tolist()
    assert changed == rows if rows else len(changed) > 100_000


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
        (["{adapter}", "{tmp}/out", "--base", "{tmp}/nowhere"], "was not found - give it with --base"),
        (["{adapter}", "{tmp}/out", "--base", "{other}"], "made for another base"),
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
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_merge_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    _, adapter, _ = trained
    answers = iter([[torch.zeros(1, 1, 4)], [torch.full((1, 1, 4), 0.01)]])
    monkeypatch.setattr(merge, "logits", lambda *args: next(answers))
    with pytest.raises(RuntimeError, match="nothing was written"):
        merge.merge(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refused_folders_raise_user_errors(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        merge.check(tmp_path, tmp_path / "out")
