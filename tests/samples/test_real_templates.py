"""Published chat templates and tokenizers of later Qwens: every token is the template's, every answer is learned as it will be
asked for, and no text makes a control token."""

import json
import random

import numpy as np
import pytest
from chat_templates import REAL, real_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.conversations.messages import Conversation, call
from finetune.errors import UserError
from finetune.samples.chat_template import ChatTemplate
from finetune.samples.rendering import Rendering

THINKING = ("qwen3", "qwen3_thinking_2507", "qwen3_5_think", "qwen3_5_nothink")
WAYS = ({}, {"enable_thinking": True}, {"enable_thinking": False})
EMPTY = "<think>\n\n</think>\n\n"
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Tells the weather.",
     "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str = "", **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> dict:
    return {"role": "tool", "content": text}


PARIS = [call("get_weather", {"city": "Paris", "days": 3, "nested": {"a": [1.5, None, "é"]}})]
BOTH = [*PARIS, call("now", {})]


# ---- what the template and the tokenizer make of it, without our code


def asked_for(tokenizer, conversation: Conversation, number: int) -> tuple[str, str]:
    """(the prompt with which an answer will be asked for, what the model has to write then)."""
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in conversation.messages]
    tools = conversation.tools or None
    whole = tokenizer.apply_chat_template(messages[: number + 1], tools=tools, tokenize=False)
    prompts = [
        tokenizer.apply_chat_template(messages[:number], tools=tools, tokenize=False, add_generation_prompt=True, **way)
        for way in WAYS
    ]
    prompt = max((prompt for prompt in prompts if whole.startswith(prompt)), key=len)
    target = whole[len(prompt) :]
    assert target.endswith("<|im_end|>\n")
    if prompt.endswith("<think>\n") and target.startswith("\n</think>\n\n"):  # no thoughts: the block is no target
        prompt, target = prompt + "\n</think>\n\n", target.removeprefix("\n</think>\n\n")
    return normal(prompt), normal(target.removesuffix("\n"))


def normal(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", text)


def learned_of(tokenizer, sample) -> list[tuple[str, str]]:
    """(what stands before it, what is learned) for each stretch of labels."""
    ids, labels, _ = sample
    assert ((labels == ids) | (labels == -100)).all()
    on = np.concatenate(([0], (labels >= 0).astype(int), [0]))
    begins, ends = np.flatnonzero(np.diff(on) == 1), np.flatnonzero(np.diff(on) == -1)
    decode = lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False)  # noqa: E731
    return [(decode(ids[:begin]), decode(ids[begin:end])) for begin, end in zip(begins, ends)]


def check(tokenizer, conversation: Conversation, with_control_text: bool = False) -> list:
    """Renders a conversation and holds it against the template; returns the samples.

    with_control_text: some texts hold special tokens, which are text here and tokens for transformers.
    """
    renderer = ChatTemplate(tokenizer)
    (samples,) = renderer.render_batch([conversation])
    renderer.problems.raise_if_any()
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in conversation.messages]
    every = [
        tokenizer.apply_chat_template(messages[:length], tools=conversation.tools or None, return_dict=False)
        for length in range(2, len(messages) + 1)
        if messages[length - 1]["role"] == "assistant"
    ]
    texts = [tokenizer.decode(ids) for ids in every]
    for sample in samples:
        assert with_control_text or sample.ids.tolist() in every, "the ids of the template's own text"
        assert tokenizer.decode(sample.ids) in texts
    found = sorted(pair for sample in samples for pair in learned_of(tokenizer, sample))
    wanted = [n for n, m in enumerate(messages) if m["role"] == "assistant" and conversation.messages[n].get("weight", 1)]
    expected = sorted(asked_for(tokenizer, conversation, number) for number in wanted)
    assert len(found) == len(expected)
    for (before, text), (prompt, target) in zip(found, expected):
        extra = before.removeprefix(prompt)
        assert before + text == prompt + target and len(extra) < len(before)
        assert extra.strip("\n \t") == "", "only a token that begins before the answer is not learned"
    return samples


# ---- a table of conversations


CASES = {
    "one answer": (Conversation([user("Hi"), answer("Hello.")]), (1, 1, 1, 1, 1, 1)),
    "a system turn": (Conversation([{"role": "system", "content": "Be brief."}, user("Hi"), answer("Yo")]), (1, 1, 1, 1, 1, 1)),
    "two answers": (Conversation([user("a"), answer("b"), user("c"), answer("d")]), (1, 2, 1, 2, 2, 2)),
    "train the last": (Conversation([user("a"), answer("b", weight=0.0), user("c"), answer("d")]), (1, 1, 1, 1, 1, 1)),
    "train the first": (Conversation([user("a"), answer("b"), user("c"), answer("d", weight=0.0)]), (1, 1, 1, 1, 1, 1)),
    "a system turn and tools": (
        Conversation([{"role": "system", "content": "Be brief."}, user("a"), answer(tool_calls=BOTH)], TOOLS), (1, 1, 1, 1, 1, 1),
    ),
    "tools, no call": (Conversation([user("a"), answer("b")], TOOLS), (1, 1, 1, 1, 1, 1)),
    "a call at the end": (Conversation([user("a"), answer(tool_calls=PARIS)], TOOLS), (1, 1, 1, 1, 1, 1)),
    "a call and an answer": (Conversation([user("a"), answer(tool_calls=PARIS), result("5"), answer("d")], TOOLS), (1, 2, 1, 2, 1, 1)),
    "two calls at once": (
        Conversation([user("a"), answer("Let me see.", tool_calls=BOTH), result("5"), result('{"b": 1}'), answer("d")], TOOLS),
        (1, 2, 1, 2, 1, 1),
    ),
    "calls in two questions": (
        Conversation([user("a"), answer(tool_calls=PARIS), result("5"), answer("d"), user("e"), answer(tool_calls=BOTH)], TOOLS),
        (1, 3, 1, 3, 2, 2),
    ),
    "results as text": (
        Conversation([user("a"), answer("<tool_call>\n{}\n</tool_call>"), user("<tool_response>\n5\n</tool_response>"), answer("d")]),
        (1, 2, 1, 2, 1, 1),
    ),
}  # fmt: skip
THOUGHTS = {
    "thoughts": (Conversation([user("a"), answer("b", reasoning_content="hm\nso")]), (1, 1, 1, 1)),
    "thoughts in the text": (Conversation([user("a"), answer("<think>\nhm\n</think>\n\nb")]), (1, 1, 1, 1)),
    "an empty block in the text": (Conversation([user("a"), answer("<think>\n\n</think>\n\nb")]), (1, 1, 1, 1)),
    "thoughts twice": (
        Conversation([user("a"), answer("b", reasoning_content="hm"), user("c"), answer("d", reasoning_content="so")]), (2, 2, 2, 2),
    ),
    "thoughts once": (Conversation([user("a"), answer("b", reasoning_content="hm"), user("c"), answer("d")]), (2, 2, 2, 2)),
    "thoughts and calls": (
        Conversation([user("a"), answer("x", reasoning_content="hm", tool_calls=BOTH), result("5"), result("6"),
                      answer("b", reasoning_content="so")], TOOLS), (1, 1, 1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", REAL)
def test_each_answer_is_learned_as_it_will_be_asked_for(name, case):
    """And how many samples that makes, for each template."""
    conversation, counts = CASES[case]
    assert len(check(real_tokenizer(name), conversation)) == counts[REAL.index(name)]


@pytest.mark.parametrize("case", THOUGHTS)
@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_learned_where_the_template_puts_them(name, case):
    conversation, counts = THOUGHTS[case]
    assert len(check(real_tokenizer(name), conversation)) == counts[THINKING.index(name)]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_thoughts_that_have_no_place_are_refused(name):
    renderer = ChatTemplate(real_tokenizer(name), "talk.json")
    with pytest.raises(UserError) as caught:
        renderer.render_batch([Conversation([user("a"), answer("b", reasoning_content="hm")])])
        renderer.problems.raise_if_any()
    assert caught.value.findings[0].startswith(
        "talk.json: sample 1: the model's chat template has no place for thoughts (\"reasoning_content\") - remove them"
    )


def test_every_conversation_of_the_table_in_the_words_of_the_model():
    """What is learned, letter for letter, for one template; written by hand."""
    tokenizer, learned = real_tokenizer("qwen3"), {}
    for case, (conversation, _) in (CASES | THOUGHTS).items():
        (samples,) = ChatTemplate(tokenizer).render_batch([conversation])
        learned[case] = [text for sample in samples for _, text in learned_of(tokenizer, sample)]
    paris = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3, "nested": {"a": [1.5, null, "é"]}}}\n</tool_call>'
    both = f'{paris}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
    thoughts = "<think>\nhm\nso\n</think>\n\nb<|im_end|>"
    assert learned == {
        "one answer": ["Hello.<|im_end|>"],
        "a system turn": ["Yo<|im_end|>"],
        "two answers": ["d<|im_end|>", "b<|im_end|>"],
        "train the last": ["d<|im_end|>"],
        "train the first": ["b<|im_end|>"],
        "a system turn and tools": [f"{both}<|im_end|>"],
        "tools, no call": ["b<|im_end|>"],
        "a call at the end": [f"{paris}<|im_end|>"],
        "a call and an answer": ["d<|im_end|>", f"{paris}<|im_end|>"],
        "two calls at once": ["d<|im_end|>", f"Let me see.\n{both}<|im_end|>"],
        "calls in two questions": [f"{both}<|im_end|>", "d<|im_end|>", f"{paris}<|im_end|>"],
        "results as text": ["d<|im_end|>", "<tool_call>\n{}\n</tool_call><|im_end|>"],
        "thoughts": [thoughts],
        "thoughts in the text": ["<think>\nhm\n</think>\n\nb<|im_end|>"],
        "an empty block in the text": ["b<|im_end|>"],
        "thoughts twice": ["<think>\nso\n</think>\n\nd<|im_end|>", "<think>\nhm\n</think>\n\nb<|im_end|>"],
        "thoughts once": ["d<|im_end|>", "<think>\nhm\n</think>\n\nb<|im_end|>"],
        "thoughts and calls": [f"<think>\nhm\n</think>\n\nx\n{both}<|im_end|>", "<think>\nso\n</think>\n\nb<|im_end|>"],
    }


def texts_learned(name: str, conversation: Conversation, **rendering) -> tuple[list[str], list[str]]:
    """(what is learned, the notes)."""
    tokenizer = real_tokenizer(name)
    renderer = ChatTemplate(tokenizer, "talk.json", Rendering(**rendering))
    (samples,) = renderer.render_batch([conversation])
    return [text for sample in samples for _, text in learned_of(tokenizer, sample)], renderer.notes()


def test_multi_turn_last_and_as_is():
    twice, _ = CASES["two answers"]
    assert texts_learned("qwen3", twice, multi_turn="last")[0] == ["d<|im_end|>"]
    assert texts_learned("qwen2_5", twice, multi_turn="last")[0] == ["d<|im_end|>"]
    assert texts_learned("qwen3", twice, multi_turn="as_is")[0] == ["b<|im_end|>", "d<|im_end|>"]
    learned, notes = texts_learned("qwen3", THOUGHTS["thoughts twice"][0], multi_turn="as_is")
    assert learned == ["b<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"]
    assert notes == ["1 sample with thoughts before an answer that is not the last (first: 1): the model's chat template leaves them out"]
    calls, _ = CASES["a call and an answer"]
    assert len(texts_learned("qwen2_5", calls, multi_turn="last")[0]) == 2, "the calls belong to the last answer"
    learned, notes = texts_learned("qwen3", CASES["train the first"][0], multi_turn="last")
    assert learned == [] and notes == ["1 sample left out whose last answer is not to be learned (first: 1)"]


def test_what_unrolling_costs_and_empty_blocks_are_said():
    learned, notes = texts_learned("qwen3", CASES["two answers"][0])
    assert notes == [
        "1 conversation unrolled into 2 samples, one for each answer that the chat template shows differently later (1.6 times the "
        "tokens); --multi_turn last or as_is to change",
        "2 of 2 answers have no thoughts: the empty block of thoughts that the template adds is context, not learned (--empty_thoughts learn to change)",
    ]
    for name, expected in (
        ("qwen3", f"{EMPTY}Hello.<|im_end|>"),
        ("qwen3_thinking_2507", "\n</think>\n\nHello.<|im_end|>"),
        ("qwen3_5_nothink", "Hello.<|im_end|>"),  # its prompt for an answer holds the block
        ("qwen2_5", "Hello.<|im_end|>"),
    ):
        (found,) = texts_learned(name, CASES["one answer"][0], empty_thoughts="learn")[0]
        assert expected.endswith(found) and found.strip() == expected.strip(), name


def test_weights_go_with_their_answers():
    tokenizer = real_tokenizer("qwen2_5")
    messages = [user("a"), answer("b", weight=0.25), user("c"), answer("d"), user("e"), answer("f", weight=0.0)]
    ((sample,),) = ChatTemplate(tokenizer).render_batch([Conversation(messages)])
    of = {text: set(sample.weights[sample.ids == tokenizer.convert_tokens_to_ids(text)].tolist()) for text in "bdf"}
    assert of == {"b": {0.25}, "d": {1.0}, "f": {0.0}}
    assert sample.weights.dtype == np.float32 and (sample.weights[sample.labels < 0] == 0).all()
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    ((sample,),) = ChatTemplate(tokenizer).render_batch([Conversation(plain)])
    assert sample.weights is None


# ---- hypothesis: any conversation

TEXT = st.text(st.sampled_from("ab .\n\t'1é好́🙂{}\"\\"), max_size=12)
FILLED = TEXT.filter(str.strip)
VALUES = st.recursive(TEXT | st.integers() | st.booleans() | st.floats(-1e9, 1e9), lambda inner: st.lists(inner, max_size=2), max_leaves=3)
CALLS = st.lists(st.builds(call, st.sampled_from(["get_weather", "now"]), st.dictionaries(st.sampled_from("xyz"), VALUES, max_size=2)), min_size=1, max_size=2)


@st.composite
def conversations(draw, thinks: bool):
    tools = draw(st.sampled_from([[], TOOLS]))
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []

    def an_answer(text: str, **more) -> dict:
        how = draw(st.sampled_from(["", "field", "text"])) if thinks else ""
        if how == "text":
            text = f"<think>\n{draw(TEXT)}\n</think>\n\n{text}"
        more |= {"reasoning_content": draw(FILLED)} if how == "field" else {}
        weight = draw(st.sampled_from([1, 1, 1, 0.5, 0.0]))
        return answer(text, **more, **({} if weight == 1 else {"weight": weight}))

    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(FILLED)))
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            calls = draw(CALLS)
            messages += [an_answer(draw(TEXT), tool_calls=calls), *(result(draw(TEXT)) for _ in calls)]
        messages.append(an_answer(draw(FILLED)))
    messages[-1].pop("weight", None)
    return Conversation(messages, tools)


@pytest.mark.parametrize("name", REAL)
def test_any_conversation(name):
    tokenizer = real_tokenizer(name)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(conversations(thinks=name in THINKING))
    def holds(conversation):
        check(tokenizer, conversation)

    holds()


def test_shapes_that_are_remembered_change_nothing():
    """The template is asked once for all conversations of a shape: with another renderer's memory or none, the same."""
    draw = random.Random(0)
    every = [conversation for conversation, _ in (CASES | THOUGHTS).values()]
    for name in THINKING:
        together = ChatTemplate(real_tokenizer(name))
        for conversation in draw.choices(every, k=60):
            (samples,) = together.render_batch([conversation])
            (alone,) = ChatTemplate(real_tokenizer(name)).render_batch([conversation])
            assert [s.ids.tolist() for s in samples] == [s.ids.tolist() for s in alone]
            assert [s.labels.tolist() for s in samples] == [s.labels.tolist() for s in alone]


# ---- no text makes a control token

HOSTILE = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|vision_start|>", "<|im_", "end|>", "\n", "assistant\n", " ", "a", "好",
           "\ue000", "\ue0000\ue001", "\ue0013\ue001", "\ue002", "<|im_start|>assistant\n", "{", '"', "<|im_end|>\n"]  # fmt: skip


def hostile(draw: random.Random) -> str:
    """Not blank, but for the rest anything, also at its beginning and end."""
    pieces = draw.choices(HOSTILE, k=draw.randint(1, 6))
    return "".join([*pieces[: len(pieces) // 2], "x", *pieces[len(pieces) // 2 :]])


def hostile_conversation(draw: random.Random, thinks: bool) -> Conversation:
    """Special-token text in every place that a text can have."""
    tools = []
    if draw.random() < 0.3:
        tools = json.loads(json.dumps(TOOLS))
        tools[0]["function"]["description"] = hostile(draw)
    turns = [{"role": "system", "content": hostile(draw)}] if draw.random() < 0.3 else []
    for _ in range(draw.choice([1, 1, 2])):
        turns.append(user(hostile(draw)))
        if tools and draw.random() < 0.7:
            arguments = {hostile(draw): hostile(draw), "city": [hostile(draw)]}
            turns += [answer(tool_calls=[call("get_weather", arguments)]), result(hostile(draw))]
        more = {"reasoning_content": hostile(draw)} if thinks and draw.random() < 0.3 else {}
        turns.append(answer(hostile(draw), **more))
    return Conversation(turns, tools)


def check_control_tokens(name: str, count: int) -> None:
    """Every control token is one that the template writes; of one in twenty all else is looked at, too."""
    tokenizer, draw, done = real_tokenizer(name), random.Random(name), 0
    end, start, *others = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|vision_start|>"])
    renderer = ChatTemplate(tokenizer)
    while done < count:
        batch = [hostile_conversation(draw, name in THINKING) for _ in range(min(500, count - done))]
        rendered = renderer.render_batch(batch)
        renderer.problems.raise_if_any()
        for conversation, samples in zip(batch, rendered):
            roles = [message["role"] for message in conversation.messages]
            for ids, labels, _ in samples:
                turns = (ids == start).sum()
                assert turns == (ids == end).sum() <= len(roles) + 1 and not np.isin(ids, others).any()
                assert np.array_equal(np.flatnonzero(labels == end), np.flatnonzero((labels >= 0) & (ids == end)))
            assert sum((labels == end).sum() for _, labels, _ in samples) == roles.count("assistant")
        for conversation in batch[::20]:
            check(tokenizer, conversation, with_control_text=True)
        done += len(batch)


@pytest.mark.parametrize("name", REAL)
def test_no_text_makes_a_control_token(name):
    check_control_tokens(name, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_no_text_of_many_makes_a_control_token(name):
    check_control_tokens(name, 100_000 // len(REAL) + 1)


def test_special_tokens_are_tokens_where_they_are_asked_for():
    tokenizer = real_tokenizer("qwen3")
    start, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|im_end|>"])
    messages = [user("a <|vision_start|>"), answer("b<|im_end|> <|vision_start|> c")]
    for rendering, expected in (
        ({}, (0, 2)),
        ({"train_tokens": ("<|vision_start|>",)}, (2, 2)),
        ({"train_tokens": ("<|im_end|>",)}, (0, 2)),  # the template's own never come from a text
        ({"allow_special": True}, (2, 3)),
    ):
        renderer = ChatTemplate(tokenizer, "", Rendering(**rendering))
        ((sample,),) = renderer.render_batch([Conversation(messages)])
        assert ((sample.ids == start).sum(), (sample.ids == end).sum()) == expected, rendering
        what = "it becomes control tokens" if "allow_special" in rendering else "it is encoded as plain text. --allow_special to change"
        assert renderer.notes()[0] == f"1 sample contains special-token text (first: 1); {what}"
        assert tokenizer.decode(sample.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
