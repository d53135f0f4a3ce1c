"""Conversations laid out by the model's own chat template, as later Qwens bring one (Jinja, in their tokenizer's files).

The template runs twice. With marks in place of the contents it shows the frame around them, for a whole family of
conversations (same roles, same form). With the contents themselves it shows what this conversation must look like: every
content has to stand between the same pieces of frame, or the conversation is refused. So a template may say what it likes,
a default system message or an empty block of thoughts, and nothing is lost unseen.

Then the pieces are tokenized one by one: the frame as the tokenizer does, with its control tokens; contents as ordinary
text, so that no character of theirs can become a control token. Of an answer everything is learned from where a generation
prompt ends up to the token that ends the turn.
"""

import json
import re
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UserError
from .data_notes import Seen, counted

MARK = re.compile("\ue000([0-9]+)\ue001")  # from a private area of Unicode
TAGGED = re.compile(r"(<\w+>).*(</\w+>)", re.DOTALL)
TRIMS = (str.strip, str.lstrip, str.rstrip, *(lambda s, f=f: f(s, "\n") for f in (str.strip, str.lstrip, str.rstrip)))
PROBE = "It's 1984, don't\r\n\tpanic!  é é Å 你好，世界 👩‍👩‍👧 <|im_start|><|endoftext|>  \n\n x"  # two ways to write é
FIRST_GENERATION_MASK = (
    "--supervise chatml: is the published mask of first-generation Qwen, and this model's conversations are laid out by its "
    "own chat template - leave it out: every answer and the token that ends it are learned"
)


def renderer_of(tokenizer, path: str = ""):
    """What lays out conversations for this tokenizer. path: of the file they come from, for messages.

    It has render_batch(conversations, **settings), as chatml.render_batch takes and returns them; supervised_frame, ids that
    are supervised without being content; notes(), lines about what was rendered so far; identity(), text that tells it apart.
    """
    return ChatML(tokenizer) if hasattr(tokenizer, "encode_ordinary") else ChatTemplate(tokenizer, path)


class ChatML:
    """First-generation Qwen's format, which has no template: chatml.py."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.supervised_frame = {tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.encode_ordinary("\n")}

    def render_batch(self, conversations: list[list[dict]], **settings):
        from qwen_model import chatml  # reading data does without torch until it is rendered

        return chatml.render_batch(self.tokenizer, conversations, **settings)

    def notes(self) -> list[str]:
        return []

    def identity(self) -> str:
        tokenizer = self.tokenizer
        special = [
            tokenizer.im_start_id,
            tokenizer.im_end_id,
            *sorted(getattr(tokenizer, "special_tokens", {}).items()),
        ]
        return json.dumps([special, tokenizer.encode_ordinary(PROBE)])


class Part(NamedTuple):
    """A stretch of a conversation's text that the template is to lay out as it is.

    kind: "text", a whole content; "thoughts" of an answer, or the "answer" behind them.
    """

    message: int
    text: str
    kind: str = "text"


class Piece(NamedTuple):
    """Frame (text) or content (part, its number). answer: the message that it is to be learned with, if any."""

    text: str | None
    part: int | None
    answer: int | None


@dataclass
class Frame:
    """texts: what stands before, between and behind the parts that are laid out; shown: the numbers of those."""

    texts: list[str]
    shown: list[int]
    pieces: list[Piece]


class ChatTemplate:
    """Renders through tokenizer.apply_chat_template. Counts samples over all its batches, for notes and messages."""

    def __init__(self, tokenizer, path: str = ""):
        self.tokenizer, self.path, self.number = tokenizer, path, 0
        self.forgotten, self.trimmed = Seen(), Seen()
        self.supervised_frame: set[int] = set()
        self._frames: dict[tuple, Frame] = {}
        self._frame_ids: dict[str, list[int]] = {}
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._ends = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as error:
            what = f"{tokenizer.name_or_path}: its tokenizer has no chat template, which lays out the conversations"
            raise UserError(f"{what} - add the chat_template.jinja of the chat model of its family") from error
        self._header = self._generation_prompt()

    def identity(self) -> str:
        """Everything beside the vocabulary that a rendering depends on."""
        return json.dumps([self.template, sorted(self._special), self._encode([PROBE], as_text=True)])

    def notes(self) -> list[str]:
        """A line for each thing that the template did to contents."""
        lines = []
        if self.forgotten.samples:
            what = f"thoughts (<think>) before an answer that is not the last (first: {self.forgotten.first})"
            why = "the model's chat template leaves them out; to learn them, end a conversation with that answer"
            lines.append(f"{counted(self.forgotten.samples)} with {what}: {why}")
        if self.trimmed.samples:
            what = f"blanks or newlines around a text (first: {self.trimmed.first})"
            lines.append(f"{counted(self.trimmed.samples)} with {what}: the model's chat template trims them")
        return lines

    # ---- rendering

    def render_batch(
        self,
        conversations: list[list[dict]],
        *,
        supervise: str = "assistant",
        allow_special: bool = False,
        max_length: int | None = None,
    ):
        """Conversations as (ids, labels), as chatml.render_batch returns them.

        Raises UserError for supervise "chatml", and naming the sample where the template fails or does not keep a content.
        """
        from qwen_model.chatml import Sequences

        if supervise != "assistant":
            raise UserError(FIRST_GENERATION_MASK)
        laid_out = [self._lay_out(messages) for messages in conversations]
        ids = iter(self._encode([text for _, texts in laid_out for text in texts], as_text=not allow_special))
        sequences = Sequences()
        for messages, (frame, texts) in zip(conversations, laid_out):
            contents = dict(zip(frame.shown, [next(ids) for _ in texts]))
            for piece in frame.pieces:
                learned = piece.answer is not None and messages[piece.answer].get("train", True)
                tokens = contents[piece.part] if piece.text is None else self._frame_tokens(piece.text, learned)
                sequences.add(tokens, learned)
            sequences.end_sequence()
        return sequences.arrays(max_length)

    def _encode(self, texts: list[str], as_text: bool) -> list[list[int]]:
        """as_text: control tokens (added tokens that are special) in a text are ordinary characters."""
        if not texts:
            return []
        settings = {"add_special_tokens": False, "split_special_tokens": as_text, "return_attention_mask": False}
        return self.tokenizer(texts, verbose=False, **settings)["input_ids"]

    def _frame_tokens(self, text: str, learned: bool) -> list[int]:
        if text not in self._frame_ids:
            (self._frame_ids[text],) = self._encode([text], as_text=False)
        if learned:
            self.supervised_frame.update(self._frame_ids[text])
        return self._frame_ids[text]

    # ---- one conversation

    def _lay_out(self, messages: list[dict]) -> tuple[Frame, list[str]]:
        """The frame of a conversation, and the texts of its parts as the template shows them."""
        self.number += 1
        wanted = self._template(messages)
        ways, misplaced = [parts_of(messages)], None
        if any(thoughts_of(message) for message in messages):
            ways.append(parts_of(messages, apart=True))
        for parts, marked in ways:
            frame = self._frame(marked, parts)
            texts, misplaced = fill(frame, parts, wanted)
            if texts is not None:
                self._check_answers(frame, messages)
                self._take_note(frame, parts, texts, messages)
                return frame, texts
        self._refuse(f"the model's chat template drops or changes {shown(messages, parts, misplaced)}")

    def _template(self, messages: list[dict], **settings) -> str:
        """The conversation as text."""
        from jinja2 import TemplateError

        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=False, **settings)
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # a template is a program
            self._refuse(f"the model's chat template fails on it ({' '.join(str(error).split())})", error)

    def _refuse(self, what: str, cause: Exception | None = None):
        where = f"{self.path}: sample {self.number}: " if self.number else f"{self.tokenizer.name_or_path}: "
        raise UserError(f"{where}{what} - change the text, or the template in the model's folder") from cause

    def _check_answers(self, frame: Frame, messages: list[dict]) -> None:
        """Each answer to be learned has a place in the frame where it begins and ends."""
        found = {piece.answer for piece in frame.pieces}
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("train", True) and number not in found:
                what = "it does not show where an answer begins (its generation prompt) or ends (a special token)"
                self._refuse(f"the model's chat template cannot be learned from: {what}")

    def _take_note(self, frame: Frame, parts: list[Part], texts: list[str], messages: list[dict]) -> None:
        """Counts what the template leaves out. Thoughts before the last answer may not be lost: they are to be learned."""
        for number in set(range(len(parts))) - set(frame.shown):
            if parts[number].message == len(messages) - 1 and messages[-1].get("train", True):
                self._refuse(f"the model's chat template drops {shown(messages, parts, number)}")
            self.forgotten.add(self.number)
        for number, text in zip(frame.shown, texts):
            part = parts[number]  # newlines between thoughts and answer are the template's
            if text != part.text and (part.kind == "text" or text.strip("\n") != part.text.strip("\n")):
                self.trimmed.add(self.number)

    # ---- frames

    def _generation_prompt(self) -> str:
        """What the template puts before an answer."""
        question = [{"role": "user", "content": "?"}]
        without, with_ = (self._template(question, add_generation_prompt=asked) for asked in (False, True))
        return with_[len(without) :] if with_.startswith(without) else ""

    def _frame(self, marked: tuple[tuple[str, str], ...], parts: list[Part]) -> Frame:
        """The frame around the marks. marked: role and content of each message; equal ones have equal parts, but for text."""
        if marked not in self._frames:
            text = self._template([{"role": role, "content": content} for role, content in marked])
            for role, content in marked:
                if role == "user" and (tagged := TAGGED.fullmatch(content)):
                    text = text.replace(content, content[tagged.end(1) : tagged.start(2)])
            texts = MARK.split(text)
            shown_parts = [int(number) for number in texts[1::2]]
            pieces = self._pieces(texts[::2], shown_parts, [part.message for part in parts], marked)
            self._frames[marked] = Frame(texts[::2], shown_parts, pieces)
        return self._frames[marked]

    def _pieces(self, texts: list[str], shown_parts: list[int], owner: list[int], marked) -> list[Piece]:
        """Frame and contents in their order, each answer's together with what frames it."""
        pieces, answer = [], None
        for text, part in zip(texts, [*shown_parts, None]):
            following = None if part is None else owner[part]
            if answer is not None and following != answer:
                text = self._close(pieces, text, answer)
                answer = None
            if following is not None and answer is None and marked[following][0] == "assistant":
                answer = self._open(pieces, text, following)
            elif text:
                pieces.append(Piece(text, None, answer))
            if part is not None:
                pieces.append(Piece(None, part, answer))
        return pieces

    def _open(self, pieces: list[Piece], text: str, answer: int) -> int | None:
        """Divides the frame before an answer where the generation prompt ends. None if it is not there."""
        at = text.rfind(self._header) if self._header else -1
        length = len(self._header)
        while at < 0 and length > 1:  # a prompt may go on beyond what stands before earlier answers
            length -= 1
            if text.endswith(self._header[:length]) and self._ends.search(self._header[:length]):
                at = len(text) - length
        if at < 0:
            pieces.append(Piece(text, None, None))
            return None
        before, behind = text[: at + length], text[at + length :]
        pieces.append(Piece(before, None, None))
        if behind:
            pieces.append(Piece(behind, None, answer))
        return answer

    def _close(self, pieces: list[Piece], text: str, answer: int) -> str:
        """Adds what belongs to the answer before `text`, up to its first special token; returns the rest."""
        end = self._ends.search(text)
        if end is None:  # nothing tells the model to stop
            pieces[:] = [piece._replace(answer=None) if piece.answer == answer else piece for piece in pieces]
            return text
        pieces.append(Piece(text[: end.end()], None, answer))
        return text[end.end() :]


# ---- parts of a conversation


def mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def parts_of(messages: list[dict], apart: bool = False) -> tuple[list[Part], tuple[tuple[str, str], ...]]:
    """The parts of all contents; and (role, content) of each message with marks in their place. What is empty stays empty.

    apart: thoughts and the answer behind them are parts of their own. A mark keeps the tags that a user's content begins and
    ends with: templates know the results of tools by them.
    """
    parts, marked = [], []
    for number, message in enumerate(messages):
        role, text = message["role"], message["content"]
        pieces = [("", text, "text", "")]
        if apart and (found := thoughts_of(message)):
            opening, thoughts, rest = found
            pieces = [(opening, thoughts, "thoughts", "</think>"), ("", rest, "answer", "")]
        elif role == "user" and (tagged := TAGGED.fullmatch(text)):
            pieces = [(tagged[1], text, "text", tagged[2])]
        content = ""
        for before, part, kind, behind in pieces:
            if is_there := bool(part if kind == "text" else part.strip()):
                parts.append(Part(number, part, kind))
            content += before + (mark(len(parts) - 1) if is_there else "") + behind
        marked.append((role, content))
    return parts, tuple(marked)


def thoughts_of(message: dict) -> tuple[str, str, str] | None:
    """("<think>" or "", thoughts, the answer behind </think>) of an answer that begins with thoughts; None for others.

    Models whose generation prompt holds the <think> leave it out.
    """
    before, closing, rest = message["content"].partition("</think>")
    head, opening, thoughts = before.rpartition("<think>")
    return None if message["role"] != "assistant" or not closing or head.strip() else (opening, thoughts, rest)


def fill(frame: Frame, parts: list[Part], wanted: str) -> tuple[list[str] | None, int | None]:
    """(the texts of the parts that `frame` shows, as they stand in `wanted`, None); or (None, the part that fails)."""
    lost = [number for number, part in enumerate(parts) if number not in frame.shown and part.kind != "thoughts"]
    if lost or frame.shown != sorted(set(frame.shown)) or not wanted.startswith(frame.texts[0]):
        return None, lost[0] if lost else None
    at, texts = len(frame.texts[0]), []
    for number, behind in zip(frame.shown, frame.texts[1:]):
        text = parts[number].text
        forms = (trim(text) for trim in (str, *TRIMS))
        form = next((form for form in forms if wanted.startswith(form + behind, at)), None)
        if form is None:  # a text that is there is followed by what the frame does not foresee
            later = [other for other in frame.shown if other > number]
            return None, later[0] if later and wanted.startswith(text, at) else number
        texts.append(form)
        at += len(form) + len(behind)
    return (texts, None) if at == len(wanted) else (None, None)


def shown(messages: list[dict], parts: list[Part], number: int | None) -> str:
    """A part in words."""
    if number is None:
        return "what stands in the turns"
    part = parts[number]
    text = " ".join(part.text.split())
    text = text if len(text) <= 40 else text[:39] + "…"
    return f'the {part.kind} of message {part.message + 1}, by {messages[part.message]["role"]} ("{text}")'
