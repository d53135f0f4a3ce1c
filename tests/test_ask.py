"""python -m finetune.ask: questions in, answers out, for models and for adapters."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import small_checkpoint, tiny_later_qwen
from transformers import AutoModelForCausalLM

import qwen_model
from finetune import ask
from finetune.model import loading
from finetune.steps import saving


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
    loading.set_chat_settings(lora, tokenizer)
    saving.save_final(lora, tokenizer, place / "adapter")
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
    with pytest.raises(SystemExit):
        ask.main([str(base), "hello", "--base", "elsewhere"])
    assert f"error: --base elsewhere: {base} is a whole model, which has none - leave it out" in capsys.readouterr().err


def test_a_conversation_remembers(folders, capsys, monkeypatch):
    """Answers appear as they grow, and the second question is asked with the first in view."""
    _, adapter, answer = folders
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n\n"))
    ask.main([str(adapter), "--max_new_tokens", "4"])
    printed = capsys.readouterr().out
    assert "model: " + answer in printed and printed.count("you: ") == 3
    first, second = printed.split("model: ")[1:]
    assert first.split("you: ")[0] != second.split("you: ")[0]


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def later(request, tmp_path_factory):
    """(a later Qwen's folder, an adapter's on it, the adapter's answer to "hello" in 8 tokens)"""
    place = tmp_path_factory.mktemp("later")
    base = tiny_later_qwen(place / "base", request.param, base=True)
    torch.manual_seed(0)
    settings = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(loading.load_weights(base, torch.float32, False), settings).eval()
    tokenizer = loading.load_tokenizer(base)
    loading.set_chat_settings(lora, tokenizer)
    saving.save_final(lora, tokenizer, place / "adapter")
    prompt = tokenizer(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([prompt["input_ids"]])
    written = lora.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return base, place / "adapter", tokenizer.decode(written, skip_special_tokens=True)


def test_a_later_qwen_answers_through_its_template(later, capsys):
    base, adapter, answer = later
    ask.main([str(adapter), "hello", "--max_new_tokens", "8", "--system", "Be brief."])
    assert capsys.readouterr().out == f"Q: hello\nA: {answer}\n\n"
    ask.main([str(base), "hello", "--max_new_tokens", "8", "--system", "Be brief."])
    assert answer not in capsys.readouterr().out


def test_a_later_qwen_holds_a_conversation(later, capsys, monkeypatch):
    """Streamed answers are the answers, and the history is in view."""
    _, adapter, answer = later
    prompts, plain = [], ask.LaterAnswerer.prompt

    def watched(self, question, history):
        prompts.append(plain(self, question, history)["input_ids"][0])
        return plain(self, question, history)

    monkeypatch.setattr(ask.LaterAnswerer, "prompt", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n\n"))
    ask.main([str(adapter), "--max_new_tokens", "8", "--system", "Be brief."])
    printed = capsys.readouterr().out
    assert "model: " + answer in printed and printed.count("you: ") == 3
    said = loading.load_tokenizer(adapter).decode(prompts[1])
    assert said.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n")
    assert answer in said and "<|im_start|>user\nagain<|im_end|>" in said


def test_an_error_while_streaming_is_raised(later, monkeypatch):
    base, _, _ = later
    options = SimpleNamespace(folder=str(base), base=None, system=None, max_new_tokens=2, sample=False)
    answerer = ask.open_answerer(options)
    monkeypatch.setattr(answerer.model, "generate", lambda **settings: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        list(answerer.stream("hello", []))


def test_an_unknown_folder_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stopped:
        ask.main(["no such folder", "hello"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
