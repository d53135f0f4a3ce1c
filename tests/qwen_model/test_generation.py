"""Chatting, with a tiny random model: it equals plain greedy decoding of the prompt, and stops where it should.

Where a test needs certain tokens, a logits processor dictates them.
"""

import copy
import logging
import threading
import warnings
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteriaList

from qwen_model.chatml import render_prompt
from qwen_model.generation_qwen import ChatCall

EOD, IM_START, IM_END, EXTRA_0 = 151643, 151644, 151645, 151646
NANO = Path(__file__).parent.parent / "golden" / "nano_checkpoint"
HISTORY = [("Hi", "Hello!"), ("And of Japan?", "Tokyo.")]


@pytest.fixture(scope="module")
def model():
    model = tiny_model(vocab_size=151936, hidden_size=32, seq_length=512).eval()
    model.generation_config = GenerationConfig(
        chat_format="chatml",
        max_window_size=6144,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=EOD,
        pad_token_id=EOD,
    )
    return model


class Dictate(LogitsProcessor):
    """Row i generates scripts[i], and <|endoftext|> after its end. Keeps the prompts that it saw, and counts steps."""

    def __init__(self, *scripts: list[int]):
        self.scripts, self.prompts, self.steps = scripts, None, 0

    def __call__(self, input_ids, scores):
        if self.prompts is None:
            self.prompts = input_ids.tolist()
        scores = torch.full_like(scores, -torch.inf)
        for row, script in enumerate(self.scripts):
            scores[row, [*script, *[EOD] * (self.steps + 1)][self.steps]] = 0
        self.steps += 1
        return scores


def messages_of(query, history=(), system="You are a helpful assistant."):
    messages = [{"role": "system", "content": system}]
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": query}]


def greedy(model, tokenizer, prompt: list[int], steps: int) -> str:
    """Full forwards without a cache, one for each token."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[len(prompt) :])


# ---- chat


@pytest.mark.parametrize("history", [None, HISTORY])
@pytest.mark.parametrize("system", ["You are a helpful assistant.", "", "你是一只猫。"])
def test_chat_is_greedy_decoding_of_the_prompt(model, tokenizer, history, system):
    response, new = model.chat(tokenizer, "Who are you?", history, system=system)
    prompt = render_prompt(tokenizer, messages_of("Who are you?", history or (), system))
    assert response == greedy(model, tokenizer, prompt, steps=8)
    assert new == [*(history or []), ("Who are you?", response)]


def test_history_stays_as_it_was(model, tokenizer):
    history = copy.deepcopy(HISTORY)
    _, new = model.chat(tokenizer, "x", history, max_new_tokens=1)
    list(model.chat_stream(tokenizer, "x", history, max_new_tokens=1))
    model.chat_batch(tokenizer, ["x"], [history], max_new_tokens=1)
    assert history == HISTORY and new is not history and len(new) == 3


@pytest.mark.parametrize("window", [20, 40, 50, 6144])
def test_window(model, tokenizer, window):
    expected = render_prompt(tokenizer, messages_of("x", HISTORY), max_window_size=window)
    dictated = Dictate([])
    model.chat(tokenizer, "x", HISTORY, max_window_size=window, logits_processor=[dictated])
    assert dictated.prompts == [expected]
    config = GenerationConfig(**{**model.generation_config.to_dict(), "max_window_size": window})
    dictated = Dictate([])
    model.chat(tokenizer, "x", HISTORY, generation_config=config, logits_processor=[dictated])
    assert dictated.prompts == [expected]


@pytest.mark.parametrize("stop", [IM_END, IM_START, EOD, 17])
def test_stop_tokens(model, tokenizer, stop):
    said = tokenizer.encode_ordinary("It is Paris.")
    dictated = Dictate([*said, stop, *said])
    settings = {"max_new_tokens": 30, "logits_processor": [dictated], "eos_token_id": [17]}
    assert model.chat(tokenizer, "x", **settings)[0] == "It is Paris."
    assert dictated.steps == len(said) + 1
    settings["logits_processor"] = [Dictate([*said, stop, *said])]
    assert list(model.chat_stream(tokenizer, "x", **settings))[-1] == "It is Paris."


def test_stop_words(model, tokenizer):
    word = tokenizer.encode_ordinary("\nObservation:")
    assert len(word) > 2
    thought, half = tokenizer.encode_ordinary("I should look."), word[:-1]
    dictated = Dictate([*thought, *half, *thought, *word, *thought])
    settings = {
        "max_new_tokens": 40,
        "stop_words_ids": [word, tokenizer.encode("no such")],
        "logits_processor": [dictated],
    }
    # the query ends in the beginning of the stop word, which does not count
    response, _ = model.chat(tokenizer, tokenizer.decode(half), **settings)
    assert response == tokenizer.decode([*thought, *half, *thought])
    assert dictated.steps == 2 * len(thought) + len(half) + len(word)

    settings["logits_processor"] = [Dictate([*thought, *half, *thought, *word, *thought])]
    shown = list(model.chat_stream(tokenizer, "x", **settings))
    assert shown[-1] == response
    assert all(response.startswith(text) for text in shown)  # no part of a stop word that is taken back later
    settings["logits_processor"] = [Dictate([*thought, *half])]
    assert list(model.chat_stream(tokenizer, "x", **settings))[-1] == tokenizer.decode([*thought, *half])


def test_stopping_criteria_of_the_caller(model, tokenizer):
    def after_two(input_ids, scores):
        return torch.full((len(input_ids),), input_ids[0, -2] == 14990)

    criteria = StoppingCriteriaList([after_two])
    for word in (None, [[1]]):
        settings = {"stopping_criteria": criteria, "stop_words_ids": word}
        assert model.chat(tokenizer, "x", logits_processor=[Dictate(3 * [14990])], **settings)[0] == "hellohello"
        assert (
            list(model.chat_stream(tokenizer, "x", logits_processor=[Dictate(3 * [14990])], **settings))[-1]
            == "hellohello"
        )
    assert criteria == [after_two]


def test_stop_strings_of_generate(model, tokenizer):
    """transformers' own way, which leaves the string in the response."""
    dictated = Dictate(tokenizer.encode_ordinary("Paris, France, Europe, space, 地球"))
    settings = {"stop_strings": ["pe, sp"], "max_new_tokens": 30, "logits_processor": [dictated]}
    assert model.chat(tokenizer, "x", **settings)[0] == "Paris, France, Europe, space"


def test_stop_words_do_not_begin_in_the_prompt(model, tokenizer):
    newline = tokenizer.encode_ordinary("\n")
    said = tokenizer.encode_ordinary("Paris.")
    assert render_prompt(tokenizer, messages_of("x"))[-1:] == newline
    settings = {"stop_words_ids": [[*newline, *said[:1]]], "max_new_tokens": 20}
    assert model.chat(tokenizer, "x", logits_processor=[Dictate(said)], **settings)[0] == "Paris."


def test_padded_ids_do_not_break_the_response(model, tokenizer):
    """The model's vocabulary is padded: ids above 151850 have a logit and no token."""
    settings = {"max_new_tokens": 4}
    response, _ = model.chat(tokenizer, "x", logits_processor=[Dictate([14990, 151900])], **settings)
    assert response == "hello\ufffd"
    assert (
        list(model.chat_stream(tokenizer, "x", logits_processor=[Dictate([14990, 151900])], **settings))[-1] == response
    )


# ---- streaming


@pytest.mark.parametrize("sample", [False, True])
def test_last_of_the_stream_is_the_response(model, tokenizer, sample):
    settings = {"do_sample": sample, "max_new_tokens": 20, "top_p": 0.8} if sample else {}
    torch.manual_seed(3)
    response, _ = model.chat(tokenizer, "Who?", HISTORY, **settings)
    torch.manual_seed(3)
    shown = list(model.chat_stream(tokenizer, "Who?", HISTORY, **settings))
    assert shown[-1] == response and len(shown) > 4
    assert all(later.startswith(text) and later != text for text, later in zip(shown, shown[1:]))


def test_stream_never_shows_half_a_character(model, tokenizer):
    text = "你😀é"
    ids = [tokenizer.convert_tokens_to_ids(bytes([byte])) for byte in text.encode()]
    shown = list(model.chat_stream(tokenizer, "x", logits_processor=[Dictate(ids)], max_new_tokens=20))
    assert shown == ["你", "你😀", "你😀é"]
    # cut in the middle of a character, the last one says so, as `chat` does
    shown = list(model.chat_stream(tokenizer, "x", logits_processor=[Dictate(ids)], max_new_tokens=5))
    assert shown == ["你", "你\ufffd"]
    assert model.chat(tokenizer, "x", logits_processor=[Dictate(ids)], max_new_tokens=5)[0] == "你\ufffd"
    assert list(model.chat_stream(tokenizer, "x", logits_processor=[Dictate([])])) == [""]


def test_stream_raises_what_generate_raises(model, tokenizer):
    def fail(input_ids, scores):
        raise RuntimeError("out of luck")

    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="out of luck"):
        list(model.chat_stream(tokenizer, "x", logits_processor=[fail]))
    with pytest.raises(ValueError, match="streamer"):
        list(model.chat_stream(tokenizer, "x", num_beams=2))
    assert threading.active_count() == threads


@pytest.mark.parametrize("leave", ["break", "close", "error"])
def test_stream_may_be_left_early(model, tokenizer, leave):
    threads = threading.active_count()
    dictated = Dictate([14990] * 400)
    stream = model.chat_stream(tokenizer, "x", logits_processor=[dictated], max_new_tokens=400)
    if leave == "break":
        for text in stream:
            assert text == "hello"
            break
        del stream
    elif leave == "close":
        assert next(stream) == "hello"
        stream.close()
    else:
        with pytest.raises(KeyError):
            for _ in stream:
                raise KeyError
        del stream
    assert threading.active_count() == threads
    assert dictated.steps < 200


def test_stream_keeps_autocast(model, tokenizer):
    seen = []

    def look(input_ids, scores):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return scores

    with torch.autocast("cpu", dtype=torch.float16):
        list(model.chat_stream(tokenizer, "x", logits_processor=[look], max_new_tokens=1))
    list(model.chat_stream(tokenizer, "x", logits_processor=[look], max_new_tokens=1))
    assert seen[0] == (True, torch.float16) and seen[1][0] is False


# ---- batches


def test_batch_is_one_by_one(model, tokenizer):
    queries = ["Hi", "What is the capital of France?", "你好"]
    histories = [None, HISTORY, [("a", "b")]]
    singles = [model.chat(tokenizer, query, history)[0] for query, history in zip(queries, histories)]
    assert model.chat_batch(tokenizer, queries, histories) == singles
    assert model.chat_batch(tokenizer, queries) == [model.chat(tokenizer, query)[0] for query in queries]
    assert model.chat_batch(tokenizer, []) == []


def test_rows_of_a_batch_end_by_themselves(model, tokenizer):
    one, two, word = (tokenizer.encode_ordinary(text) for text in ("One.", "Two, and more.", "###"))
    dictated = Dictate([*one, IM_END], [*two, *two, *two, EOD], [*two, *word])
    settings = {"stop_words_ids": [word], "max_new_tokens": 40, "logits_processor": [dictated]}
    responses = model.chat_batch(tokenizer, ["x", "a much longer query", "x"], system="Be short.", **settings)
    assert responses == ["One.", 3 * "Two, and more.", "Two, and more."]
    prompts = [
        render_prompt(tokenizer, messages_of(query, system="Be short.")) for query in ("x", "a much longer query")
    ]
    padding = [EXTRA_0] * (len(prompts[1]) - len(prompts[0]))
    assert padding and dictated.prompts == [padding + prompts[0], prompts[1], padding + prompts[0]]


def test_repetition_penalty_does_not_see_the_padding(model, tokenizer):
    queries, settings = ["Hi", "What is the capital of France?"], {"repetition_penalty": 5.0}
    singles = [model.chat(tokenizer, query, **settings)[0] for query in queries]
    assert model.chat_batch(tokenizer, queries, **settings) == singles
    call = ChatCall(model, tokenizer, [messages_of(query, (), "") for query in queries], None, None, {})
    padding = call.arguments["inputs"][call.arguments["attention_mask"] == 0]
    assert len(padding) and not set(padding.tolist()) & set(call.arguments["generation_config"].eos_token_id)


# ---- settings


def chat_settings(model, tokenizer, given=None, **kwargs) -> GenerationConfig:
    return ChatCall(model, tokenizer, [messages_of("x")], None, given, kwargs).arguments["generation_config"]


def test_which_setting_wins(model, tokenizer):
    before = model.generation_config.to_dict()
    assert chat_settings(model, tokenizer).max_new_tokens == 8
    given = GenerationConfig(max_new_tokens=5, temperature=0.5)
    given_before = given.to_dict()
    assert chat_settings(model, tokenizer, given).max_new_tokens == 5
    assert chat_settings(model, tokenizer, given, max_new_tokens=3).max_new_tokens == 3
    merged = chat_settings(model, tokenizer, given)
    assert (merged.chat_format, merged.do_sample, merged.temperature) == ("chatml", False, 0.5)
    assert merged.eos_token_id == [IM_END, IM_START, EOD]
    assert chat_settings(model, tokenizer, eos_token_id=[5, IM_END]).eos_token_id == [IM_END, IM_START, EOD, 5]
    assert model.generation_config.to_dict() == before and given.to_dict() == given_before


def test_length_without_any_setting(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(chat_format="chatml"))
    assert chat_settings(model, tokenizer).max_new_tokens == 512
    assert chat_settings(model, tokenizer, max_length=100).max_new_tokens is None


def test_generation_config_survives_and_generate_does_not_complain(model, tokenizer, tmp_path, monkeypatch):
    published = GenerationConfig.from_pretrained(NANO)
    assert (published.chat_format, published.max_window_size) == ("raw", 6144)
    published.chat_format = "chatml"
    published.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert (again.chat_format, again.max_window_size, again.top_k, again.max_new_tokens) == ("chatml", 6144, 0, 512)
    monkeypatch.setattr(model, "generation_config", again)
    complaints = []
    monkeypatch.setattr(logging.Logger, "handle", lambda self, record: complaints.append(record.getMessage()))
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest, **kwargs: complaints.append(str(message)))
    model.chat(tokenizer, "x", max_new_tokens=2)
    list(model.chat_stream(tokenizer, "x", max_new_tokens=2))
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
    assert complaints == []
    model.chat(tokenizer, "x", max_new_tokens=2, max_length=50)
    assert complaints  # so they would have been seen


@pytest.mark.parametrize("config", [{"chat_format": "raw"}, {}])
def test_base_models_are_refused_at_once(model, tokenizer, monkeypatch, config):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**config))
    found = repr(config.get("chat_format"))
    message = (
        f'found {found} - use a chat model, or set model.generation_config.chat_format = "chatml" after fine-tuning'
    )
    for method in (model.chat, model.chat_stream, lambda tokenizer, query: model.chat_batch(tokenizer, [query])):
        with pytest.raises(ValueError, match=message):
            method(tokenizer, "x")
    model.generation_config.chat_format = "chatml"
    model.chat(tokenizer, "x", max_new_tokens=1)


def test_what_cannot_be_done_says_so(model, tokenizer):
    with pytest.raises(ValueError, match="one history for each query, found 1 for 2"):
        model.chat_batch(tokenizer, ["a", "b"], [HISTORY])
    with pytest.raises(ValueError, match="empty list"):
        model.chat(tokenizer, "x", stop_words_ids=[[]])
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.chat(tokenizer, "x", num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="no_such_setting"):
        model.chat(tokenizer, "x", no_such_setting=2)
