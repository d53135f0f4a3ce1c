"""Chat templates in the manner of each later Qwen, written for the tests from what their formats are known to be, and a
small tokenizer of their kind."""

import copy
import functools
import json
from pathlib import Path

# Qwen1.5 and Qwen2: a system message of their own where a conversation begins without one.
QWEN2 = """\
{% for m in messages %}
{%- if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen2.5: the same with another message, and tools beside it.
QWEN25 = """\
{%- set own = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- set first = messages[0] %}
{{- '<|im_start|>system\\n' }}{{ first['content'] if first['role'] == 'system' else own }}
{%- if tools %}{{ '\\n\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages if m.role in ('user', 'assistant') %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen3: no system message of its own. Thoughts stay in what follows the last question (results of tools are no questions),
# and the last answer has a place for them, empty or not; earlier answers have none.
QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for m in messages[::-1] %}
    {%- set tool_result = m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') %}
    {%- if m.role == 'user' and not tool_result and not ns.seen %}
        {%- set ns.seen = true %}{%- set ns.last = messages|length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role != 'assistant' %}{{- m.content }}
    {%- else %}
        {%- set thoughts, content = '', m.content %}
        {%- if m.reasoning_content is string %}{%- set thoughts = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}
        {%- endif %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# Qwen3 for thinking only: the prompt for an answer opens the thoughts.
THINKING = QWEN3.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")

OF_KIND = {"qwen2": QWEN25, "qwen3": QWEN3}
TEXTS = ["You are a helpful assistant.", "What is the sum of two and three?", "It is five. Hello there, who are you?"]


@functools.cache
def vocabulary() -> tuple[dict, list]:
    """A byte-level BPE of some hundred tokens, trained on a few lines: (vocabulary, merges)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "system\nuser\nassistant\n\n\n\n", "你好，你好"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def make_tokenizer(template: str | None = QWEN2, eos_token: str = "<|im_end|>"):
    """transformers' own tokenizer of later Qwens, below 400 tokens: ChatML's are special, those of thoughts and tools are not."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    words, merges = vocabulary()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(dict(words), list(merges), eos_token=eos_token, extra_special_tokens=special)
    plain = ["<think>", "</think>", "<tool_response>", "</tool_response>"]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.chat_template = template
    return tokenizer


def later_tokenizer(folder: Path, kind: str = "qwen2", base: bool = False):
    """The same with the template of its kind, saved to `folder` and opened from there."""
    from transformers import AutoTokenizer

    make_tokenizer(OF_KIND[kind], "<|endoftext|>" if base else "<|im_end|>").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


# ---- the real ones

FOLDER = Path(__file__).parent / "templates"
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
NOT_SPECIAL = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
SINCE_QWEN3 = "<tool_response> </tool_response> <think> </think>".split()
REAL = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_thinking_2507", "qwen3_5_think", "qwen3_5_nothink")


def real_template(name: str) -> str:
    """A published template; that of Qwen3-Thinking-2507 is Qwen3's, but its prompt opens the thoughts."""
    if name != "qwen3_thinking_2507":
        return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    text = real_template("qwen3")
    prompt = text[text.index("{%- if add_generation_prompt %}") :]
    return text.replace(prompt, "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}")


@functools.cache
def published_tokenizer(since_qwen3: bool):
    """The tokenizer of later Qwens as published: the byte pairs are first-generation Qwen's, the added tokens their own."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import Qwen2Tokenizer

    from finetune.export import export_tokenizer
    from qwen_model.tokenization_qwen import read_ranks
    from qwen_model.vocabulary import find_vocabulary

    definition = export_tokenizer.tokenizer_json(read_ranks(find_vocabulary()), {})
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    plain = NOT_SPECIAL + SINCE_QWEN3 * since_qwen3
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return Qwen2Tokenizer(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def real_tokenizer(name: str):
    """A published tokenizer with its published template."""
    tokenizer = copy.copy(published_tokenizer(name != "qwen2_5"))
    tokenizer.chat_template = real_template(name)
    return tokenizer
