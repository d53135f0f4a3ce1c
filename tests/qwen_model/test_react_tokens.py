"""The ReAct form as tokens: what of it is learned, and prompts that are the beginnings of samples."""

from unicodedata import normalize

import numpy as np
import pytest
from test_react import ANSWER, ASKED, EARLIER, INPUT, PARIS, ROME, ROME_INPUT, TALK, WEATHER, call, result, says, user

from qwen_model import chatml, react
from qwen_model.react import by_question, parse_answer, render, render_asked, stop_sequences


def learned(tokenizer, rendered) -> list[str]:
    """The runs of learned tokens, as text."""
    runs, before = [], False
    for index, label in zip(rendered.ids.tolist(), rendered.labels.tolist()):
        if label != chatml.IGNORE:
            assert label == index
            runs = runs if before else [*runs, []]
            runs[-1].append(index)
        before = label != chatml.IGNORE
    return [tokenizer.decode(run) for run in runs]


def test_what_is_learned(tokenizer):
    two = [*ASKED, says("And Rome?", ROME), result('{"t": 31}\n\nObservation: none'), says("c")]
    assert learned(tokenizer, chatml.render(tokenizer, render(two, [WEATHER]))) == [
        'Thought: I should look.\nAction: get_weather\nAction Input: {"city": "巴黎"}\nObservation:',
        f" And Rome?\n{ROME_INPUT}",
        " I now know the final answer.\nFinal Answer: c<|im_end|>",
    ]


def test_the_published_mask_learns_whole_turns(tokenizer):
    rendered = chatml.render(tokenizer, render(TALK, [WEATHER]), supervise="chatml")
    plain = chatml.render(tokenizer, [*render(TALK, [WEATHER])[:1], says(ANSWER)], supervise="chatml")
    assert np.array_equal(rendered.labels, plain.labels) and rendered.weights is None
    ignored = chatml.render(tokenizer, render([*TALK[:1], says("a", PARIS, weight=0), *TALK[2:]], [WEATHER]), supervise="chatml")
    text = "".join(learned(tokenizer, ignored))
    assert "Action: get_weather\nAction Input: {" not in text and "Final Answer: 22 度。" in text


def test_open_turns(tokenizer):
    rendered = chatml.render(tokenizer, render(ASKED[:2], [WEATHER]))
    assert learned(tokenizer, rendered)[0].endswith('{"city": "巴黎"}\nObservation:')
    assert tokenizer.decode(rendered.ids[-1:]) == ":" and rendered.labels[-1] == rendered.ids[-1]
    with pytest.raises(ValueError, match="only the last message may be open"):
        chatml.render(tokenizer, [*render(ASKED[:2], [WEATHER]), user("?")])


def test_weights_of_tokens(tokenizer):
    messages = [user("?"), says("a", PARIS, weight=0.5), result("22"), says("c")]
    ids, labels, weights = chatml.render(tokenizer, render(messages, [WEATHER]))
    assert weights.dtype == np.float32 and len(weights) == len(ids)
    assert np.array_equal(weights > 0, labels != chatml.IGNORE)
    assert tokenizer.decode(ids[weights == 0.5]) == f"Thought: a\n{INPUT}"
    assert tokenizer.decode(ids[weights == 1]) == " I now know the final answer.\nFinal Answer: c<|im_end|>"


# Thoughts, results and arguments whose edges could melt into the form around them.
EDGES = ["x", "22", "中", "}", "(", ":", "...", "e\u0301", "\u0301", " x", "\t", "<|im_end|>", "\ud83d\ude00", "\ud800", "\u200d👧"]


def as_decoded(value):
    """What decoding the tokens of a text gives: NFC, whole characters."""
    if isinstance(value, dict):
        return {as_decoded(key): as_decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_decoded(item) for item in value]
    return normalize("NFC", value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")) if isinstance(value, str) else value


@pytest.mark.parametrize("edge", EDGES)
def test_samples_are_prompts_and_what_is_generated_after_them(tokenizer, edge):
    """No seam differs: a prompt's ids are the beginning of the sample's, which is learned from exactly there up to the stop.

    The one exception is by design: text right behind "Thought:" that begins without a blank, which render never writes.
    """
    calls = [says(edge, call("f", **{edge.strip(): edge})), result(edge + "\n\n" + edge, "f")]
    messages = [user(edge), *calls, *calls, says(edge, reasoning_content=edge)]
    sample = chatml.render(tokenizer, render(messages, [WEATHER]))
    ids, labels = sample.ids.tolist(), sample.labels.tolist()
    stop = stop_sequences(tokenizer)[1]
    begins = [i for i in range(1, len(ids)) if labels[i] != chatml.IGNORE and labels[i - 1] == chatml.IGNORE]
    for begin, end in zip(begins, (1, 3, 5), strict=True):
        prompt = chatml.render_prompt(tokenizer, render_asked(messages[:end], [WEATHER]))
        assert ids[:begin] == prompt
        answer_end = next((i for i in range(begin, len(ids)) if labels[i] == chatml.IGNORE), len(ids))
        generated = ids[begin:answer_end]
        expected = react.normal(messages[: end + 1])[0][-1]
        if end < 5:
            assert generated[-len(stop) :] == stop and stop not in [generated[i : i + 3] for i in range(len(generated) - 3)]
        else:
            assert generated.pop() == tokenizer.im_end_id
        assert parse_answer(tokenizer.decode(generated)) == as_decoded(expected)


def test_prompts_in_a_window(tokenizer):
    messages = [*EARLIER, *ASKED]
    whole = chatml.render_prompt(tokenizer, render_asked(messages, [WEATHER]))
    assert tokenizer.decode(whole).endswith("Observation: 22°C\nThought:")
    short = chatml.render_prompt(tokenizer, render_asked(messages, [WEATHER]), max_window_size=8)
    assert short == chatml.render_prompt(tokenizer, render_asked([EARLIER[0], *ASKED], [WEATHER]))
    with pytest.raises(ValueError, match="ends with a message by the user, or with the result of a tool"):
        render_asked(TALK, [WEATHER])


def test_one_sample_for_each_question(tokenizer):
    talk = [*EARLIER, user("And?"), says("no", weight=0), *TALK]
    first, last = by_question(talk)
    assert first == talk[:3]
    assert last == [talk[0], talk[1], says("Hello!", weight=0), talk[3], talk[4], *TALK]
    for sample, end in ((first, 2), (last, 6)):
        ids = chatml.render(tokenizer, render(sample, [WEATHER])).ids.tolist()
        prompt = chatml.render_prompt(tokenizer, render_asked(talk[:end], [WEATHER]))
        assert ids[: len(prompt)] == prompt
