"""Chatting with the model: chat, chat_stream, chat_batch and answer, on top of transformers' generate.

A history is a list of (query, response) pairs, as published. The format of the prompt is chatml.py's,
with tools react.py's.
"""

import codecs
import contextlib
import copy
import queue
import threading
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .chatml import DEFAULT_SYSTEM, render_prompt, stop_ids
from .react import parse_answer, render_asked, stop_sequences

# Where neither the checkpoint's generation_config.json nor the caller says: the values of the published chat models.
MAX_WINDOW_SIZE = 6144
MAX_NEW_TOKENS = 512

NOT_A_CHAT_MODEL = (
    'chat needs a model whose generation_config says chat_format "chatml", found {found!r} - use a chat model, '
    'or set model.generation_config.chat_format = "chatml" after fine-tuning on ChatML conversations'
)


class StopOnSequences(StoppingCriteria):
    """Ends a row once the tokens generated for it end in one of the stop sequences (lists of token ids)."""

    def __init__(self, sequences: list[list[int]], prompt_length: int):
        self.sequences, self.prompt_length = [torch.tensor(sequence) for sequence in sequences], prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        generated = input_ids[:, self.prompt_length :]
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for sequence in self.sequences:
            tail = generated[:, -len(sequence) :]
            if tail.shape[1] == len(sequence):
                done |= (tail == sequence.to(tail.device)).all(dim=1)
        return done


class StopOnEvent(StoppingCriteria):
    """Ends all rows once a threading.Event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class TokenQueue(BaseStreamer):
    """Hands the tokens that `generate` produces, without the prompt, to another thread."""

    def __init__(self):
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.prompt_is_next = True

    def put(self, value):
        if not self.prompt_is_next:
            for token in value.tolist():
                self.queue.put(token)
        self.prompt_is_next = False

    def end(self):
        """Nothing: the producing thread says itself when it is done, also after an error."""


def response_end(tokens: list[int], stops: list[list[int]]) -> int:
    """The number of tokens before the first stop sequence, or all of them."""
    for start in range(len(tokens)):
        if any(tokens[start : start + len(stop)] == stop for stop in stops):
            return start
    return len(tokens)


def stop_length(tokens: list[int], stops: list[list[int]]) -> int:
    """The length of the longest stop sequence that the tokens end in, 0 if in none."""
    return max((len(stop) for stop in stops if tokens[-len(stop) :] == stop), default=0)


def held_back(tokens: list[int], stops: list[list[int]]) -> int:
    """How many tokens at the end may be the beginning of a stop sequence, so that a stream should not show them yet."""
    longest = min(len(tokens), max(map(len, stops)) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop[:n] == tokens[-n:] for stop in stops)), 0)


class QWenChatMixin:
    """The chat methods of a model with transformers' `generate` and a generation_config that says chat_format "chatml".

    In all of them `system` is the system message, `stop_words_ids` is a list of token-id lists that end a response and
    are not part of it, `generation_config` goes before the model's own, and any other keyword goes to `generate`
    (max_new_tokens, do_sample, logits_processor ...). `max_window_size` bounds the tokens of system and history: older
    turns are dropped. A response ends at <|im_end|>, <|im_start|>, the configured eos, or a stop word.
    All raise ValueError for chat_format "raw".
    """

    def chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """The response, and a new history that ends in (query, response). The given history is left as it is."""
        history = history or []
        settings = (system, stop_words_ids, generation_config)
        (response,) = self.chat_batch(tokenizer, [query], [history], *settings, **kwargs)
        return response, [*history, (query, response)]

    def chat_batch(
        self,
        tokenizer,
        queries: list[str],
        histories: list[list[tuple[str, str]] | None] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> list[str]:
        """The responses to several queries at once (padded on the left), each after its own history."""
        histories = [None] * len(queries) if histories is None else histories
        if len(histories) != len(queries):
            raise ValueError(f"chat_batch needs one history for each query, found {len(histories)} for {len(queries)}")
        if not queries:
            return []
        conversations = [as_messages(query, history, system) for query, history in zip(queries, histories)]
        return self._responses(ChatCall(self, tokenizer, conversations, stop_words_ids, generation_config, kwargs))

    def answer(
        self,
        tokenizer,
        messages: list[dict],
        tools: list[dict] | None = None,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> dict:
        """The next message of a conversation with tools: {"role": "assistant", "content", ...}.

        messages: OpenAI's, the last by the user or with a tool's result; tools: as react.py takes them. The answer has
        tool_calls, one, where the model calls a tool: append it and {"role": "tool", "content": result}, and ask again.
        It has reasoning_content where the model has thoughts of its own before the final answer.
        """
        laid_out = render_asked(messages, tools or [])
        stops = [*(stop_words_ids or []), *(stop_sequences(tokenizer) if tools else [])]
        call = ChatCall(self, tokenizer, [laid_out], stops, generation_config, kwargs)
        (response,) = self._responses(call)
        return parse_answer(response) if tools else {"role": "assistant", "content": response}

    def _responses(self, call: "ChatCall") -> list[str]:
        output = self.generate(**call.arguments)
        output = getattr(output, "sequences", output)  # return_dict_in_generate
        rows = output[:, call.prompt_length :].tolist()
        return [call.tokenizer.decode(row[: response_end(row, call.stops)]) for row in rows]

    def chat_stream(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> Iterator[str]:
        """Yields the growing response; the last one is what `chat` returns. Half of a character is never shown.

        An error of `generate` is raised here. A consumer may stop early (break, or close()): generation then ends with
        the token it is at.
        """
        conversations = [as_messages(query, history, system)]
        call = ChatCall(self, tokenizer, conversations, stop_words_ids, generation_config, kwargs)
        return self._stream(tokenizer, call)

    def _stream(self, tokenizer, call: "ChatCall") -> Iterator[str]:
        # keeps the beginning of a character until the rest of it is there
        decoder = codecs.getincrementaldecoder("utf-8")(errors=tokenizer.errors)
        tokens, shown, text = [], 0, ""
        with contextlib.closing(generated_tokens(self, call.arguments)) as generated:
            for token in generated:
                tokens.append(token)
                if length := stop_length(tokens, call.stops):
                    del tokens[-length:]
                    break
                certain = len(tokens) - held_back(tokens, call.stops)
                more = decoder.decode(tokenizer.decode_bytes(tokens[shown:certain]))
                shown = max(shown, certain)
                if more:
                    text += more
                    yield text
        rest = decoder.decode(tokenizer.decode_bytes(tokens[shown:]), final=True)
        if rest or not text:
            yield text + rest


class ChatCall:
    """One call of `generate` for chat, in the making.

    conversations: ChatML messages up to the answer that is asked for. arguments: for model.generate; prompt_length: tokens
    of the (padded) prompts; stops: what ends a response.
    """

    def __init__(self, model, tokenizer, conversations, stop_words_ids, generation_config, kwargs):
        self.tokenizer, kwargs = tokenizer, dict(kwargs)
        window = kwargs.pop("max_window_size", None)
        config, others = chat_config(model, tokenizer, generation_config, kwargs)
        window = window or getattr(config, "max_window_size", None) or MAX_WINDOW_SIZE
        prompts = [render_prompt(tokenizer, messages, max_window_size=window) for messages in conversations]
        self.prompt_length = max(map(len, prompts))
        rows = [[config.pad_token_id] * (self.prompt_length - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (self.prompt_length - len(prompt)) + [1] * len(prompt) for prompt in prompts]

        stop_words = [list(map(int, word)) for word in stop_words_ids or []]
        if not all(stop_words):
            raise ValueError("stop_words_ids holds an empty list: give the token ids of each stop word")
        criteria = StoppingCriteriaList(others.pop("stopping_criteria", None) or [])
        if stop_words:
            criteria.append(StopOnSequences(stop_words, self.prompt_length))
        if config.stop_strings:
            others["tokenizer"] = tokenizer  # generate asks for it
        # rows that have ended go on with padding while others are unfinished
        self.stops = [[token] for token in (*config.eos_token_id, config.pad_token_id)] + stop_words
        self.arguments = {
            "inputs": torch.tensor(rows, device=model.device),
            "attention_mask": torch.tensor(mask, device=model.device),
            "generation_config": config,
            "stopping_criteria": criteria,
            **others,
        }


def chat_config(model, tokenizer, given: GenerationConfig | None, kwargs: dict) -> tuple[GenerationConfig, dict]:
    """The generation config of a chat, and those of the keywords that are not settings of it (logits_processor ...).

    A keyword goes before the given config, that before the model's own. Raises ValueError if none says "chatml".
    """
    config = copy.deepcopy(model.generation_config if given is None else given)
    for key, value in model.generation_config.to_dict().items():
        if getattr(config, key, None) is None:
            setattr(config, key, value)
    others = config.update(**kwargs)
    chat_format = getattr(config, "chat_format", None)
    if chat_format != "chatml":
        raise ValueError(NOT_A_CHAT_MODEL.format(found=chat_format))
    if (config.num_return_sequences or 1) > 1:
        raise ValueError("chat gives one response: num_return_sequences must be 1, or use generate instead")
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = MAX_NEW_TOKENS
    eos = config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    config.eos_token_id = list(dict.fromkeys([*stop_ids(tokenizer), tokenizer.eod_id, *eos]))
    # Padding must be no stop token: a repetition penalty would make stopping less likely in rows that are padded.
    config.pad_token_id = tokenizer.pad_token_id
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_id:
        config.pad_token_id = tokenizer.special_tokens["<|extra_0|>"]
    return config, others


def as_messages(query: str, history: list[tuple[str, str]] | None, system: str) -> list[dict]:
    """System, (query, response) pairs and the new query as messages."""
    messages = [{"role": "system", "content": system}]
    for question, answer in history or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": query}]


def generated_tokens(model, arguments: dict) -> Iterator[int]:
    """Runs model.generate in a thread and yields its tokens as they come.

    Its error is raised here. However this generator ends (used up, closed, dropped, an error in its consumer), the
    thread has ended too.
    """
    stream, stop, errors = TokenQueue(), threading.Event(), []
    criteria = StoppingCriteriaList([*arguments["stopping_criteria"], StopOnEvent(stop)])
    # what the caller's thread has set holds in the other thread too: the GPU, and autocast
    device, autocast = model.device.type, torch.is_autocast_enabled(model.device.type)
    dtype = torch.get_autocast_dtype(device)

    def produce():
        try:
            if device == "cuda":
                torch.cuda.set_device(model.device)
            with torch.autocast(device, dtype=dtype, enabled=autocast):
                model.generate(**{**arguments, "stopping_criteria": criteria, "streamer": stream})
        except BaseException as error:  # raised again below, in the consumer's thread
            errors.append(error)
        finally:
            stream.queue.put(None)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        yield from iter(stream.queue.get, None)
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
