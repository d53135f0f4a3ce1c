"""What a chat template makes of conversations of one shape: which samples come of them, and where answers begin.

A model is asked for an answer with a prompt: the messages before it, laid out, and the template's generation prompt. What is
learned of the answer is what stands behind that prompt, in what the template makes of the messages up to the answer. A longer
conversation may teach the answer too, if it begins with just that text. Where the template lays earlier answers out otherwise
than the last one (Qwen3 leaves out their thoughts), the answer needs a sample of its own, which ends with it: the conversation
is unrolled.

All this is found by asking the template, with marks in place of the texts, once for all conversations of the same shape:
the same roles, and the same of what a template looks at (is there a text, are there thoughts, calls, tools).
"""

import bisect
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from .control_text import ControlText

TAGGED = re.compile(r"(\s*<tool_response>)(.*)(</tool_response>\s*)", re.DOTALL)
NEAR = 5  # questions before and behind an answer that are told apart
TRUSTED = 3  # times that answers which look alike must have been alike, until no more are looked at
QUESTION, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
ENABLE = ({}, {"enable_thinking": True}, {"enable_thinking": False})  # the ways in which an answer is asked for
# From the same private area of Unicode as control_text's placeholders.
MARK = "\ue002{}\ue003"
ANY_MARK = re.compile("\ue002[0-9]+\ue003")


class NotLearnable(ValueError):
    """The template does not show where an answer begins or ends."""


class Part(NamedTuple):
    """A text of a conversation. kind: "text", a whole content, or a tool's "result"; "thoughts" of an answer, or the "answer"
    behind them. at: where it begins in the content; None for one that is no part of it."""

    message: int
    text: str
    kind: str
    at: int | None


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
        self.prompts = prompts = [text[len(without) :] if text.startswith(without) else "" for text in asked]
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
        # can the model be asked for an answer behind the empty block?
        self.can_skip = bool(self.empty_thoughts) and any(self.empty_thoughts in prompt for prompt in prompts)

    def find(self, rendered: str, count: int) -> list[tuple[int, int]]:
        """(begin, end) of each of `count` answers; NotLearnable if the text does not show as many."""
        begins = [match.end() for match in re.finditer(re.escape(self.text), rendered)] if self.text else []
        ends = [self.control.special.search(rendered, begin) for begin in begins]
        if len(begins) != count or not all(ends):
            raise NotLearnable("it does not show where an answer begins (its generation prompt) or ends (a special token)")
        return [(begin, end.end()) for begin, end in zip(begins, ends)]


class Conversing:
    """The template at work on one conversation; remembers what it returned."""

    def __init__(self, template, messages: list[dict], tools: list[dict], headers: Headers, rules: dict):
        self.template, self.messages, self.tools, self.headers, self.rules = template, messages, tools, headers, rules
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        self.answers = {number: answer for answer, number in enumerate(numbers)}
        self.looks = [skeleton(message) for message in messages]
        self.questions = [number for number, message in enumerate(messages) if is_question(message)]
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
            asked = [self._by_rule(number, length, learn_empty) for number in left]
            learned = [each for each in asked if each is not None]
            if learned:
                found.append(Sample(length, learned))
                left = [number for number, each in zip(left, asked) if each is None]
            elif length == left[-1] + 1:
                raise NotLearnable("an answer does not begin with the generation prompt")
            length = left[-1] + 1 if left else 0
        return found

    def _by_rule(self, number: int, length: int, learn_empty: bool) -> Learned | None:
        """_as_asked, from memory where answers that look alike, in their question and behind it, have always been alike."""
        at = bisect.bisect(self.questions, number)
        begin = self.questions[at - 1] if at else 0
        later = bisect.bisect_left(self.questions, length) - at  # questions behind it
        place = (min(at, NEAR), min(later, NEAR), length == number + 1, bool(self.tools), self.looks[0][0])
        key = (place, tuple(self.looks[begin : number + 1]))
        seen, rule = self.rules.get(key, (0, None))
        if seen < TRUSTED:
            found = self._as_asked(number, length, learn_empty)
            now = found and (found.prompt, found.emptied)
            self.rules[key] = (seen + 1, now) if now == rule or not seen else (-math.inf, None)
            return found
        return rule and Learned(number, self.answers[number], *rule)

    def _as_asked(self, number: int, length: int, learn_empty: bool) -> Learned | None:
        """The answer in the first messages, if it stands there behind a prompt that asks for it, and as it would alone."""
        answer = self.answers[number]
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
        """The ways to ask for an answer, the template's own first."""
        usual, *others = self.headers.prompts
        prompt = self.template(self.messages[:number], self.tools, add_generation_prompt=True)
        if not prompt.endswith(usual):
            return [prompt]
        return [prompt, *(prompt.removesuffix(usual) + other for other in others)]

    def _as_is(self, number: int, learn_empty: bool) -> Learned:
        """The answer as it stands in the whole conversation, behind as much of a generation prompt as is there."""
        text, places = self.laid_out(len(self.messages))
        begin, _ = places[self.answers[number]]
        header = self.headers.text
        prompts = [prompt[prompt.rfind(header) + len(header) :] for prompt in self._prompts(number)]
        there = [begin + len(prompt) for prompt in prompts if text.startswith(prompt, begin)] or [begin]
        return self._learned(number, text, begin, there[0] if learn_empty else max(there), learn_empty)

    def _learned(self, number: int, text: str, begin: int, learn_from: int, learn_empty: bool) -> Learned:
        empty = self.headers.empty_thoughts
        emptied = bool(empty) and not has_thoughts(self.messages[number]) and text.startswith(empty, begin)
        behind = begin + len(empty)
        if emptied and learn_empty:
            emptied = learn_from < behind  # else the prompt itself holds the block
        elif emptied:
            learn_from = max(learn_from, behind)
        return Learned(number, self.answers[number], text[begin:learn_from], emptied)


# ---- shapes and marks


def skeleton(message: dict) -> tuple:
    """What a template looks at in a message with marks, beside the texts themselves."""
    content = ANY_MARK.sub("\ue002", message["content"])
    return message["role"], content, "reasoning_content" in message, len(message.get("tool_calls", ()))


def is_question(message: dict) -> bool:
    """Whether it is by the user, and not the result of a tool in the user's name."""
    return message["role"] == "user" and not tagged(message)


class Mark(NamedTuple):
    """text: what stands in the place of a text. message: whose, if any. kind: "text", "thoughts", "answer", "call", "result", "tools"."""

    text: str
    message: int | None
    kind: str


def marked(messages: list[dict], tools: list[dict], other: bool = False) -> tuple[list[dict], list[dict], list[Mark]]:
    """A conversation that looks the same, with a mark in place of each text: (messages, tools, the marks).

    Tools and arguments are made up; other: in another way, with more of them. What is the same around a text in both ways is
    the template's own.
    """
    marks: list[Mark] = []

    def mark(kind: str, number: int | None = None) -> str:
        marks.append(Mark(MARK.format(len(marks)), number, kind))
        return marks[-1].text

    new = []
    for number, message in enumerate(messages):
        role, content, more = message["role"], "", {}
        if "reasoning_content" in message:
            more["reasoning_content"] = mark("thoughts", number)
        for literal, text, kind in pieces_of(message):
            content += literal + (mark(kind, number) if kind else "")
        if message.get("tool_calls"):
            calls = [{"name": mark("call", number), "arguments": made_up(mark, number, other)} for _ in message["tool_calls"]]
            more["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        new.append({"role": role, "content": content, **more})
    count = (2 if other else 1) if tools else 0
    return new, [made_up_tool(mark, other) for _ in range(count)], marks


def made_up(mark, number: int, other: bool) -> dict:
    """Arguments of a call."""
    if not other:
        return {"first": mark("call", number)}
    return {"one": mark("call", number), "two": [mark("call", number)], "last": 3}


def made_up_tool(mark, other: bool) -> dict:
    argument = {"type": "string", "description": mark("tools")} if other else {}
    parameters = {"type": "object", "properties": {"first": argument}} | ({"required": ["first"]} if other else {})
    function = {"name": mark("tools"), "description": mark("tools"), "parameters": parameters}
    return {"type": "function", "function": function}


def pieces_of(message: dict) -> list[tuple[str, str, str]]:
    """A content as pieces (literal, text, kind): what templates look at, and the text behind it. Kind "": there is none."""
    text = message["content"]
    if found := thoughts_of(message):
        opening, thoughts, rest = found
        pieces = [(opening, thoughts, "thoughts"), ("</think>", rest, "answer")]
    elif found := tagged(message):
        opening, inside, closing = found
        pieces = [(opening, inside, "text"), (closing, "", "")]
    else:
        pieces = [("", text, "result" if message["role"] == "tool" else "text")]
    return [piece if piece[1].strip() else (piece[0] + piece[1], "", "") for piece in pieces]


def parts_of(messages: list[dict]) -> Iterator[Part]:
    """The texts that the template is to show, in the order of marked(). What is blank needs no place."""
    for number, message in enumerate(messages):
        if "reasoning_content" in message:
            yield Part(number, message["reasoning_content"], "thoughts", None)
        at = 0
        for literal, text, kind in pieces_of(message):
            at += len(literal)
            if kind:
                yield Part(number, text, kind, at)
            at += len(text)


def frames_of(text: str, marks: list[Mark], length: int, control: ControlText) -> list[tuple[str, str] | None]:
    """Sample.frames, from a conversation with marks as the template lays it out. length: of the messages in it."""
    places = {match[0]: match.span() for match in reversed(list(ANY_MARK.finditer(text)))}
    order = sorted(places.values())
    before = {span: text[end : span[0]] for (_, end), span in zip([(0, 0), *order], order)}
    behind = {span: text[span[1] : begin] for span, (begin, _) in zip(order, [*order[1:], (len(text), 0)])}
    found = []
    for mark in texts_of(marks, length):
        span = places.get(mark.text)
        if span is None:
            found.append(None)
            continue
        starts = [match.start() for match in control.special.finditer(before[span])]
        end = control.special.search(behind[span])
        found.append((before[span][starts[-1] :] if starts else before[span], behind[span][: end.end()] if end else behind[span]))
    return found


def texts_of(marks: list[Mark], length: int) -> list[Mark]:
    """The marks that stand for texts of the first messages."""
    return [mark for mark in marks if mark.message is not None and mark.message < length and mark.kind != "call"]


def common(frames: list, others: list) -> tuple[tuple[str, str] | None, ...]:
    """What is the same in both, next to the texts."""
    return tuple(
        one and two and (os.path.commonprefix([one[0][::-1], two[0][::-1]])[::-1], os.path.commonprefix([one[1], two[1]]))
        for one, two in zip(frames, others, strict=True)
    )


def tagged(message: dict) -> tuple[str, str, str] | None:
    """A text between <tool_response> tags, which templates know as a tool's result: (begin, text, end), with the blanks around."""
    found = TAGGED.fullmatch(message["content"]) if message["role"] == "user" and "</tool_response>" in message["content"] else None
    return found and (found[1], found[2], found[3])


def thoughts_of(message: dict) -> tuple[str, str, str] | None:
    """(what stands before the thoughts, "<think>" or nothing but blanks; thoughts; the answer behind </think>) of an answer that
    begins with thoughts; None for others.

    Models whose generation prompt holds the <think> leave it out.
    """
    if message["role"] != "assistant" or "</think>" not in message["content"]:
        return None
    before, _, rest = message["content"].partition("</think>")
    head, opening, thoughts = before.rpartition("<think>")
    return None if head.strip() else (head + opening, thoughts, rest)


def has_thoughts(message: dict) -> bool:
    """Has an answer thoughts of its own? An empty block is none."""
    found = thoughts_of(message)
    return bool(message.get("reasoning_content", "").strip() or found and found[1].strip())


def trimmed(text: str, rendered: str, place: int, behind: str) -> str | None:
    """The text as it stands in `rendered` at `place`, with `behind` behind it: as it is, or with fewer blanks around it."""
    core = text.strip()
    begin = text.index(core)
    for lead in range(begin + 1):
        head = text[lead : begin + len(core)]
        if rendered.startswith(head, place):
            for end in range(len(text), begin + len(core) - 1, -1):
                form = text[lead:end]
                if rendered.startswith(form[len(head) :] + behind, place + len(head)):
                    return form
    return None
