"""A tokenizer must give back what it takes, and a chat template must come to its end."""

import json
import os
import re
import resource
import subprocess
import time
from pathlib import Path

import pytest
import warm
from chat_templates import QWEN2, make_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import Qwen2Tokenizer

from finetune.compare.agreement import question_prompts
from finetune.conversations.messages import Conversation
from finetune.errors import UserError
from finetune.samples import hard_limit, lossless, time_limit
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


GROWING = "{% set ns = namespace(x='x' * 50000000) %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.mark.parametrize("template", [GROWING, "{{ 'x' * 100000000000 }}"])
def test_a_template_that_takes_gigabytes(template, monkeypatch):
    monkeypatch.setattr(time_limit, "ROOM", 200_000_000)
    tokenizer = make_tokenizer(template + QWEN2)
    tokenizer.name_or_path = "folder"
    before = resource.getrlimit(resource.RLIMIT_AS)
    line = "folder: its chat template takes more than 0.2 GB of memory - take the template of the published checkpoint"
    for render in (lambda: question_prompts(tokenizer), lambda: ChatTemplate(tokenizer)):
        with pytest.raises(UserError, match=re.escape(line)):
            render()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_template_that_does_not_end_on_some_conversations(monkeypatch):
    """It is said once, and not of each conversation after as many seconds."""
    tokenizer = make_tokenizer("{% if messages[0].content == 'slow' %}" + ENDLESS + "{% endif %}" + QWEN2)
    renderer = ChatTemplate(tokenizer)
    slow = Conversation([{"role": "user", "content": "slow"}, {"role": "assistant", "content": "a"}], [])
    assert renderer.render_batch([slow._replace(messages=[{"role": "user", "content": "b"}, slow.messages[1]])])[0]
    monkeypatch.setattr(time_limit, "FIRST", 0.3)
    monkeypatch.setattr(time_limit, "EACH", 0.0)
    begun = time.monotonic()
    with pytest.raises(UserError, match="its chat template is not done after 0 seconds"):
        renderer.render_batch([slow] * 20)
    assert time.monotonic() - begun < 3


# what Python cannot interrupt: how it is started. Two lists of lists of lists, 60 deep, are compared
DEEP = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
ASK = f"question_prompts(make_tokenizer({DEEP!r}))"
ONE_OPERATION = {
    "a template": ASK,
    "a template in another thread": f"t = threading.Thread(target=lambda: {ASK}); t.start(); t.join()",
    "a template in a fork": f"os.fork() and os._exit(os.waitstatus_to_exitcode(os.wait()[1])); {ASK}",
    "a tokenizer": "t = make_tokenizer(); t.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex('(x|xx)+(?=y)'), 'isolated'); "
    "lossless.check(t, [('x' * 22 + ' ') * 30000])",
}
PROGRAM = """
import os, sys, threading
sys.path[:0] = {paths!r}
from chat_templates import make_tokenizer
from tokenizers import Regex, pre_tokenizers
from finetune.compare.agreement import question_prompts
from finetune.samples import hard_limit, lossless, time_limit
time_limit.FIRST, time_limit.EACH, time_limit.HARD, time_limit.PACE = 0.2, 0.0, 2.0, 1e9
question_prompts(make_tokenizer())  # a limit that is not reached, before a fork
{what}
print("it came to its end")
"""


@pytest.mark.parametrize("case", ONE_OPERATION)
def test_one_operation_that_does_not_end(case, tmp_path):
    here = Path(__file__).parents[1]
    (tmp_path / "program.py").write_text(PROGRAM.format(paths=[str(here), str(here.parent)], what=ONE_OPERATION[case]))
    own = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "said.json")}
    done = subprocess.run([warm.python(), tmp_path / "program.py"], env=os.environ | own, capture_output=True, text=True, timeout=60)
    what = "tokenizer is" if case == "a tokenizer" else "chat template is"
    assert done.returncode == 2 and "it came" not in done.stdout, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"its {what} not done after 0 seconds - take " in line
    assert f"error: {json.loads((tmp_path / 'said.json').read_text())['message']}" == line


def test_the_line_of_a_hard_limit_is_text_to_the_shell(tmp_path):
    said = subprocess.run(["sh", "-c", hard_limit.command("it's a $HOME `line`\nof 100% \"é\"")], capture_output=True, text=True)
    assert said.stderr == "error: it's a $HOME `line` of 100% \"é\"\n"


def test_a_tokenizer_that_panics():
    """Its regular expressions give up after ten million tries, which ends in what is no Exception."""
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "folder"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+(?=y)"), "isolated")
    with pytest.raises(UserError, match="folder: its tokenizer fails .Onig: .* - take all of the tokenizer's files"):
        lossless.check(tokenizer, ["x" * 100])
    tokenizer.chat_template = "{{ 'x' * 100 }}"
    with pytest.raises(UserError, match="folder: its tokenizer fails .Onig: "):
        question_prompts(tokenizer)
