"""Chat templates of later Qwens and a small tokenizer for them, written for the tests from what is known of their formats."""

from pathlib import Path

TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def with_default_system(text: str) -> str:
    """Plain ChatML; a conversation without a system message gets this one."""
    first = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n" + text + "<|im_end|>\\n' }}{% endif %}"
    return first + "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT


OPEN, CLOSE = "<think>", "</think>"
# Qwen3's: no default system message; of all reasoning only that after the last question is shown, and the last answer has a
# block for it, be it empty. Newlines at the borders of reasoning and of those answers are stripped.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% set reasoning = m.reasoning_content if m.reasoning_content is defined else '' %}"
    "{% if not reasoning and '" + CLOSE + "' in content %}"
    "{% set reasoning = content.split('" + CLOSE + "')[0].rstrip('\\n').split('" + OPEN + "')[-1].lstrip('\\n') %}"
    "{% set content = content.split('" + CLOSE + "')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{ '" + OPEN + "\\n' + reasoning.strip('\\n') + '\\n" + CLOSE + "\\n\\n' + content.lstrip('\\n') }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
TEMPLATES = {
    "qwen2": with_default_system("You are a helpful assistant."),
    "qwen2.5": with_default_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": THINKING,
}
TEXTS = [
    "What is two plus two? It is four.",
    "system user assistant You are a helpful assistant.",
    "你好，世界！不客气。",
] * 4


def later_tokenizer(folder: Path, kind: str = "qwen2", base: bool = False):
    """A byte-level BPE of some 400 tokens with later Qwens' special ones, saved to `folder` and opened from there."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    pieces = [
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if kind == "qwen3":
        tokenizer.add_tokens([AddedToken(token, special=False) for token in (OPEN, CLOSE)])
    ends = {"eos_token": special[0] if base else special[2], "pad_token": special[0]}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special[1:], **ends)
    made.chat_template = TEMPLATES[kind]
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
