"""ChatML, the chat format of Qwen, written once: training samples, prompts, and where an answer ends.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n...<|im_end|>\\n
    <|im_start|>assistant\\n...<|im_end|>\\n

A message is a dict {"role": "system" | "user" | "assistant", "content": str}. An answer may have besides

    weight   what its tokens count in the loss, a number from 0 (context, not learned) on; absent: 1
    spans    [(begin, end, weight)]: parts of its content that weigh something else, in characters, one behind the other.
             Weight None is text that is not the model's own (the result of a tool, see react.py) and never learned; only
             the published mask, which learns whole turns, gives it the weight of the message
    open     True: the turn goes on, so that no <|im_end|> follows. Only the last message may have it

Content is tokenized by itself and as ordinary text: no character of it can become a control token, or melt into the
newline before it. Any tokenizer will do that has encode_ordinary, encode_ordinary_batch, im_start_id and im_end_id; spans
also need convert_ids_to_tokens, and that it makes text NFC before anything else.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple
from unicodedata import normalize
from weakref import WeakKeyDictionary

import numpy as np

DEFAULT_SYSTEM = "You are a helpful assistant."
IGNORE = -100
ROLES = ("system", "user", "assistant")


class Rendered(NamedTuple):
    """One conversation as arrays of equal length, T.

    ids: int32[T]. labels: int32[T], not shifted; IGNORE where nothing is learned. weights: float32[T], what each label
    counts in the loss, 0 where there is none; None where each counts 1.
    """

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None


@dataclass
class Frame:
    """The ids around the contents, the same for every message of a tokenizer."""

    start: list[int]  # <|im_start|>
    end: list[int]  # <|im_end|>
    newline: list[int]
    headers: dict[str, list[int]]  # role -> ids of "role\n"
    sizes: dict[int, int] = field(default_factory=dict)  # of tokens met so far, in bytes


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
        if message.get("open") and message is not messages[-1]:
            raise ValueError("only the last message may be open: nothing can follow a turn that goes on")
    if messages and messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]


class Sequences:
    """Ids and what each piece of them weighs in the loss, growing together, so that they cannot drift apart."""

    def __init__(self):
        self.pieces, self.weights, self.ends = [], [], []

    def add(self, ids: list[int], weight: float) -> None:
        """weight: what each of these tokens counts in the loss; 0 (or False): not learned."""
        self.pieces.append(ids)
        self.weights.append(weight)

    def end_sequence(self) -> None:
        self.ends.append(len(self.pieces))

    def arrays(self, max_length: int | None) -> list[Rendered]:
        """Each sequence, cut on the right to max_length. They are views of one array."""
        lengths = np.fromiter(map(len, self.pieces), np.int64, len(self.pieces))
        offsets = np.concatenate(([0], lengths.cumsum()))
        ids = np.fromiter(chain.from_iterable(self.pieces), np.int32, offsets[-1])
        weights = np.array(self.weights, np.float32)
        labels = np.where(np.repeat(weights > 0, lengths), ids, np.int32(IGNORE))
        bounds = offsets[[0, *self.ends]].tolist()
        cut = len(ids) if max_length is None else max_length
        spans = [slice(start, min(end, start + cut)) for start, end in zip(bounds, bounds[1:])]
        if not ((weights != 0) & (weights != 1)).any():
            return [Rendered(ids[span], labels[span]) for span in spans]
        weights = np.repeat(weights, lengths)
        plain = (weights == 0) | (weights == 1)
        return [Rendered(ids[span], labels[span], None if plain[span].all() else weights[span]) for span in spans]


def add_message(sequences: Sequences, frame: Frame, message: dict, content: list[int], chatml: bool, tokenizer) -> None:
    """Adds one message. `content` is its tokenized content; `chatml` asks for the published mask.

    The published mask supervises <|im_start|>, <|im_end|> and the last newline of every message and the content of
    answers; the other one the content and <|im_end|> of answers. Of an answer with weight 0, neither supervises the content
    or what comes after it.
    """
    answer = message["role"] == "assistant"
    weight = message.get("weight", 1) if answer else 0
    sequences.add(frame.start, chatml)
    sequences.add(frame.headers[message["role"]], 0)
    if answer and message.get("spans"):
        for ids, part_weight in divided(tokenizer, frame, message, content, weight, chatml):
            sequences.add(ids, part_weight)
    else:
        sequences.add(content, weight)
    if not message.get("open"):
        after = weight if answer else chatml
        sequences.add(frame.end, after)
        sequences.add(frame.newline, after if chatml else 0)


def divided(
    tokenizer, frame: Frame, message: dict, ids: list[int], weight: float, chatml: bool
) -> list[tuple[list[int], float]]:
    """The ids of a content as runs of equal weight. A token that reaches over two parts has the smaller of their weights.

    ids: of the whole content, in one piece: a seam that the model never sees would make other tokens.
    """

    def byte_at(character: int) -> int:
        text = message["content"][:character].encode("utf-16", "surrogatepass")
        return len(normalize("NFC", text.decode("utf-16", "replace")).encode())  # surrogates: as tiktoken does

    if new := list(set(ids) - frame.sizes.keys()):
        tokens = tokenizer.convert_ids_to_tokens(new)
        frame.sizes |= {i: len(token if isinstance(token, bytes) else token.encode()) for i, token in zip(new, tokens)}
    lengths = [frame.sizes[i] for i in ids]
    byte_weights = np.full(sum(lengths), weight, np.float32)
    for begin, end, span_weight in message["spans"]:
        if span_weight is None:
            span_weight = weight if chatml else 0
        byte_weights[byte_at(begin) : byte_at(end)] = span_weight
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)
    weights = np.minimum.reduceat(byte_weights, starts) if ids else byte_weights
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
    return [(ids[begin:end], float(weights[begin])) for begin, end in zip(cuts, cuts[1:]) if end > begin]


def render(
    tokenizer,
    messages: list[dict],
    *,
    supervise: str = "assistant",
    allow_special: bool = False,
    as_tokens: frozenset[str] | None = None,
    max_length: int | None = None,
) -> Rendered:
    """One conversation; see `render_batch`."""
    special = {"allow_special": allow_special, "as_tokens": as_tokens}
    settings = {"supervise": supervise, "max_length": max_length, **special}
    return render_batch(tokenizer, [messages], **settings)[0]


def render_batch(
    tokenizer,
    conversations: list[list[dict]],
    *,
    supervise: str = "assistant",
    allow_special: bool = False,
    as_tokens: frozenset[str] | None = None,
    max_length: int | None = None,
) -> list[Rendered]:
    """Conversations as ids, labels and weights.

    They are views of one large array for all conversations: copy what is to outlive the rest.

    supervise: "assistant", the content of every answer and its <|im_end|>; or "chatml", the published trainer's mask.
    Labels are IGNORE elsewhere, and not shifted. An answer with weight 0 is not supervised.
    allow_special: special-token text in contents becomes the special tokens. as_tokens: that of these only.
    max_length: tokens kept of each conversation, from its beginning.
    Raises ValueError for an unknown role, an unknown `supervise`, or an open turn with something behind it.
    """
    if supervise not in ("assistant", "chatml"):
        raise ValueError(f"supervise is 'assistant' or 'chatml', found {supervise!r}")
    frame, sequences = frame_of(tokenizer), Sequences()
    conversations = [with_system(messages) for messages in conversations]
    contents = iter(encode_contents(tokenizer, conversations, "all" if allow_special else as_tokens))
    for messages in conversations:
        for message in messages:
            add_message(sequences, frame, message, next(contents), supervise == "chatml", tokenizer)
        sequences.end_sequence()
    return sequences.arrays(max_length)


def encode_contents(
    tokenizer, conversations: list[list[dict]], special: str | frozenset[str] | None
) -> list[list[int]]:
    """The ids of every content, one conversation after the other, through one batch call. special: tokens, or "all"."""
    texts = [message["content"] for messages in conversations for message in messages]
    if special and texts:
        settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return tokenizer(texts, allowed_special=special, **settings)["input_ids"]
    return tokenizer.encode_ordinary_batch(texts)


def render_prompt(tokenizer, messages: list[dict], *, max_window_size: int | None = None) -> list[int]:
    """The prompt for the next answer: system, history and the last message, a user's, then "<|im_start|>assistant\\n".

    Or the last two, a user's and an answer that is open: the model then goes on in it.
    With max_window_size, old turns (a user's message and what follows it) are dropped from the front until system and
    history have fewer tokens than that. The last message does not count, nor the newline at the end of the history.
    """
    goes_on = bool(messages) and messages[-1].get("open", False)
    if not messages or not (goes_on or messages[-1]["role"] == "user"):
        raise ValueError("a prompt ends with a message by the user, or with an answer that is open")
    frame = frame_of(tokenizer)
    turns: list[list[int]] = []
    for message in with_system(messages):
        if message["role"] == "user" or len(turns) < 2:
            turns.append([])
        turns[-1] += frame.start + frame.headers[message["role"]] + tokenizer.encode_ordinary(message["content"])
        if not message.get("open"):
            turns[-1] += frame.end + frame.newline
    system, *history, query = turns
    size, kept = len(system) - len(frame.newline), []
    for turn in reversed(history):
        size += len(turn)
        if max_window_size is not None and size >= max_window_size:
            break
        kept.insert(0, turn)
    answer = [] if goes_on else [*frame.start, *frame.headers["assistant"]]
    return [*chain(system, *kept, query), *answer]


def stop_ids(tokenizer) -> list[int]:
    """The tokens that end an answer: <|im_end|>, or <|im_start|> where a model goes on to the next turn by itself."""
    return [tokenizer.im_end_id, tokenizer.im_start_id]
