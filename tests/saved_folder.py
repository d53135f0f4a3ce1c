"""What a saved folder answers by itself, in a Python without this toolkit, whatever transformers it has. tests/versions.sh runs it.

    python tests/saved_folder.py make FOLDER      needs the toolkit: a small chat model
    python tests/saved_folder.py answer FOLDER    needs transformers, tiktoken and the folder; prints JSON, the same for every version
"""

import json
import sys
from pathlib import Path

QUESTIONS = ["Who are you?", "你是谁？请告诉我一个故事。", "One, two, three: what comes next?"]


def make(folder: str) -> None:
    """Random weights, with norms and biases that are not neutral, and chat settings, as a training run saves them."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qwen_model
    from qwen_model.new_checkpoint import new_checkpoint

    new_checkpoint(Path(folder), hidden_size=64, heads=1, layers=2, seq_length=48)
    qwen_model.register()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.chat_format = "chatml"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules."), "the folder's own code is what is tested"
    torch.set_num_threads(1)
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 12, "top_p": None, "top_k": None}

    def say(**more):
        return model.chat(tokenizer, QUESTIONS[0], **greedy, **more)[0]

    found = {
        "without a cache": say(use_cache=False),
        "chat": say(),
        "static cache": say(cache_implementation="static"),
        "stream": list(model.chat_stream(tokenizer, QUESTIONS[0], **greedy))[-1],
        "one by one": [model.chat(tokenizer, question, **greedy)[0] for question in QUESTIONS],
        "batch": model.chat_batch(tokenizer, QUESTIONS, **greedy),
        "beams": say(num_beams=2),
        "history": model.chat(tokenizer, QUESTIONS[2], [(QUESTIONS[0], QUESTIONS[1])], **greedy)[0],
    }
    # a stop string is found, and left in what generate returns
    ids = torch.tensor([tokenizer.encode(QUESTIONS[0])])
    settings = {"do_sample": False, "max_new_tokens": 12, "tokenizer": tokenizer}
    row = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
    word = tokenizer.decode(row[:3])[-2:]
    found["stop string"] = model.generate(ids, attention_mask=torch.ones_like(ids), stop_strings=[word], **settings).tolist()
    model.config.use_cache_quantization = True
    found["int8 cache"] = say()
    found["int8 batch"] = model.chat_batch(tokenizer, QUESTIONS, **greedy)
    for name in ("chat", "static cache", "stream"):
        assert found[name] == found["without a cache"], f"{name}: {found[name]!r}, without a cache {found['without a cache']!r}"
    assert found["one by one"][0] == found["chat"]
    print(json.dumps(found, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    {"make": make, "answer": answer}[sys.argv[1]](sys.argv[2])
