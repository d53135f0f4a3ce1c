"""What a chat template makes of conversations of one shape: which samples come of them, and where answers begin.

A model is asked for an answer with a prompt: the messages before it, laid out, and the template's generation prompt. What is
learned of the answer is what stands behind that prompt, in what the template makes of the messages up to the answer. A longer
conversation may teach the answer too, if it begins with just that text. Where the template lays earlier answers out otherwise
than the last one (Qwen3 leaves out their thoughts), the answer needs a sample of its own, which ends with it: the conversation
is unrolled.

All this is found by asking the template, with marks in place of the texts, once for all conversations of the same shape:
the same roles, and the same of what a template looks at (is there a text, are there thoughts, calls, tools).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from .control_text import ControlText

TAGGED = re.compile(r"(<\w+>).*(</\w+>)", re.DOTALL)
QUESTION, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
ENABLE = ({}, {"enable_thinking": True}, {"enable_thinking": False})  # the ways in which an answer is asked for
# From the same private area of Unicode as control_text's placeholders.
MARK = "\ue002{}\ue003"
ANY_MARK = re.compile("\ue002[0-9]+\ue003")


class NotLearnable(ValueError):
    """The template does not show where an answer begins or ends."""


class Part(NamedTuple):
    """A text of a conversation. kind: "text", a whole content; "thoughts" of an answer, or the "answer" behind them."""

    message: int
    text: str
    kind: str = "text"


class Learned(NamedTuple):
    """An answer to be learned. message: its number; answer: its number among the answers.

    prompt: the text between the header and what is learned. emptied: an empty block of thoughts stands there. forgotten: the
    template leaves out its thoughts.
    """

    message: int
    answer: int
    prompt: str
    emptied: bool
    forgotten: bool = False


class Sample(NamedTuple):
    """One sample that comes of a conversation: its first `length` messages, and what is learned in them.

    frames: for each text of these messages, what stands right before and behind it, from the last text or control token on,
    and to the next; None for one that the template leaves out.
    """

    length: int
    learned: list[Learned]
    frames: tuple[tuple[str, str] | None, ...] = ()


class Headers:
    """Where the answers stand in what the template returns: behind `text`, up to the next special token."""

    def __init__(self, template, control: ControlText):
        asked = [template([QUESTION], None, add_generation_prompt=True, **way) for way in ENABLE]
        without = template([QUESTION], None)
        prompts = [text[len(without) :] for text in asked if text.startswith(without)]
        earlier = template([QUESTION, ANSWER, QUESTION, ANSWER], None)
        last = template([QUESTION, ANSWER], None)
        self.text, self.control = "", control
        for length in range(min(map(len, prompts), default=0), 0, -1):
            text = prompts[0][:length]
            shared = all(prompt.startswith(text) for prompt in prompts) and text in last and earlier.count(text) == 2
            if shared and control.special.search(text):
                self.text = text
                break
        behind = last.partition(self.text)[2] if self.text else ""
        self.empty_thoughts = behind.partition("!")[0] if "</think>" in behind else ""

    def find(self, rendered: str, count: int) -> list[tuple[int, int]]:
        """(begin, end) of each of `count` answers; NotLearnable if the text does not show as many."""
        begins = [match.end() for match in re.finditer(re.escape(self.text), rendered)] if self.text else []
        ends = [self.control.special.search(rendered, begin) for begin in begins]
        if len(begins) != count or not all(ends):
            raise NotLearnable("it does not show where an answer begins (its generation prompt) or ends (a special token)")
        return [(begin, end.end()) for begin, end in zip(begins, ends)]


class Conversing:
    """The template at work on one conversation; remembers what it returned."""

    def __init__(self, template, messages: list[dict], tools: list[dict], headers: Headers):
        self.template, self.messages, self.tools, self.headers = template, messages, tools, headers
        self.answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        self._laid_out: dict[int, tuple] = {}

    def laid_out(self, length: int) -> tuple[str, list[tuple[int, int]]]:
        """The first messages as text, and where the answers stand in it."""
        if length not in self._laid_out:
            text = self.template(self.messages[:length], self.tools)
            count = sum(number < length for number in self.answers)
            self._laid_out[length] = text, self.headers.find(text, count)
        return self._laid_out[length]

    def samples(self, wanted: list[int], multi_turn: str, learn_empty: bool) -> list[Sample]:
        """The samples that teach the wanted answers (numbers of messages), the longest first."""
        if multi_turn == "as_is":
            learned = [self._as_is(number, learn_empty) for number in wanted]
            return [Sample(len(self.messages), learned)] if learned else []
        found, left, length = [], list(wanted), len(self.messages)
        while left:
            asked = [self._as_asked(number, length, learn_empty) for number in left]
            learned = [each for each in asked if each is not None]
            if learned:
                found.append(Sample(length, learned))
                left = [number for number, each in zip(left, asked) if each is None]
            elif length == left[-1] + 1:
                raise NotLearnable("an answer does not begin with the generation prompt")
            length = left[-1] + 1 if left else 0
        return found

    def _as_asked(self, number: int, length: int, learn_empty: bool) -> Learned | None:
        """The answer in the first messages, if it stands there behind a prompt that asks for it, and as it would alone."""
        answer = self.answers.index(number)
        text, places = self.laid_out(length)
        begin, end = places[answer]
        alone, places_alone = self.laid_out(number + 1)
        if text[:end] != alone[: places_alone[answer][1]]:
            return None
        prompts = [len(prompt) for prompt in self._prompts(number) if text.startswith(prompt) and len(prompt) >= begin]
        if not prompts:
            return None
        return self._learned(number, text, begin, prompts[0] if learn_empty else max(prompts), learn_empty)

    def _prompts(self, number: int) -> list[str]:
        """The ways to ask for an answer."""
        before = self.messages[:number]
        return [self.template(before, self.tools, add_generation_prompt=True, **way) for way in ENABLE]

    def _as_is(self, number: int, learn_empty: bool) -> Learned:
        """The answer as it stands in the whole conversation, behind as much of a generation prompt as is there."""
        text, places = self.laid_out(len(self.messages))
        begin, _ = places[self.answers.index(number)]
        header = self.headers.text
        prompts = [prompt[prompt.rfind(header) + len(header) :] for prompt in self._prompts(number)]
        there = [begin + len(prompt) for prompt in prompts if text.startswith(prompt, begin)] or [begin]
        return self._learned(number, text, begin, there[0] if learn_empty else max(there), learn_empty)

    def _learned(self, number: int, text: str, begin: int, learn_from: int, learn_empty: bool) -> Learned:
        empty = self.headers.empty_thoughts
        emptied = bool(empty) and not has_thoughts(self.messages[number]) and text.startswith(empty, begin)
        if emptied and not learn_empty:
            learn_from = max(learn_from, begin + len(empty))
        return Learned(number, self.answers.index(number), text[begin:learn_from], emptied)


# ---- shapes and marks


def shape_of(messages: list[dict], tools: list[dict], wanted: list[int]) -> tuple:
    """What a template looks at, beside the texts themselves."""
    looks = tuple(
        (
            message["role"],
            bool(message["content"]),
            bool(message["content"].strip()),
            "</think>" in message["content"],
            TAGGED.fullmatch(message["content"].strip()) is not None,
            has_thoughts(message),
            "reasoning_content" in message,
            len(message.get("tool_calls", ())),
        )
        for message in messages
    )
    return looks, tuple(wanted), bool(tools)


class Mark(NamedTuple):
    """text: what stands in the place of a text. message: whose, if any. kind: "text", "thoughts", "answer", "call", "result", "tools"."""

    text: str
    message: int | None
    kind: str


def marked(messages: list[dict], tools: list[dict]) -> tuple[list[dict], list[dict], list[Mark]]:
    """A conversation of the same shape, with a mark in place of each text: (messages, tools, the marks)."""
    marks: list[Mark] = []

    def mark(kind: str, number: int | None = None) -> str:
        marks.append(Mark(MARK.format(len(marks)), number, kind))
        return marks[-1].text

    new = []
    for number, message in enumerate(messages):
        role, text = message["role"], message["content"]
        content = ""
        if "reasoning_content" in message:
            thoughts = mark("thoughts", number)
        if found := thoughts_of(message):
            opening, inside, behind = found
            content = opening + (mark("thoughts", number) if inside.strip() else inside) + "</think>"
            content += mark("answer", number) if behind.strip() else behind
        elif role == "user" and (tagged := TAGGED.fullmatch(text)):
            content = tagged[1] + (mark("text", number) if text[tagged.end(1) : tagged.start(2)].strip() else "\n") + tagged[2]
        else:
            content = mark("result" if role == "tool" else "text", number) if text.strip() else text
        new.append({"role": role, "content": content})
        if "reasoning_content" in message:
            new[-1]["reasoning_content"] = thoughts
        if message.get("tool_calls"):
            new[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": mark("call", number), "arguments": {"argument": mark("call", number)}}}
                for _ in message["tool_calls"]
            ]
    return new, [_tool(mark("tools"))] if tools else [], marks


def _tool(name: str) -> dict:
    parameters = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def parts_of(messages: list[dict]) -> Iterator[Part]:
    """The texts that the template is to show, in the order of marked(). What is blank needs no place."""
    for number, message in enumerate(messages):
        texts = [("thoughts", message.get("reasoning_content", ""))]
        if found := thoughts_of(message):
            texts += [("thoughts", found[1]), ("answer", found[2])]
        elif message["role"] == "user" and (tagged := TAGGED.fullmatch(message["content"])):
            texts.append(("text", message["content"][tagged.end(1) : tagged.start(2)]))
        else:
            texts.append(("text", message["content"]))
        yield from (Part(number, text, kind) for kind, text in texts if text.strip())


def frames_of(text: str, marks: list[Mark], length: int, control: ControlText) -> tuple[tuple[str, str] | None, ...]:
    """Sample.frames, from a conversation with marks as the template lays it out. length: of the messages in it."""
    found, at = [], 0
    for mark in marks:
        if mark.message is None or mark.message >= length or mark.kind == "call":
            continue
        place = text.find(mark.text)
        if place < 0:
            found.append(None)
            continue
        before = ANY_MARK.split(text[at:place])[-1]
        at = place + len(mark.text)
        behind = ANY_MARK.split(text[at:], maxsplit=1)[0]
        starts = [match.start() for match in control.special.finditer(before)]
        end = control.special.search(behind)
        found.append((before[starts[-1] :] if starts else before, behind[: end.end()] if end else behind))
    return tuple(found)


def thoughts_of(message: dict) -> tuple[str, str, str] | None:
    """("<think>" or "", thoughts, the answer behind </think>) of an answer that begins with thoughts; None for others.

    Models whose generation prompt holds the <think> leave it out.
    """
    if message["role"] != "assistant" or "</think>" not in message["content"]:
        return None
    before, _, rest = message["content"].partition("</think>")
    head, opening, thoughts = before.rpartition("<think>")
    return None if head.strip() else (opening, thoughts, rest)


def has_thoughts(message: dict) -> bool:
    """Has an answer thoughts of its own? An empty block is none."""
    found = thoughts_of(message)
    return bool(message.get("reasoning_content", "").strip() or found and found[1].strip())
