"""First-generation Qwen: which samples a conversation makes, with tools and without; and what both renderers have in common."""

import json
import random

import numpy as np
import pytest
from chat_templates import make_tokenizer, real_tokenizer
from talks import talk, write
from test_real_templates import hostile_conversation

from finetune.conversations.messages import Conversation, call
from finetune.errors import UserError
from finetune.samples.rendered_samples import load
from finetune.samples.renderers import renderer_of
from finetune.samples.rendering import Rendering
from qwen_model.tokenization_qwen import QWenTokenizer
from qwen_model.vocabulary import find_vocabulary

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CALLED = "Thought: Adding.\nAction: add\nAction Input: {\"a\": 1}\nObservation:"
KNOWN = " I now know the final answer.\nFinal Answer: "


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str = "", **more) -> dict:
    return {"role": "assistant", "content": text, **more}


CALL = answer("Adding.", tool_calls=[call("add", {"a": 1})])
RESULT = {"role": "tool", "content": "2"}
TWO_QUESTIONS = Conversation([user("a"), CALL, RESULT, answer("b"), user("c"), answer("d")], TOOLS)


@pytest.fixture(scope="module")
def tokenizer():
    return QWenTokenizer(str(find_vocabulary()))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def learned(tokenizer, sample) -> list[str]:
    """The stretches of text that are learned."""
    ids, labels = np.array(sample[0]), np.array(sample[1])
    assert ((labels == ids) | (labels == -100)).all()
    cuts = np.flatnonzero(np.diff(labels >= 0)) + 1
    pieces = [piece for piece in np.split(labels, cuts) if piece[0] >= 0]
    return [tokenizer.decode(piece) for piece in pieces]


def rendered(tokenizer, conversation: Conversation, **rendering) -> tuple[list, list[str]]:
    """(the samples, the notes)."""
    renderer = renderer_of(tokenizer, "talk.json", Rendering(**rendering))
    (samples,) = renderer.render_batch([conversation])
    renderer.problems.raise_if_any()
    return samples, renderer.notes()


def test_with_tools_each_question_makes_a_sample(tokenizer):
    """The question that is being answered carries the tools, and no earlier one."""
    samples, notes = rendered(tokenizer, TWO_QUESTIONS)
    assert [learned(tokenizer, sample) for sample in samples] == [
        [CALLED, f"{KNOWN}b<|im_end|>"],
        [f"Thought:{KNOWN}d<|im_end|>"],
    ]
    texts = [tokenizer.decode(sample.ids) for sample in samples]
    assert ["Begin!\n\nQuestion: a" in text for text in texts] == [True, False]
    assert ["user\na<|im_end|>" in text for text in texts] == [False, True] and "Begin!\n\nQuestion: c" in texts[1]
    (note,) = notes
    assert note.startswith("1 conversation unrolled into 2 samples, each with the tools in the question that is answered (")


def test_multi_turn_with_tools(tokenizer):
    samples, notes = rendered(tokenizer, TWO_QUESTIONS, multi_turn="last")
    assert [learned(tokenizer, sample) for sample in samples] == [[f"Thought:{KNOWN}d<|im_end|>"]] and notes == []
    samples, notes = rendered(tokenizer, TWO_QUESTIONS, multi_turn="as_is")
    (sample,) = samples
    assert learned(tokenizer, sample) == [CALLED, f"{KNOWN}b<|im_end|>", f"Thought:{KNOWN}d<|im_end|>"] and notes == []
    assert tokenizer.decode(sample.ids).count("Begin!\n\nQuestion: ") == 1


def test_multi_turn_without_tools(tokenizer):
    """The format shows every answer as it was asked for, so that only "last" makes a difference."""
    conversation = Conversation([user("a"), answer("b"), user("c"), answer("d")])
    for multi_turn, expected in (("unroll", ["b", "d"]), ("as_is", ["b", "d"]), ("last", ["d"])):
        samples, notes = rendered(tokenizer, conversation, multi_turn=multi_turn)
        assert [learned(tokenizer, sample) for sample in samples] == [[f"{text}<|im_end|>" for text in expected]]
        assert notes == []
    conversation.messages[-1]["weight"] = 0.0
    samples, notes = rendered(tokenizer, conversation, multi_turn="last")
    assert samples == [] and notes == ["1 sample left out whose last answer is not to be learned (first: 1)"]


@pytest.mark.parametrize(
    "conversation,what",
    [
        (Conversation([user("a"), answer("b", reasoning_content="c")]), 'the thoughts of an answer ("reasoning_content") have no place'),
        (Conversation([user("a"), answer(tool_calls=[call("add", {}), call("add", {})])], TOOLS), "message 2"),
        (Conversation([user("a"), CALL, RESULT, answer("b")]), "list them in \"tools\" beside the turns"),
        (Conversation([user("a\nObservation: x"), answer("b\nAction: add\nAction Input: {}")], TOOLS), "message 2"),
    ],
)  # fmt: skip
def test_what_the_format_has_no_place_for_is_refused(tokenizer, conversation, what):
    with pytest.raises(UserError) as caught:
        rendered(tokenizer, conversation)
    (line,) = caught.value.findings
    assert line.startswith("talk.json: sample 1: ") and what in line


REACT = [
    user("Answer the following questions as best you can. …\nObservation: the result of the action\n…\nBegin!\n\nQuestion: a"),
    answer("Thought: Adding.\nAction: add\nAction Input: {}\nObservation: 2 <|im_end|>\nThought: I now know the final answer.\nFinal Answer: b"),
]  # fmt: skip


def test_results_inside_an_answer_of_plain_text_are_not_learned(tokenizer):
    """In the form of the published example: the question carries the instruction, the answer everything that follows."""
    for each in (tokenizer, real_tokenizer("qwen2_5"), real_tokenizer("qwen3")):
        samples, notes = rendered(each, Conversation(REACT))
        (texts,) = [learned(each, sample) for sample in samples]
        assert texts == [
            "Thought: Adding.\nAction: add\nAction Input: {}\nObservation:",
            " I now know the final answer.\nFinal Answer: b<|im_end|>",
        ]
        assert "1 sample with ReAct answers: the results in them (Observation) are not learned" in notes
        unmarked = [user("What does Begin! mean?"), REACT[1]]
        (sample,), notes = rendered(each, Conversation(unmarked))
        assert len(learned(each, sample)) == 1 and not any("ReAct" in note for note in notes)


def test_results_in_plain_text_beside_thoughts_and_blanks():
    """Where a template moves or trims a text, its results stay the results, and nothing else is learned or left out for it."""
    call, final = "Action: f\nAction Input: {}\nObservation:", "\nThought: yes\nFinal Answer: b"
    for name in ("qwen2_5", "qwen3", "qwen3_5_think"):
        each = real_tokenizer(name)
        messages = [REACT[0], answer(f"<think>\nlong thoughts\n</think>\n\n{call} SECRET{final}")]
        (sample,), _ = rendered(each, Conversation(messages))
        texts = learned(each, sample)
        assert "SECRET" not in "".join(texts) and "long thoughts" in texts[0] and texts[-1] == " yes\nFinal Answer: b<|im_end|>"
        for blanks in ("", "\n", "\n" * 30):
            messages = [REACT[0], answer(f"{call} 22{blanks}"), user("QUESTION"), answer("ok")]
            (sample,), _ = rendered(each, Conversation(messages), multi_turn="as_is")
            text = "".join(learned(each, sample))
            assert text.startswith(call) and text.removeprefix(call).lstrip() in ("<|im_end|>ok<|im_end|>",), (name, blanks, text)


def test_special_tokens_are_told_of_wherever_they_stand(tokenizer):
    hostile = "<|im_end|>"
    tools = [{"type": "function", "function": {"name": "add", "description": hostile, "parameters": {"a": 1}}}]
    calls = answer("", tool_calls=[call("add", {"a": hostile})])
    for each in (tokenizer, real_tokenizer("qwen3")):
        for conversation in (Conversation([user("a"), answer("b")], tools), Conversation([user("a"), calls], TOOLS)):
            _, notes = rendered(each, conversation)
            assert notes[0].startswith("1 sample contains special-token text (first: 1); it is encoded as plain text")
        kept = "<|extra_0|>" if each is tokenizer else "<|vision_pad|>"
        _, notes = rendered(each, Conversation([user(kept), answer("b")]), train_tokens=(kept,))
        assert not any("special-token" in note for note in notes), "it became a token"


def test_special_tokens_in_a_text(tokenizer):
    extra, end = tokenizer.special_tokens["<|extra_0|>"], tokenizer.im_end_id
    conversation = Conversation([user("a <|extra_0|>"), answer("b <|extra_0|> <|im_end|> <|extra_1|> c")])
    for rendering, expected in (
        ({}, (0, 3)),
        ({"train_tokens": ("<|extra_0|>", "<|im_end|>")}, (2, 3)),  # the format's own never come from a text
        ({"allow_special": True}, (2, 4)),
    ):
        (sample,), notes = rendered(tokenizer, conversation, **rendering)
        assert ((sample.ids == extra).sum(), (sample.ids == end).sum()) == expected, rendering
        assert notes[0].startswith("1 sample contains special-token text (first: 1); it ")


# ---- through a file


def test_trained_tokens_that_never_occur_are_told_of(tmp_path, cache, tokenizer):
    path = write(tmp_path, [talk("a <|extra_0|>", "b")])
    samples = load(path, tokenizer, max_length=100, train_tokens=("<|extra_0|>", "<|extra_1|>"))
    assert samples.notes[-1] == f"{path}: --train_tokens <|extra_1|>: stands in no conversation, so its row learns nothing from them"
    assert tokenizer.special_tokens["<|extra_0|>"] in samples[0][0]


def weighted(*weights, texts=("one", "two", "three")) -> dict:
    """A sample with an answer for each weight; None: the file says nothing."""
    turns = []
    for text, weight in zip(texts, weights):
        turns += [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        turns[-1] |= {} if weight is None else {"weight": weight}
    return {"messages": turns}


def test_weights_of_a_file(tmp_path, cache, tokenizer):
    """Plain samples before and behind weighted ones; from the cache the same as rendered."""
    path = write(tmp_path, [weighted(None), weighted(1, 0), weighted(0.5, None, 0), weighted(None, None)])
    for _ in range(2):
        samples = load(path, tokenizer, max_length=100)
        assert [samples.token_weights(i) is None for i in range(4)] == [True, True, False, True]
        assert samples.supervised.tolist() == [2, 2, 4, 4] and samples.weight_sums.tolist() == [2, 2, 3, 4]
        (ids, labels), weights = samples[2], samples.token_weights(2)
        assert weights.dtype == np.float32 and len(weights) == len(ids)
        end = tokenizer.im_end_id
        assert [(tokenizer.decode([label]), weight) for label, weight in zip(labels.tolist(), weights.tolist()) if label >= 0] == [
            ("one", 0.5), ("<|im_end|>", 0.5), ("two", 1), ("<|im_end|>", 1)
        ]  # fmt: skip
        assert (ids == end).sum() == 7 and (weights[labels < 0] == 0).all()
    plain = write(tmp_path, [weighted(None), weighted(1, 0)], name="plain.json")
    assert load(plain, tokenizer, max_length=100)._weights is None, "nothing is stored where all weigh 1"
    cut = load(path, tokenizer, max_length=len(samples[0][0]))
    assert cut.weight_sums.tolist() == [2, 2, 1, 2]


def test_whether_a_model_that_thinks_learns_only_answers_without_thoughts(tmp_path, cache, tokenizer):
    tokenizers = {"qwen": tokenizer, "qwen2_5": real_tokenizer("qwen2_5"), "qwen3": real_tokenizer("qwen3")}
    path = write(tmp_path, [talk("a", "b")])
    found = {name: load(path, each, max_length=100).without_thoughts for name, each in tokenizers.items()}
    assert found == {"qwen": False, "qwen2_5": False, "qwen3": True}
    assert not load(path, tokenizers["qwen3"], max_length=100, empty_thoughts="learn").without_thoughts
    mixed = write(tmp_path, [talk("a", "b"), talk("a", "<think>c</think>b")], name="mixed.json")
    assert not load(mixed, tokenizers["qwen3"], max_length=100).without_thoughts


def test_fingerprints_know_weights(tmp_path, cache, tokenizer):
    prints = {load(write(tmp_path, [weighted(w)], name=f"{w}.json"), tokenizer, max_length=100).fingerprint for w in (1, 0.5, 0.25)}
    assert len(prints) == 3


def test_unrolled_samples_are_named_by_their_conversation(tmp_path, cache):
    """Cut, dropped and refused: the number in the file, not among the samples."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = real_tokenizer("qwen3").chat_template
    path = write(tmp_path, [talk("a", "b", "c", "d"), talk("x" * 80, "b"), talk("1 " * 100, "b")])
    lengths = load(path, tokenizer, max_length=1000).lengths.tolist()
    assert len(lengths) == 4 and max(lengths[:2]) < min(lengths[2:])
    with pytest.raises(UserError, match=rf"2 of 3 samples have no answer token within {max(lengths[:2])}: sample 2, 3; raise"):
        load(path, tokenizer, max_length=max(lengths[:2]))
    path = write(tmp_path, [talk("a", "b", "1 " * 100, "d"), talk("a", "b")], name="long.json")
    cut = load(path, tokenizer, max_length=60)
    assert len(cut) == 2 and cut.notes[-1].endswith("1 samples of unrolled conversations are left out: their answers lie behind 60 tokens")
    path = tmp_path / "talk.json"
    dropped = load(path, tokenizer, max_length=max(lengths[:2]), long_samples="drop")
    assert len(dropped) == 2 and any("2 samples dropped" in note for note in dropped.notes)


def test_multi_turn_last_may_leave_nothing(tmp_path, cache, tokenizer):
    path = write(tmp_path, [weighted(None, 0)])
    assert len(load(path, tokenizer, max_length=100)) == 1
    with pytest.raises(UserError) as caught:
        load(path, tokenizer, max_length=100, multi_turn="last")
    assert caught.value.findings == [f"{path}: no sample whose last answer is to be learned, so --multi_turn last leaves none; leave it out"]


def test_the_example_with_tools(cache, tokenizer):
    """data/tools_example.json, for the first generation and a later one: every call is learned, and no result."""
    from pathlib import Path

    path = Path(__file__).parents[2] / "data" / "tools_example.json"
    talks = json.loads(path.read_text(encoding="utf-8"))
    calls = [each for sample in talks for turn in sample["messages"] for each in turn.get("tool_calls", ())]
    results = [turn["content"] for sample in talks for turn in sample["messages"] if turn["role"] == "tool"]
    assert len(calls) > 20 < len(results) and all(len(result) > 3 for result in results)
    for each, opening in ((tokenizer, "\nAction: "), (real_tokenizer("qwen3"), "<tool_call>")):
        samples = load(path, each, max_length=4096)
        texts = [text for i in range(len(samples)) for text in learned(each, samples[i])]
        assert sum(text.count(opening) for text in texts) == len(calls)
        assert not [result for result in results if any(result in text for text in texts)]


# ---- no text makes a control token


def check_first_generation(tokenizer, count: int) -> None:
    """Hostile conversations, with tools and without: control tokens are the format's own, and every answer ends with one."""
    draw, renderer = random.Random(0), renderer_of(tokenizer, "talk.json")
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    others = [index for index in tokenizer.special_tokens.values() if index not in (start, end)]
    for _ in range(-(-count // 500)):
        batch = [hostile_conversation(draw, thinks=False) for _ in range(500)]
        for conversation, samples in zip(batch, renderer.render_batch(batch)):
            for ids, labels, _ in samples:
                turns = sum(message["role"] in ("system", "user") for message in conversation.messages) * 2 + 1
                assert (ids == start).sum() == (ids == end).sum() <= turns and not np.isin(ids, others).any()
                assert ((labels == ids) | (labels == -100)).all() and labels[-2] == end
    lines = renderer.problems.found
    assert all("read back as something else" in line or "generation stops" in line for line in lines), lines


def test_no_text_makes_a_control_token(tokenizer):
    check_first_generation(tokenizer, 500)


@pytest.mark.slow
def test_no_text_of_many_makes_a_control_token(tokenizer):
    check_first_generation(tokenizer, 20_000)
