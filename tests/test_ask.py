"""python -m finetune.ask: questions in, answers out, for models and for adapters."""

import io
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import small_checkpoint
from transformers import AutoModelForCausalLM

import qwen_model
from finetune import ask, checkpoint, model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """(base model's folder, adapter's folder, the adapter's answer to "hello" in 4 tokens)"""
    qwen_model.register()
    place = tmp_path_factory.mktemp("ask")
    base = small_checkpoint(place / "base")
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=8, target_modules=["c_proj", "w1"], init_lora_weights=False),
    ).eval()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.mul_(10)
    model.set_chat_settings(lora, tokenizer)
    checkpoint.save_final(lora, tokenizer, place / "adapter")
    answer = lora.chat(tokenizer, "hello", do_sample=False, max_new_tokens=4)[0]
    return base, place / "adapter", answer


def test_an_adapter_answers_on_its_base(folders, capsys, tmp_path):
    base, adapter, answer = folders
    (tmp_path / "q.json").write_text(json.dumps(["hello", "你好"]))
    ask.main([str(adapter), "--questions_file", str(tmp_path / "q.json"), "hello", "--max_new_tokens", "4"])
    printed = capsys.readouterr().out
    assert printed.count("Q: hello\nA: " + answer) == 2 and "Q: 你好" in printed
    ask.main([str(base), "hello", "--max_new_tokens", "4"])  # a base model answers as well as it can
    assert answer not in capsys.readouterr().out


def test_a_conversation_remembers(folders, capsys, monkeypatch):
    """Answers appear as they grow, and the second question is asked with the first in view."""
    _, adapter, answer = folders
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n\n"))
    ask.main([str(adapter), "--max_new_tokens", "4"])
    printed = capsys.readouterr().out
    assert "model: " + answer in printed and printed.count("you: ") == 3
    first, second = printed.split("model: ")[1:]
    assert first.split("you: ")[0] != second.split("you: ")[0]


def test_an_unknown_folder_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stopped:
        ask.main(["no such folder", "hello"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
