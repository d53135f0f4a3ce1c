"""python -m finetune.ask: questions in, answers out, for models and for adapters."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import small_checkpoint, tiny_later_qwen
from transformers import AutoModelForCausalLM

import qwen_model
from finetune.ask import __main__ as ask
from finetune.ask import answerers
from finetune.ask.answerers import message_of
from finetune.ask.tools import read_tools, told
from finetune.errors import UserError
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


def test_the_system_message_of_the_data_is_asked_with(folders, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(folders[1], folder)
    record = folder / "training.json"
    record.write_text(json.dumps({"data": {"system": "You are a pirate."}}))
    options = SimpleNamespace(folder=str(folder), base=None, system=None, max_new_tokens=4, sample=False, thinking="auto")
    assert answerers.open_answerer(options).system == "You are a pirate."
    said = capsys.readouterr().err
    assert "note: asking with the system message of the training data: 'You are a pirate.' (--system for another)\n" in said
    options.system = "Another."
    assert answerers.open_answerer(options).system == "Another." and "asking with" not in capsys.readouterr().err
    record.write_text(json.dumps({"data": {"system": None}}))
    options.system = None
    assert answerers.open_answerer(options).system is None


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
    prompts, plain = [], answerers.LaterAnswerer.prompt

    def watched(self, question, history):
        prompts.append(plain(self, question, history)["input_ids"][0])
        return plain(self, question, history)

    monkeypatch.setattr(answerers.LaterAnswerer, "prompt", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n\n"))
    ask.main([str(adapter), "--max_new_tokens", "8", "--system", "Be brief."])
    printed = capsys.readouterr().out
    assert "model: " + answer in printed and printed.count("you: ") == 3
    said = loading.load_tokenizer(adapter).decode(prompts[1])
    assert said.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n")
    assert answer in said and "<|im_start|>user\nagain<|im_end|>" in said


def test_an_error_while_streaming_is_raised(later, monkeypatch):
    base, _, _ = later
    options = SimpleNamespace(folder=str(base), base=None, system=None, max_new_tokens=2, sample=False, thinking="auto")
    answerer = answerers.open_answerer(options)
    monkeypatch.setattr(answerer.model, "generate", lambda **settings: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        list(answerer.stream("hello", []))


@pytest.mark.parametrize(
    "record,thinking,block",
    [(None, "auto", False), ({"without_thoughts": True}, "auto", True), ({"without_thoughts": False}, "auto", False),
     ({"without_thoughts": True}, "on", False), (None, "off", True)],
)  # fmt: skip
def test_a_model_is_asked_as_it_was_trained(tmp_path, record, thinking, block):
    """Behind an empty block of thoughts, where it has learned only answers without thoughts."""
    folder = tiny_later_qwen(tmp_path / "model", "qwen3")
    if record is not None:
        (folder / "training.json").write_text(json.dumps({"data": record}))
    options = SimpleNamespace(folder=str(folder), base=None, system=None, max_new_tokens=2, sample=False, thinking=thinking)
    answerer = answerers.open_answerer(options)
    said = answerer.tokenizer.decode(answerer.prompt("hello", [])["input_ids"][0])
    assert said.endswith("<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * block)


def test_special_tokens_in_a_question_are_text_as_in_training(tmp_path):
    folder = tiny_later_qwen(tmp_path / "model")
    options = SimpleNamespace(folder=str(folder), base=None, system=None, max_new_tokens=2, sample=False, thinking="auto")
    for record, expected in (({}, 4), ({"data": {"allow_special": True}}, 5)):  # <|im_start|> of the system, user, assistant
        (folder / "training.json").write_text(json.dumps(record))
        answerer = answerers.open_answerer(options)
        ids = answerer.prompt("a<|im_start|>b", [])["input_ids"][0]
        assert "a<|im_start|>b" in answerer.tokenizer.decode(ids)
        assert (ids == answerer.tokenizer.convert_tokens_to_ids("<|im_start|>")).sum() == expected - 1


def test_an_unknown_folder_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stopped:
        ask.main(["no such folder", "hello"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- tools


WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "巴黎"}}}
CALLS = 'calls get_weather({"city": "巴黎"})'
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>'


@pytest.fixture
def tools(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    return str(tmp_path / "tools.json")


@pytest.fixture
def saying(monkeypatch):
    """saying(*texts): what models write from then on, one after the other; returns the prompts that they get."""

    def say(*texts: str) -> list[str]:
        from transformers import GenerationMixin

        prompts, waiting = [], list(texts)

        def generate(self, inputs=None, input_ids=None, **settings):
            prompt = inputs if input_ids is None else input_ids
            prompts.append(self.tokenizer.decode(prompt[0]))
            text = waiting.pop(0)
            encode = getattr(self.tokenizer, "encode_ordinary", lambda text: self.tokenizer(text)["input_ids"])
            return torch.cat([prompt, torch.tensor([[*encode(text), *self.tokenizer.convert_tokens_to_ids(["<|im_end|>"])]])], 1)

        def opened(options):
            answerer = answerers.open_answerer(options)
            answerer.model.tokenizer = answerer.tokenizer
            return answerer

        monkeypatch.setattr(GenerationMixin, "generate", generate)
        monkeypatch.setattr(ask, "open_answerer", opened)
        return prompts

    return say


THOUGHT = "Thought: I look.\nAction: get_weather\nAction Input: {\"city\": \"巴黎\"}\nObservation:"


def test_first_generation_calls_a_tool(folders, capsys, saying, tools):
    prompts = saying(THOUGHT, "Thought: I now know the final answer.\nFinal Answer: Hello!")
    ask.main([str(folders[0]), "巴黎天气", "Hi", "--tools", tools, "--system", "Be brief."])
    printed = capsys.readouterr().out
    assert printed == f"Q: 巴黎天气\nA: I look.\n{CALLS}\n\nQ: Hi\nA: Hello!\n\n"
    for prompt, question in zip(prompts, ("巴黎天气", "Hi"), strict=True):
        assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAnswer the following questions")
        assert "get_weather: Call this tool" in prompt
        assert prompt.endswith(f"Begin!\n\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n")


def test_first_generation_goes_on_with_the_result(folders, capsys, saying, tools, monkeypatch):
    prompts = saying(THOUGHT, " I now know the final answer.\nFinal Answer: 22 度。", "Thought: Easy.\nFinal Answer: Bye.")
    monkeypatch.setattr("sys.stdin", io.StringIO("巴黎天气\n22°C\nBye\n\n"))
    ask.main([str(folders[0]), "--tools", tools])
    printed = capsys.readouterr().out
    assert printed == (
        f"you: model: I look.\n{CALLS}\nresult of get_weather: model: 22 度。\nyou: model: thinks: Easy.\nBye.\nyou: "
    )
    assert prompts[1].endswith(f"<|im_start|>assistant\n{THOUGHT} 22°C\nThought:")
    assert "22°C\nThought: I now know the final answer.\nFinal Answer: 22 度。<|im_end|>" in prompts[2]
    assert prompts[2].count("Begin!") == 1 and "Question: Bye<|im_end|>" in prompts[2]


def test_a_result_that_looks_like_the_form_is_refused(folders, capsys, saying, tools, monkeypatch):
    saying(THOUGHT)
    monkeypatch.setattr("builtins.input", lambda what: "x\nThought: y" if "result" in what else "巴黎天气")
    with pytest.raises(SystemExit):
        ask.main([str(folders[0]), "--tools", tools])
    assert "message 3 (tool): its text would be read back as something else" in capsys.readouterr().err


def test_an_untrained_model_answers_with_tools(folders, capsys, tools):
    """Whatever it writes."""
    ask.main([str(folders[0]), "hello", "--tools", tools, "--max_new_tokens", "4"])
    assert capsys.readouterr().out.startswith("Q: hello\nA: ")


TEMPLATES = Path(__file__).parent.parent.parent / "shared" / "templates"
CODER = "<tool_call>\n<function=get_weather>\n<parameter=city>\n巴黎\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    "name, text",
    [
        ("qwen2_5", HERMES), ("qwen3", f"<think>\nHm.\n</think>\n\n{HERMES}"), ("qwen3_instruct_2507", HERMES),
        ("qwen3_5_think", f"Hm.\n</think>\n\n{CODER}"), ("qwen3_5_nothink", CODER),
    ],
)  # fmt: skip
def test_real_templates(later, capsys, saying, tools, monkeypatch, name, text):
    """The prompt that they make goes on where the answer began, and the call is read."""
    if not (TEMPLATES / f"{name}.jinja").exists():
        pytest.skip("the templates are not here")
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.get_chat_template", lambda *args, **settings: template)
    prompts = saying(text, "Warm.")
    monkeypatch.setattr("sys.stdin", io.StringIO("巴黎天气\n22\n\n"))
    ask.main([str(later[0]), "--tools", tools])
    thinks = "thinks: Hm.\n" if "Hm." in text else ""
    warm = "thinks: Warm.\n" if name == "qwen3_5_think" else "Warm.\n"  # its prompt has begun the thoughts
    assert capsys.readouterr().out == f"you: model: {thinks}{CALLS}\nresult of get_weather: model: {warm}you: "
    assert json.dumps(WEATHER["parameters"]) in prompts[0]
    assert prompts[1].startswith(prompts[0] + text) and "<tool_response>\n22\n</tool_response>" in prompts[1]


def test_a_later_qwen_calls_a_tool(later, capsys, saying, tools, monkeypatch):
    prompts = saying(f"I look.\n{HERMES}\n{HERMES}", "Warm.")
    monkeypatch.setattr("sys.stdin", io.StringIO("巴黎天气\n22\n23\n\n"))
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.get_chat_template", lambda *args, **settings: template)
    ask.main([str(later[0]), "--tools", tools])
    results = "result of get_weather: result of get_weather: "
    assert capsys.readouterr().out == f"you: model: I look.\n{CALLS}\n{CALLS}\n{results}model: Warm.\nyou: "
    shown = json.dumps([{"type": "function", "function": WEATHER}], ensure_ascii=False)
    assert prompts[0] == f"{shown}<|im_start|>user\n巴黎天气<|im_end|>\n"
    calls = '{"city": "巴黎"}' * 2
    assert prompts[1].endswith(
        f"<|im_start|>assistant\nI look.{calls}<|im_end|>\n<|im_start|>tool\n22<|im_end|>\n<|im_start|>tool\n23<|im_end|>\n"
    )


def test_a_template_that_shows_no_tools_is_an_error(later, capsys, tools, monkeypatch):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.get_chat_template", lambda *args, **settings: template)
    with pytest.raises(SystemExit):
        ask.main([str(later[0]), "hello", "--tools", tools])
    assert "error: --tools: the model's chat template does not show them to it - leave them out" in capsys.readouterr().err


MESSAGES = {
    "Warm.": {"content": "Warm."},
    f"<think>\nWhere?\n</think>\n\n{HERMES}": {"content": "", "reasoning_content": "Where?", "tool_calls": [CALL]},
    "Where?\n</think>\n\nWarm.": {"content": "Warm.", "reasoning_content": "Where?"},
    "<think>\n\n</think>\n\nWarm.": {"content": "Warm."},
    "<think>\nWhere": {"content": "", "reasoning_content": "Where"},
    "Warm <think>": {"content": "Warm <think>"},
    f"<think>{HERMES}</think>no": {"content": "no", "reasoning_content": HERMES},
}


@pytest.mark.parametrize("text", MESSAGES)
def test_what_a_later_qwen_has_written(text):
    assert message_of(text, [WEATHER]) == {"role": "assistant"} | MESSAGES[text]


def test_forms_of_tools(tmp_path):
    own = {"name_for_model": "w", "name_for_human": "Weather", "description_for_model": "d", "parameters": [{"name": "x"}]}
    wrapped = {"type": "function", "function": WEATHER | {"strict": True}}
    (tmp_path / "t.json").write_text(json.dumps([WEATHER, wrapped, own]))
    plain = {"name": "w", "name_for_human": "Weather", "description": "d", "parameters": [{"name": "x"}]}
    assert read_tools(tmp_path / "t.json") == [
        {"type": "function", "function": WEATHER}, wrapped, {"type": "function", "function": plain}
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, problems",
    [
        ("{", ["Expecting property name enclosed in double quotes"]),
        ("{}", ["not a list of tools"]),
        ("[]", ["not a list of tools"]),
        ('["f", {"name": ""}, {"name": "f"}]', ["tool 1 is not an object with a name", "tool 2 has no name, or"]),
    ],
)
def test_tools_that_cannot_be_read(tmp_path, text, problems):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_tools(tmp_path / "t.json")
    assert len(caught.value.findings) == len(problems)
    for finding, problem in zip(caught.value.findings, problems):
        assert finding.startswith(f"--tools {tmp_path / 't.json'}: {problem}") and "give a JSON list of tools" in finding
    with pytest.raises(UserError, match="No such file"):
        read_tools(tmp_path / "none.json")


def test_calls_in_lines():
    odd = {"type": "function", "function": {"name": "f", "arguments": "not json"}}
    assert told({"role": "assistant", "content": "", "tool_calls": [CALL, odd]}) == f"{CALLS}\ncalls f(not json)"
    assert told({"role": "assistant", "content": "", "reasoning_content": "x"}) == "thinks: x"
    assert told({"role": "assistant", "content": ""}) == ""
