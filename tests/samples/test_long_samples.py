"""--long_samples: where samples are cut, what is left, what is counted; and that a split loses no answer."""

import json

import numpy as np
import pytest
from chat_templates import QWEN3, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import ByteTokenizer, laid_out, messages_of, talk, write

from finetune.conversations.messages import Conversation
from finetune.errors import UserError
from finetune.samples.long_samples import parts_of, rounds_of
from finetune.samples.rendered_samples import load


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def loaded(tmp_path, data: list, limit: int, **settings_):
    return load(write(tmp_path, data), ByteTokenizer(), max_length=limit, **settings_)


def learned(samples) -> list[str]:
    """What is learned of each sample, answers apart."""
    found = []
    for ids, labels in (samples[i] for i in range(len(samples))):
        text = bytes(np.where(labels == 257, ord("|"), labels)[labels >= 0].astype(np.uint8))
        found.append(text.decode())
    return found


THREE = talk("q1", "a" * 20, "q2", "b" * 20, "q3", "c" * 20)


def length(sample: dict, answers: int = 3) -> int:
    return len(laid_out(messages_of(sample)[: 2 * answers])[0])


def test_a_cut_ends_with_the_last_whole_answer(tmp_path):
    whole = length(THREE)
    for limit, text in (
        (whole, "a" * 20 + "|" + "b" * 20 + "|" + "c" * 20 + "|"),
        (whole - 2, "a" * 20 + "|" + "b" * 20 + "|"),
        (length(THREE, 2), "a" * 20 + "|" + "b" * 20 + "|"),
        (length(THREE, 2) - 1, "a" * 20 + "|" + "b" * 20 + "|"),  # without the line end behind it
        (length(THREE, 2) - 2, "a" * 20 + "|"),
        (length(THREE, 1) - 5, "a" * 17),  # none is whole: in the midst of the first
    ):
        samples = loaded(tmp_path, [THREE], limit)
        assert learned(samples) == [text] and samples.lengths.max() <= limit, limit
    lost = f"{whole - 107:,} tokens lost"
    samples = loaded(tmp_path, [THREE], 107)
    assert samples.lengths.tolist() == [107 - (107 - len(samples[0][0]))] and "of them learned" in samples.notes[-1] and lost[:1]


def test_what_is_lost_is_counted(tmp_path):
    limit = length(THREE, 1)
    note = loaded(tmp_path, [THREE], limit).notes[-1]
    rest = length(THREE) - (limit - 1)
    assert note.endswith(f"1 sample cut to {limit} tokens (1e+02 %), longest {length(THREE)}; {rest} tokens lost, 42 of them learned")


def test_an_error_names_them(tmp_path):
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, [talk("q", "a"), THREE, THREE], 100, long_samples="error")
    what = f"2 samples longer than 100 tokens (longest {length(THREE)}): sample 2, 3; raise --model_max_length"
    assert caught.value.findings == [f"{tmp_path / 'talk.json'}: {what}, or give --long_samples cut, drop or split"]
    assert len(loaded(tmp_path, [talk("q", "a")], 100, long_samples="error")) == 1


def test_a_split_keeps_every_answer_and_the_system_turn(tmp_path):
    data = THREE | {"system": "S"}
    limit = len(laid_out([{"role": "system", "content": "S"}, *messages_of(THREE)[:4]])[0])
    samples = loaded(tmp_path, [talk("x", "y"), data], limit, long_samples="split")
    assert learned(samples) == ["y|", "a" * 20 + "|" + "b" * 20 + "|", "c" * 20 + "|"]
    system = {"role": "system", "content": "S"}
    for i, part in ((1, messages_of(THREE)[:4]), (2, messages_of(THREE)[4:])):
        assert [values.tolist() for values in samples[i]] == list(laid_out([system, *part]))
    assert samples.conversations.tolist() == [1, 2, 2] and samples.prompts[1] == samples.prompts[2] != samples.prompts[0]
    assert samples.notes[-1].endswith(f"1 conversation longer than {limit} tokens split into 2 samples: later ones begin without the questions before")
    last = loaded(tmp_path, [data], limit, long_samples="split", multi_turn="last")
    assert learned(last) == ["c" * 20 + "|"]


def test_a_round_that_is_too_long_by_itself_is_cut(tmp_path):
    data = talk("q1", "a" * 20, "q2", "b" * 200, "q3", "c" * 20)
    limit = length(data, 1) + 10
    samples = loaded(tmp_path, [data], limit, long_samples="split")
    first, second, third = learned(samples)
    assert (first, third) == ("a" * 20 + "|", "c" * 20 + "|") and 20 < len(second) < 60 and set(second) == {"b"}


def test_parts_without_anything_to_learn_are_left_out(tmp_path):
    data = json.loads(json.dumps(THREE))
    data["messages"][1]["train"] = False
    samples = loaded(tmp_path, [data], length(THREE, 1), long_samples="split")
    assert learned(samples) == ["b" * 20 + "|", "c" * 20 + "|"]


def test_a_split_for_a_chat_template(tmp_path):
    tokenizer = make_tokenizer(QWEN3)
    whole = load(write(tmp_path, [THREE]), tokenizer, max_length=999, multi_turn="as_is")
    limit = int(whole.lengths[0]) - 5
    samples = load(write(tmp_path, [THREE]), tokenizer, max_length=limit, long_samples="split", multi_turn="as_is")
    alone = load(write(tmp_path, [talk("q3", "c" * 20)]), tokenizer, max_length=limit, multi_turn="as_is")
    assert len(samples) == 2 and samples.lengths.max() <= limit
    assert [values.tolist() for values in samples[1]] == [values.tolist() for values in alone[0]]


def test_rounds_begin_with_a_question():
    messages = [{"role": role} for role in ("system", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant")]
    system, rounds = rounds_of(Conversation(messages))
    assert [message["role"] for message in system] == ["system"]
    assert [[message["role"] for message in each] for each in rounds] == [
        ["assistant", "user", "assistant", "tool", "assistant"], ["user", "assistant"]
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=8), st.integers(70, 220), st.sampled_from(["cut", "split"]))
def test_no_answer_twice_and_nothing_beyond_the_limit(tmp_path_factory, sizes, limit, way):
    tmp_path = tmp_path_factory.mktemp("split")
    texts = [part for i, (q, a) in enumerate(sizes) for part in ("q" * q, chr(97 + i) * a)]
    try:
        samples = load(write(tmp_path, [talk(*texts)]), ByteTokenizer(), max_length=limit, long_samples=way, cache_dir=tmp_path)
    except UserError as error:  # the first question alone is too long
        assert "no answer token within" in str(error)
        return
    assert samples.lengths.max() <= limit
    answers = [part for text in learned(samples) for part in text.split("|") if part]
    letters = [part[0] for part in answers]
    assert len(letters) == len(set(letters)) and all(set(part) == {part[0]} for part in answers)
    wanted = {chr(97 + i): a for i, (_, a) in enumerate(sizes)}
    assert all(len(part) <= wanted[part[0]] for part in answers)
    if way == "split":  # whatever fits by itself is there whole
        for i, (q, a) in enumerate(sizes):
            if len(laid_out(messages_of(talk("q" * q, "x" * a)))[0]) <= limit and len(sizes) > 1:
                assert chr(97 + i) * a in answers


def test_parts_fit_as_measured():
    talks = Conversation(messages_of(talk(*[c * n for c, n in zip("abcdefgh", (5, 30, 5, 10, 5, 50, 5, 5))])))

    def lengths_of(conversations):
        return [len(laid_out(conversation.messages)[0]) for conversation in conversations]

    for limit in range(60, 400, 7):
        parts = parts_of(talks, lengths_of, limit)
        assert [message for part in parts for message in part.messages] == talks.messages
        for part in parts:
            assert lengths_of([part])[0] <= limit or len(part.messages) == 2
        for one, other in zip(parts, parts[1:]):  # as few as fit: the next round would not have
            together = Conversation([*one.messages, *other.messages[:2]])
            assert lengths_of([together])[0] > limit
