"""data/tools_example.json: what is in it, and that a LoRA over the quickstart's demo model learns from it to call a tool."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm

from qwen_model import chatml, react

ROOT = Path(__file__).parent.parent
EXAMPLE = json.loads((ROOT / "data" / "tools_example.json").read_text(encoding="utf-8"))
TOOLS = json.loads((ROOT / "data" / "tools.json").read_text(encoding="utf-8"))


def inner(conversation: dict) -> list[dict]:
    """Its messages, with a content everywhere."""
    return [message | {"content": message["content"] or ""} for message in conversation["messages"]]


def calls_of(conversation: dict) -> list[dict]:
    return [call["function"] for message in conversation["messages"] for call in message.get("tool_calls", [])]


def test_what_is_in_it():
    counts = [len(calls_of(conversation)) for conversation in EXAMPLE]
    assert len(EXAMPLE) == 30 and (counts.count(0), counts.count(1), counts.count(2)) == (5, 20, 5)
    assert any(len(message.get("tool_calls", [])) == 2 for talk in EXAMPLE for message in talk["messages"])  # at once
    assert sum(not talk["messages"][0]["content"].isascii() for talk in EXAMPLE) >= 9
    assert {len(talk["tools"]) for talk in EXAMPLE} == {2, 3} and EXAMPLE[0]["tools"] == TOOLS
    for talk in EXAMPLE:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in talk["tools"]}
        for call in calls_of(talk):
            assert json.loads(call["arguments"]).keys() == schemas[call["name"]]["properties"].keys()


def test_all_of_it_has_the_form_of_the_first_generation(tokenizer):
    for talk in EXAMPLE:
        messages, tools = react.parse(react.render(inner(talk), talk["tools"]))
        assert tools == talk["tools"]
        assert [call["name"] for call in calls_of({"messages": messages})] == [call["name"] for call in calls_of(talk)]
        for sample in react.by_question(inner(talk)):
            ids, labels, _ = chatml.render(tokenizer, react.render(sample, talk["tools"]))
            assert len(ids) < 512 and (labels != chatml.IGNORE).any()


# ---- training


def run(*words) -> str:
    settings = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([warm.python(), *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def small_qwen(folder: Path) -> None:
    """The quickstart's random model of the first generation."""
    run("-m", "qwen_model.new_checkpoint", folder, "--layers", "4")


def small_qwen3(folder: Path) -> None:
    """A random Qwen3 of the same size, with the published tokenizer and template."""
    import torch
    from chat_templates import real_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 151936, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 176, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)  # see new_checkpoint.EMBEDDING_STD
    model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
    model.save_pretrained(folder)
    real_tokenizer("qwen3").save_pretrained(folder)


@pytest.mark.slow
# as many steps as it needs, and some to spare: the first generation knew all after 250 in three seeds
@pytest.mark.parametrize("make, steps, rate", [(small_qwen, 300, 6e-3), (small_qwen3, 600, 4e-3)])
def test_a_lora_learns_to_call_a_tool(tmp_path, make, steps, rate):
    """A demo model, trained as in quickstart.sh; then the example, over and over; then python -m finetune.ask --tools.

    Embedding and head are trained along: the demo model's own conversations have none of the words of the forms.
    """
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make(tmp_path / "random")
    first = "--model_max_length 256 --per_device_train_batch_size 8 --max_steps 400 --learning_rate 5e-3 --save_strategy no"
    schedule = "--lr_scheduler_type cosine --warmup_ratio 0.03 --adam_beta2 0.95"
    run("finetune.py", "-m", tmp_path / "random", "-d", "data/conversations.json", "-o", base, *first.split(), *schedule.split())
    settings = f"--use_lora --train_embeddings all --max_steps {steps} --learning_rate {rate} --save_strategy no"
    sizes = "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --model_max_length 1024"
    words = [*settings.split(), *sizes.split(), *schedule.split()]
    run("finetune.py", "-m", base, "-d", "data/tools_example.json", "-o", adapter, *words)
    questions = ["What is the weather in Paris?", "东京现在几点？", "Set a timer for 5 minutes.", "Hello!"]
    before, after = (run("-m", "finetune.ask", model, *questions, "--tools", "data/tools.json") for model in (base, adapter))
    calls = [line for line in after.splitlines() if line.startswith("calls ")]
    assert calls == ['calls get_weather({"city": "Paris"})', 'calls get_time({"city": "东京"})', 'calls set_timer({"minutes": 5})']
    assert "Q: Hello!\nA: Hello! I can tell weather and time, and set a timer.\n" in after
    assert "calls " not in before
