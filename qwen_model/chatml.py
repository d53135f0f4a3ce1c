"""ChatML, the chat format of Qwen, written once: training samples, prompts, and where an answer ends.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n...<|im_end|>\\n
    <|im_start|>assistant\\n...<|im_end|>\\n

A message is a dict {"role": "system" | "user" | "assistant", "content": str}, optionally with "train": False.
Content is tokenized by itself and as ordinary text: no character of it can become a control token, or melt into the
newline before it. Any tokenizer will do that has encode_ordinary, encode_ordinary_batch, im_start_id and im_end_id.
"""

from dataclasses import dataclass
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np

DEFAULT_SYSTEM = "You are a helpful assistant."
IGNORE = -100
ROLES = ("system", "user", "assistant")


@dataclass
class Frame:
    """The ids around the contents, the same for every message of a tokenizer."""

    start: list[int]  # <|im_start|>
    end: list[int]  # <|im_end|>
    newline: list[int]
    headers: dict[str, list[int]]  # role -> ids of "role\n"


_frames: WeakKeyDictionary = WeakKeyDictionary()


def frame_of(tokenizer) -> Frame:
    """The frame, tokenized once per tokenizer."""
    if tokenizer not in _frames:
        _frames[tokenizer] = Frame(
            start=[tokenizer.im_start_id],
            end=[tokenizer.im_end_id],
            newline=tokenizer.encode_ordinary("\n"),
            headers={role: tokenizer.encode_ordinary(role + "\n") for role in ROLES},
        )
    return _frames[tokenizer]


def with_system(messages: list[dict]) -> list[dict]:
    """The messages, with the default system message before them if they start with another one."""
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role {message['role']!r}: a message is by one of {', '.join(ROLES)}")
    if messages and messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]


class Sequences:
    """Ids and what is supervised of them, growing together piece by piece, so that they cannot drift apart."""

    def __init__(self):
        self.pieces, self.supervised, self.ends = [], [], []

    def add(self, ids: list[int], supervised: bool) -> None:
        self.pieces.append(ids)
        self.supervised.append(supervised)

    def end_sequence(self) -> None:
        self.ends.append(len(self.pieces))

    def arrays(self, max_length: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, labels) of each sequence, int32, cut on the right to max_length. They are views of one array."""
        lengths = np.fromiter(map(len, self.pieces), np.int64, len(self.pieces))
        offsets = np.concatenate(([0], lengths.cumsum()))
        ids = np.fromiter(chain.from_iterable(self.pieces), np.int32, offsets[-1])
        labels = np.where(np.repeat(np.array(self.supervised, bool), lengths), ids, np.int32(IGNORE))
        bounds = offsets[[0, *self.ends]].tolist()
        cut = len(ids) if max_length is None else max_length
        spans = [slice(start, min(end, start + cut)) for start, end in zip(bounds, bounds[1:])]
        return [(ids[span], labels[span]) for span in spans]


def add_message(sequences: Sequences, frame: Frame, message: dict, content: list[int], chatml: bool) -> None:
    """Adds one message. `content` is its tokenized content; `chatml` asks for the published mask.

    The published mask supervises <|im_start|>, <|im_end|> and the last newline of every message and the content of
    answers; the other one the content and <|im_end|> of answers. Of an answer with "train": False, neither supervises
    the content or what comes after it.
    """
    answer = message["role"] == "assistant"
    train = answer and message.get("train", True)
    sequences.add(frame.start, chatml)
    sequences.add(frame.headers[message["role"]], False)
    sequences.add(content, train)
    sequences.add(frame.end, train or (chatml and not answer))
    sequences.add(frame.newline, chatml and (train or not answer))


def render(
    tokenizer,
    messages: list[dict],
    *,
    supervise: str = "assistant",
    allow_special: bool = False,
    max_length: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One conversation as (ids, labels), int32 arrays of equal length; see `render_batch`."""
    settings = {"supervise": supervise, "allow_special": allow_special, "max_length": max_length}
    return render_batch(tokenizer, [messages], **settings)[0]


def render_batch(
    tokenizer,
    conversations: list[list[dict]],
    *,
    supervise: str = "assistant",
    allow_special: bool = False,
    max_length: int | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Conversations as (ids, labels): int32 arrays of equal length.

    They are views of one large array for all conversations: copy what is to outlive the rest.

    supervise: "assistant", the content of every answer and its <|im_end|>; or "chatml", the published trainer's mask.
    Labels are IGNORE elsewhere, and not shifted. An answer with "train": False is not supervised.
    allow_special: special-token text in contents becomes the special tokens.
    max_length: tokens kept of each conversation, from its beginning.
    Raises ValueError for an unknown role or an unknown `supervise`.
    """
    if supervise not in ("assistant", "chatml"):
        raise ValueError(f"supervise is 'assistant' or 'chatml', found {supervise!r}")
    frame, sequences = frame_of(tokenizer), Sequences()
    conversations = [with_system(messages) for messages in conversations]
    contents = iter(encode_contents(tokenizer, conversations, allow_special))
    for messages in conversations:
        for message in messages:
            add_message(sequences, frame, message, next(contents), supervise == "chatml")
        sequences.end_sequence()
    return sequences.arrays(max_length)


def encode_contents(tokenizer, conversations: list[list[dict]], allow_special: bool) -> list[list[int]]:
    """The ids of every content, one conversation after the other, through one batch call."""
    texts = [message["content"] for messages in conversations for message in messages]
    if allow_special and texts:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return tokenizer.encode_ordinary_batch(texts)


def render_prompt(tokenizer, messages: list[dict], *, max_window_size: int | None = None) -> list[int]:
    """The prompt for the next answer: system, history and the last message, a user's, then "<|im_start|>assistant\\n".

    With max_window_size, old turns (a user's message and what follows it) are dropped from the front until system and
    history have fewer tokens than that. The last message does not count, nor the newline at the end of the history.
    """
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("a prompt ends with a message by the user")
    frame = frame_of(tokenizer)
    turns: list[list[int]] = []
    for message in with_system(messages):
        if message["role"] == "user" or len(turns) < 2:
            turns.append([])
        content = tokenizer.encode_ordinary(message["content"])
        turns[-1] += frame.start + frame.headers[message["role"]] + content + frame.end + frame.newline
    system, *history, query = turns
    size, kept = len(system) - len(frame.newline), []
    for turn in reversed(history):
        size += len(turn)
        if max_window_size is not None and size >= max_window_size:
            break
        kept.insert(0, turn)
    return [*chain(system, *kept, query), *frame.start, *frame.headers["assistant"]]


def stop_ids(tokenizer) -> list[int]:
    """The tokens that end an answer: <|im_end|>, or <|im_start|> where a model goes on to the next turn by itself."""
    return [tokenizer.im_end_id, tokenizer.im_start_id]
