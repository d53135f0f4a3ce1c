"""A tokenizer must give back what it takes, and a chat template must come to its end."""

import re
import time

import pytest
from chat_templates import QWEN2, make_tokenizer
from tokenizers import normalizers
from transformers import Qwen2Tokenizer

from finetune.compare.agreement import question_prompts
from finetune.errors import UserError
from finetune.samples import lossless, time_limit
from finetune.samples.chat_template import ChatTemplate
from finetune.samples.rendering import PROBE

TEXTS = [PROBE, "", "你好 <|im_end|> é", "a\r\n b"]


def test_whole_tokenizers_lose_nothing(tokenizer):
    lossless.check(tokenizer, TEXTS)
    later = make_tokenizer()
    lossless.check(later, TEXTS)
    later.backend_tokenizer.normalizer = normalizers.NFC()
    lossless.check(later, TEXTS)  # what its own normalizer changes is not lost


def test_text_that_is_lost_is_shown():
    nothing = Qwen2Tokenizer({}, [])
    with pytest.raises(UserError, match="its tokenizer loses text .of 'hello' it makes ''. - take all of the tokenizer's files"):
        lossless.check(nothing, ["hello"])
    lower = make_tokenizer()
    lower.backend_tokenizer.pre_tokenizer = None  # a blank is no character of its vocabulary then
    with pytest.raises(UserError, match="loses text"):
        lossless.check(lower, ["It is five. Hello there"])


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end(monkeypatch):
    monkeypatch.setattr(time_limit, "FIRST", 0.3)
    monkeypatch.setattr(time_limit, "EACH", 0.0)
    tokenizer = make_tokenizer(ENDLESS + QWEN2)
    tokenizer.name_or_path = "folder"
    begun = time.monotonic()
    line = "folder: its chat template is not done after 0 seconds - take the template of the published checkpoint"
    for render in (lambda: question_prompts(tokenizer), lambda: ChatTemplate(tokenizer)):
        with pytest.raises(UserError, match=re.escape(line)):
            render()
    assert time.monotonic() - begun < 10
    tokenizer.chat_template = QWEN2
    assert all(question_prompts(tokenizer))  # and the clock is off again
    time.sleep(0.4)


@pytest.mark.parametrize("template,said", [("", "lays out nothing"), ("{{ a.b.c }}", "fails (UndefinedError: "), ("{% foz %}", "fails (Templ")])
def test_a_damaged_template_is_a_line(template, said):
    tokenizer = make_tokenizer(template)
    tokenizer.name_or_path = "folder"
    with pytest.raises(UserError, match=re.escape(f"folder: its chat template {said}") + ".* - take that of the published checkpoint"):
        question_prompts(tokenizer)
