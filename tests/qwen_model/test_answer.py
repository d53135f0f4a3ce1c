"""model.answer: prompts with tools, where generation stops, and what is read from it. A logits processor dictates the tokens."""

import pytest
from test_generation import IM_END, Dictate, messages_of, model  # noqa: F401 (a fixture)

from qwen_model import react
from qwen_model.chatml import render_prompt

WEATHER = {"name": "get_weather", "description": "The weather, now.", "parameters": {"city": {"type": "string"}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "巴黎"}}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "巴黎天气怎么样？"}]
CALLED = {"role": "assistant", "content": "I should look.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "22°C", "name": "get_weather"}
ANSWERED = {"role": "assistant", "content": "22 度。"}


def dictated(model, tokenizer, text: str, messages, tools=(WEATHER,), end=(IM_END,), **settings) -> tuple[dict, Dictate]:  # noqa: F811
    said = Dictate([*tokenizer.encode_ordinary(text), *end, *tokenizer.encode_ordinary(" and on")])
    settings = {"max_new_tokens": 60, "logits_processor": [said]} | settings
    return model.answer(tokenizer, messages, list(tools), **settings), said


def test_a_call_and_its_answer(model, tokenizer):  # noqa: F811
    """Generation ends with "Observation:", the next prompt goes on in the same turn: the tokens of the training sample."""
    whole = react.render([*ASKED, CALLED, RESULT, ANSWERED], [WEATHER])
    text = whole[-1]["content"]
    first, rest = text.split(" 22°C\nThought:")
    message, said = dictated(model, tokenizer, first, ASKED, end=())
    assert message == CALLED
    assert said.prompts == [render_prompt(tokenizer, react.render_asked(ASKED, [WEATHER]))]
    assert said.steps == len(tokenizer.encode_ordinary(first))
    message, said = dictated(model, tokenizer, rest, [*ASKED, CALLED, RESULT])
    assert message == ANSWERED
    sample = render_prompt(tokenizer, whole[:-1]) + tokenizer.encode_ordinary(text)
    assert said.prompts[0] + tokenizer.encode_ordinary(rest) == sample


@pytest.mark.parametrize("arguments", ["{}", "not json", "[1]", ""])
def test_it_stops_whatever_stands_before(model, tokenizer, arguments):  # noqa: F811
    text = f"Thought: a\nAction: f\nAction Input: {arguments}\nObservation:"
    message, said = dictated(model, tokenizer, text, ASKED, end=())
    assert said.steps == len(tokenizer.encode_ordinary(text))
    expected = {} if arguments == "{}" else arguments
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}


def test_without_tools_it_is_chat(model, tokenizer):  # noqa: F811
    messages = messages_of("Who are you?", [("Hi", "Hello!")])
    response = model.chat(tokenizer, "Who are you?", [("Hi", "Hello!")])[0]
    for tools in (None, []):
        assert model.answer(tokenizer, messages, tools) == {"role": "assistant", "content": response}
    text = "Thought: a\nAction: f\nAction Input: {}\nObservation: x"
    assert dictated(model, tokenizer, text, ASKED, ())[0]["content"] == text  # nor does it stop there


def test_settings(model, tokenizer):  # noqa: F811
    words = [tokenizer.encode_ordinary(" look")]
    assert dictated(model, tokenizer, "I should look.", ASKED, stop_words_ids=words)[0]["content"] == "I should"
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    _, said = dictated(model, tokenizer, "x", [ASKED[0], *earlier, *ASKED[1:], CALLED, RESULT], max_window_size=8)
    assert said.prompts == [render_prompt(tokenizer, react.render_asked([*ASKED, CALLED, RESULT], [WEATHER]))]
    with pytest.raises(ValueError, match="a prompt ends with a message by the user"):
        model.answer(tokenizer, [*ASKED, ANSWERED], [WEATHER])
    with pytest.raises(ValueError, match="about a call, but there are no tools"):
        model.answer(tokenizer, [*ASKED, CALLED, RESULT])
    with pytest.raises(ValueError, match="or with the result of a tool"):
        model.answer(tokenizer, [*ASKED, CALLED], [WEATHER])
