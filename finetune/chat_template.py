"""Conversations through a model's own chat template: for every Qwen after the first generation.

A conversation is rendered once with a placeholder for each content. What stands between the placeholders is the frame, which
depends on roles alone: it is tokenized once, with the template's special tokens. Contents are tokenized by themselves, as ordinary
text, so that no character of a conversation can become a control token.

Learnt is, of every answer, all that the model has to write: what follows the header of the generation prompt, up to the token that
ends the turn. Where a template keeps an answer's reasoning apart (Qwen3), an answer that brings some is taken apart likewise.
"""

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from qwen_model.chatml import IGNORE

from .errors import UserError

END_OF_TURN = "<|im_end|>"
REASONING_OPENS, REASONING_CLOSES = "<think>", "</think>"
CONTENT, REASONING = "c", "r"
SLOT = re.compile("\ue000(\\d+)([cr])\ue001")  # characters for private use, which no template writes
# what is put around a placeholder to see what a template strips from contents, and what it then leaves: how to do the same
LEFT = {"\n \n": lambda text: text, " \n": lambda text: text.lstrip("\n"), "": str.lstrip}
RIGHT = {"\n \n": lambda text: text, "\n ": lambda text: text.rstrip("\n"), "": str.rstrip}
PAD = "\n \n"


@dataclass
class Piece:
    """A part of a rendered conversation: tokenized frame, or the content of a message."""

    ids: list[int] | None = None  # of the frame
    slot: tuple[int, str] | None = None  # or (number of the message, CONTENT or REASONING)
    answer: int | None = None  # number of the message whose answer this is part of
    strip: tuple = ()  # functions that do to a content what the template does


@dataclass
class Frame:
    """The pieces of all conversations of one shape. left_out: how many reasonings of it the template drops."""

    pieces: list[Piece] = field(default_factory=list)
    left_out: int = 0


_frames: WeakKeyDictionary = WeakKeyDictionary()


def render_batch(
    tokenizer,
    conversations: list[list[dict]],
    *,
    supervise: str = "assistant",
    allow_special: bool = False,
    max_length: int | None = None,
    left_out: Counter | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Conversations as (ids, labels), int32 arrays of equal length; as qwen_model.chatml.render_batch does it.

    Labels are IGNORE where nothing is learnt, and not shifted. An answer with "train": False is not learnt. max_length: tokens
    kept of each conversation. left_out: counts, under "reasoning", the reasoning that the template leaves out of earlier turns.
    Raises UserError for a template that does not show each content once, or that refuses a conversation.
    """
    if supervise != "assistant":
        what = f"--supervise {supervise}: is the published trainer's mask for first-generation Qwen"
        raise UserError(f"{what} - leave it out, the answers are learnt")
    apart = "reasoning_content" in tokenizer.chat_template
    split = [[taken_apart(message, apart) for message in messages] for messages in conversations]
    frames = [frame_of(tokenizer, shape(parts)) for parts in split]
    texts = [
        stripped(parts[piece.slot[0]][piece.slot[1]], piece)
        for parts, frame in zip(split, frames)
        for piece in frame.pieces
        if piece.slot
    ]
    contents = iter(encode(tokenizer, texts, allow_special))
    if left_out is not None:
        left_out["reasoning"] += sum(frame.left_out for frame in frames)
    return [laid_out(frame, messages, contents, max_length) for frame, messages in zip(frames, conversations)]


def taken_apart(message: dict, apart: bool) -> dict:
    """{"role", CONTENT: text, REASONING: text if there is any}."""
    role, content = message["role"], message["content"]
    if not apart or role != "assistant" or REASONING_CLOSES not in content:
        return {"role": role, CONTENT: content}
    reasoning, answer = content.rsplit(REASONING_CLOSES, 1)
    # the newlines between them are the format's
    return {"role": role, REASONING: reasoning.split(REASONING_OPENS)[-1].strip("\n"), CONTENT: answer.lstrip("\n")}


def shape(parts: list[dict]) -> tuple:
    """What a frame depends on: the roles, and which answers bring reasoning."""
    return tuple((part["role"], REASONING in part) for part in parts)


def encode(tokenizer, texts: list[str], allow_special: bool) -> list[list[int]]:
    """Each text by itself; special tokens in it are text, unless they are allowed."""
    if not texts:
        return []
    settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, split_special_tokens=not allow_special, **settings)["input_ids"]


def stripped(text: str, piece: Piece) -> str:
    for function in piece.strip:
        text = function(text)
    return text


def laid_out(frame: Frame, messages: list[dict], contents, max_length) -> tuple[np.ndarray, np.ndarray]:
    """One conversation's ids and labels. contents: an iterator over tokenized contents, which are taken in order."""
    ids, labels = [], []
    for piece in frame.pieces:
        part = piece.ids if piece.slot is None else next(contents)
        learnt = piece.answer is not None and messages[piece.answer].get("train", True)
        ids += part
        labels += part if learnt else [IGNORE] * len(part)
    return np.array(ids[:max_length], np.int32), np.array(labels[:max_length], np.int32)


# ---- frames


def frame_of(tokenizer, key: tuple) -> Frame:
    """The frame of a shape; each is made once per tokenizer and template."""
    known = _frames.setdefault(tokenizer, {})
    place = (tokenizer.chat_template, key)
    if place not in known:
        known[place] = make_frame(tokenizer, key)
    return known[place]


def make_frame(tokenizer, key: tuple) -> Frame:
    """Renders placeholders, with and without white space around them, and cuts the text at them."""
    texts, slots = cut(rendered(tokenizer, key, ""))
    padded, again = cut(rendered(tokenizer, key, PAD))
    expected = [(i, CONTENT) for i in range(len(key))]
    if [slot for slot in slots if slot[1] == CONTENT] != expected or slots != again:
        raise unusable(key, "it does not show every message once, in their order")
    kept = kept_around(texts, padded, key)
    frame = Frame(left_out=sum(reasons for _, reasons in key) - sum(slot[1] == REASONING for slot in slots))
    header, answer = header_of(tokenizer), None
    for number, text in enumerate(texts):
        following = slots[number][0] if number < len(slots) else None
        for part, belongs in cut_by_answers(text, header, answer, following, key):
            if part:
                frame.pieces.append(Piece(ids=encode_frame(tokenizer, part), answer=belongs))
        if following is not None:
            answer = following if key[following][0] == "assistant" else None
            strip = (LEFT[kept[number][0]], RIGHT[kept[number][1]])
            frame.pieces.append(Piece(slot=slots[number], answer=answer, strip=strip))
    return frame


def rendered(tokenizer, key: tuple, pad: str, **settings) -> str:
    """The template's text of a shape, with placeholders."""
    messages = []
    for i, (role, reasons) in enumerate(key):
        message = {"role": role, "content": f"{pad}\ue000{i}{CONTENT}\ue001{pad}"}
        if reasons:
            message["reasoning_content"] = f"{pad}\ue000{i}{REASONING}\ue001{pad}"
        messages.append(message)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except Exception as error:  # of Jinja, or what the template itself raises
        raise unusable(key, f"it says: {' '.join(str(error).split())}") from error


def cut(text: str) -> tuple[list[str], list[tuple[int, str]]]:
    """(the text between placeholders, the placeholders): of each one more text than placeholders."""
    parts = SLOT.split(text)
    return parts[::3], [(int(i), kind) for i, kind in zip(parts[1::3], parts[2::3])]


def kept_around(texts: list[str], padded: list[str], key: tuple) -> list[tuple[str, str]]:
    """For each placeholder, what the template left of the white space before and behind it."""
    rights, lefts = [""], []
    for number, (text, wide) in enumerate(zip(texts, padded)):
        before = [""] if number == 0 else RIGHT
        behind = [""] if number == len(texts) - 1 else LEFT
        fits = [pair for pair in itertools.product(before, behind) if pair[0] + text + pair[1] == wide]
        if not fits:
            raise unusable(key, "it changes the contents of messages")
        rights.append(fits[0][0])
        lefts.append(fits[0][1])
    return list(zip(lefts[:-1], rights[2:]))


def header_of(tokenizer) -> str:
    """What the generation prompt adds: the header of an answer."""
    user = (("user", False),)
    plain, prompt = (rendered(tokenizer, user, "", add_generation_prompt=wish) for wish in (False, True))
    return prompt.removeprefix(plain)


def cut_by_answers(text: str, header: str, answer: int | None, following: int | None, key: tuple):
    """Yields (part of the frame, number of the answer it belongs to, or None).

    answer: the message whose content stands before the text, if it is an answer; following: the one that comes behind it.
    """
    if answer is not None and following == answer:  # between reasoning and content
        yield text, answer
        return
    if answer is not None:
        end = text.find(END_OF_TURN)
        if end < 0:
            raise unusable(key, f"an answer does not end with {END_OF_TURN}")
        yield text[: end + len(END_OF_TURN)], answer
        text = text[end + len(END_OF_TURN) :]
    if following is None or key[following][0] != "assistant":
        yield text, None
        return
    begin = text.rfind(header)
    if begin < 0:
        raise unusable(key, "an answer does not begin as its generation prompt does")
    yield text[: begin + len(header)], None
    yield text[begin + len(header) :], following


def encode_frame(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def unusable(key: tuple, why: str) -> UserError:
    roles = ", ".join(role for role, _ in key)
    return UserError(
        f"the model's chat template cannot render a conversation by {roles}: {why} - change the conversations, or the "
        "chat_template of the model's folder"
    )


# ---- for the cache of rendered data


def learnt_frame_ids(tokenizer) -> set[int]:
    """The tokens of the frame that are learnt: where a sample has no others left, its answer was cut away."""
    frame = frame_of(tokenizer, (("user", False), ("assistant", False)))
    return {index for piece in frame.pieces if piece.ids and piece.answer is not None for index in piece.ids}
