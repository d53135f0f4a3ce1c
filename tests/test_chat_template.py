"""Later Qwens: the model's own chat template decides the text; what is learnt of it, and that contents stay text."""

from collections import Counter

import numpy as np
import pytest
from chat_templates import CLOSE, OPEN, TEMPLATES, later_tokenizer
from talks import write

from finetune import chat_template
from finetune.data import load
from finetune.errors import UserError

TALKS = [
    [("user", "What is two plus two?"), ("assistant", "It is four.")],
    [
        ("system", "You are terse."),
        ("user", "你好"),
        ("assistant", "世界！"),
        ("user", "And two?"),
        ("assistant", "Four."),
    ],
    [("user", "a\nb"), ("assistant", "c"), ("user", "d"), ("assistant", "e\nf"), ("user", "g"), ("assistant", "h")],
]


def messages(talk) -> list[dict]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture(scope="module", params=list(TEMPLATES))
def later(request, tmp_path_factory):
    return later_tokenizer(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    return later_tokenizer(tmp_path_factory.mktemp("thinker"), "qwen3")


def render(tokenizer, *talks, **settings):
    return chat_template.render_batch(tokenizer, [messages(talk) for talk in talks], **settings)


def learnt(tokenizer, ids, labels) -> list[str]:
    """The texts of the stretches with labels, which must be the ids themselves."""
    spans, texts = np.flatnonzero(np.diff(np.concatenate(([0], labels != -100, [0])))), []
    assert (labels[labels != -100] == ids[labels != -100]).all()
    for begin, end in zip(spans[::2], spans[1::2]):
        texts.append(tokenizer.decode(ids[begin:end]))
    return texts


def test_ids_are_those_of_the_template(later):
    rendered = render(later, *TALKS)
    for talk, (ids, labels) in zip(TALKS, rendered):
        expected = later.apply_chat_template(messages(talk), tokenize=True, return_dict=False)
        assert ids.tolist() == expected and ids.dtype == labels.dtype == np.int32


def test_answers_and_their_ends_are_learnt(later):
    empty = f"{OPEN}\n\n{CLOSE}\n\n" if later.chat_template == TEMPLATES["qwen3"] else ""
    rendered = render(later, *TALKS)
    assert [learnt(later, *pair) for pair in rendered] == [
        [f"{empty}It is four.<|im_end|>"],
        ["世界！<|im_end|>", f"{empty}Four.<|im_end|>"],
        ["c<|im_end|>", "e\nf<|im_end|>", f"{empty}h<|im_end|>"],
    ]


def test_an_answer_that_is_not_to_be_learnt(later):
    talk = messages(TALKS[1])
    talk[2]["train"] = False
    [(ids, labels)] = chat_template.render_batch(later, [talk])
    assert len(learnt(later, ids, labels)) == 1 and "Four" in learnt(later, ids, labels)[0]


def test_special_token_text_stays_text(later):
    text = "say <|im_end|> and <|endoftext|>"
    [(ids, labels)] = render(later, [("user", text), ("assistant", text)])
    end = later.convert_tokens_to_ids("<|im_end|>")
    turns = 2 + ("system" in later.decode(ids))
    assert (ids == end).sum() == turns and later.decode(ids).count(text) == 2
    [(allowed, _)] = render(later, [("user", text), ("assistant", text)], allow_special=True)
    assert (allowed == end).sum() == turns + 2


def test_contents_may_be_empty_or_white_space(later):
    [(ids, labels)] = render(later, [("user", ""), ("assistant", " a ")])
    assert learnt(later, ids, labels)[0].endswith(" a <|im_end|>")


def test_what_a_template_strips_is_stripped(thinker):
    [(ids, _)] = render(thinker, [("user", "\nx\n"), ("assistant", "\n\n a\n")])
    expected = thinker.apply_chat_template(messages([("user", "\nx\n"), ("assistant", "\n\n a\n")]), tokenize=False)
    assert thinker.decode(ids) == expected


def test_reasoning_goes_where_the_template_puts_it(thinker):
    left_out = Counter()
    talk = [
        ("user", "a"),
        ("assistant", f"{OPEN}\nfirst\n{CLOSE}\n\nb"),
        ("user", "c"),
        ("assistant", f"{OPEN}\nlast\n{CLOSE}\n\nd"),
    ]
    [(ids, labels)] = render(thinker, talk, left_out=left_out)
    assert thinker.decode(ids) == thinker.apply_chat_template(messages(talk), tokenize=False)
    assert ids.tolist() == thinker.apply_chat_template(messages(talk), tokenize=True, return_dict=False)
    assert learnt(thinker, ids, labels) == ["b<|im_end|>", f"{OPEN}\nlast\n{CLOSE}\n\nd<|im_end|>"]
    assert left_out == {"reasoning": 1}


def test_cut_to_a_length(later):
    [(whole, _)] = render(later, TALKS[0])
    [(ids, labels)] = render(later, TALKS[0], max_length=7)
    assert ids.tolist() == whole[:7].tolist() and len(labels) == 7


def test_the_published_mask_is_not_theirs(later):
    with pytest.raises(UserError, match="--supervise chatml: is the published trainer's mask"):
        render(later, TALKS[0], supervise="chatml")


@pytest.mark.parametrize(
    "template,why",
    [
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not show every message once"),
        ("{{ messages[0].content }}", "does not show every message once"),
        ("{{ raise_exception('roles must alternate') }}", "it says: roles must alternate"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not show every message once"),
        ("{% for m in messages %}{{ m.content | replace(' ', '') }}{% endfor %}", "changes the contents"),
        (TEMPLATES["qwen2"].replace("<|im_end|>", "<end>"), "does not end with"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, template, why):
    tokenizer = later_tokenizer(tmp_path, "qwen2")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=why) as caught:
        render(tokenizer, TALKS[0])
    assert "a conversation by user, assistant" in str(caught.value) and "\n" not in str(caught.value)


def test_a_shape_is_rendered_once(tmp_path, monkeypatch):
    tokenizer, calls = later_tokenizer(tmp_path), []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(1) or plain(*a, **k))
    render(tokenizer, *[TALKS[0]] * 50)
    assert len(calls) == 4  # with and without white space; and the generation prompt, with and without


def test_through_data_with_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    tokenizer = later_tokenizer(tmp_path / "model", "qwen3")
    turns = [{"from": role, "value": text} for role, text in TALKS[1][1:3]]
    thought = [{"from": "user", "value": "a"}, {"from": "assistant", "value": f"{OPEN}x{CLOSE}b"}]
    path = write(tmp_path, [{"conversations": thought + turns}])
    first = load(path, tokenizer, max_length=200)
    assert [
        line for line in first.notes if "1 answers bring reasoning that the model's chat template leaves out" in line
    ]
    chat = [("user", "a"), ("assistant", "b"), *TALKS[1][1:3]]
    expected = tokenizer.apply_chat_template(messages(chat), tokenize=True, return_dict=False)
    assert first[0][0].tolist() == expected
    monkeypatch.setattr(chat_template, "render_batch", None)
    assert load(path, tokenizer, max_length=200).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    tokenizer.chat_template = TEMPLATES["qwen2"]
    assert load(path, tokenizer, max_length=200).fingerprint != first.fingerprint


def test_an_answer_that_is_cut_away_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    tokenizer = later_tokenizer(tmp_path / "model", "qwen3")
    path = write(
        tmp_path, [{"conversations": [{"from": "user", "value": "x " * 40}, {"from": "assistant", "value": "y"}]}]
    )
    with pytest.raises(UserError, match="1 of 1 samples have no answer token within 60"):
        load(path, tokenizer, max_length=60)
