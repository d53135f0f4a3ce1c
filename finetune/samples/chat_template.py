"""Conversations laid out by the model's own chat template, as later Qwens bring one (Jinja, in their tokenizer's files).

The ids are those of the text that the template returns, tokenized as the tokenizer does, with one difference: special tokens
that people have written are text (control_text.py). What stands between two control tokens is tokenized in one piece, and
labels are divided by where a token begins. Which samples a conversation makes, and where its answers begin, says
template_shapes.py. A text that the template drops or changes is refused: nothing is lost unseen.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from ..conversations.messages import Conversation
from ..errors import UserError
from . import lossless
from .control_text import ControlText
from .render_notes import Counts
from .rendering import PROBE, Problems, Refused, Rendering, identity_of, unlearned_results
from .template_shapes import (
    ANSWER,
    QUESTION,
    Conversing,
    Headers,
    Learned,
    Mark,
    NotLearnable,
    Part,
    Sample,
    common,
    frames_of,
    marked,
    parts_of,
    skeleton,
    texts_of,
    trimmed,
)  # fmt: skip
from .time_limit import of_template, of_texts

SHAPES = 4096  # of conversations, remembered
FIRST_GENERATION_MASK = (
    "--supervise chatml: is the published mask of first-generation Qwen, and this model's conversations are laid out by its "
    "own chat template - leave it out: every answer and the token that ends it are learned"
)
TO_TEMPLATE = ("role", "content", "reasoning_content", "tool_calls", "name")
FAILURES = Exception  # a template is a program
PLACES = {
    "thoughts": ('thoughts ("reasoning_content")', "remove them, or train a model that thinks"),
    "call": ('tool calls ("tool_calls")', "train a model that knows tools"),
    "result": ('results of tools (role "tool")', "train a model that knows tools"),
    "tools": ('tools ("tools")', "train a model that knows tools"),
}
CHANGE_TEMPLATE = "change the template in the model's folder"
CHANGE = f"change the text, or {CHANGE_TEMPLATE.removeprefix('change ')}"


class Job(NamedTuple):
    """One sample to be rendered. number: of its conversation in the file; messages, tools: of it, without control tokens."""

    number: int
    messages: list[dict]
    tools: list[dict]
    sample: Sample


# Text to be tokenized in one piece, or a control token; is it one?; (place in the text, the weight from there on) of each change
Stretch = tuple[str, bool, list[tuple[int, float]]]


class ChatTemplate:
    """Renders through tokenizer.apply_chat_template. Counts samples over all its batches, for notes and messages."""

    def __init__(self, tokenizer, path: str = "", rendering: Rendering = Rendering()):
        if rendering.supervise != "assistant":
            raise UserError(FIRST_GENERATION_MASK)
        self.tokenizer, self.path, self.rendering = tokenizer, path, rendering
        self.seen = self.number = 0  # conversations so far; the one at hand, for messages
        self.counts, self.problems = Counts(), Problems(path)
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control = ControlText(special)
        self.as_tokens = rendering.tokens_in_text(special)
        self.end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.special_ids = {str(token): [index] for index, token in tokenizer.added_tokens_decoder.items()}
        self._shapes: dict[tuple, list[Sample]] = {}
        self._rules: dict[tuple, tuple] = {}
        try:
            self.template_text = tokenizer.get_chat_template()
        except ValueError as error:
            what = f"{tokenizer.name_or_path}: its tokenizer has no chat template, which lays out the conversations"
            raise UserError(f"{what} - add the chat_template.jinja of the chat model of its family") from error
        self.headers = Headers(self._template, self.control)
        self.supervised_frame = self._supervised_frame()
        self.counts.can_skip = self.headers.can_skip

    def _supervised_frame(self) -> set[int]:
        """The ids of the template's control tokens and of its empty block of thoughts."""
        tokens = self.control.special.findall(self._template([QUESTION, ANSWER], None))
        return {*self._encode([self.headers.empty_thoughts])[0], *(self.special_ids[token][0] for token in tokens)}

    def identity(self) -> str:
        """Everything beside the vocabulary that a rendering depends on."""
        return identity_of(self.template_text, sorted(self.control.texts), self._encode([PROBE])[0])

    # ---- rendering

    def render_batch(self, conversations: list[Conversation], numbers: list[int] | None = None) -> list[list]:
        """The samples of each conversation, as chatml.Rendered (ids, labels, weights). numbers: of them; else they are counted.

        Those for which the template fails, or does not keep a text, make none: problems.raise_if_any() names them.
        """
        from qwen_model.chatml import Sequences  # reading data does without torch until it is rendered

        numbers = numbers or range(self.seen + 1, self.seen + 1 + len(conversations))
        jobs = [self._jobs_of(number, conversation) for number, conversation in zip(numbers, conversations)]
        returned = iter(self._render([job for samples in jobs for job in samples]))
        laid_out = [[self._laid_out(job, next(returned)) for job in samples] for samples in jobs]
        texts = self.ids_of([text for samples in laid_out for sample in samples for text, special, _ in sample if not special])
        sequences, ends = Sequences(), [0]
        for samples in laid_out:
            for sample in samples:
                for ids, weight in self._runs(sample, texts):
                    sequences.add(ids, weight)
                sequences.end_sequence()
            ends.append(ends[-1] + len(samples))
        rendered = sequences.arrays(None)
        found = [rendered[begin:end] for begin, end in zip(ends, ends[1:])]
        self.counts.add_unrolled(found)
        return found

    def _runs(self, sample: list[Stretch], texts: dict[str, list[int]]) -> Iterator[tuple[list[int], float]]:
        """The ids of a sample, in runs of the same weight. texts: the ids of each text."""
        run, weight = [], 0.0
        for text, special, cuts in sample:
            ids = self.special_ids[text] if special else texts[text]
            at = 0
            for place, following in cuts:
                if place:  # a token that begins before the cut belongs to what stands before it
                    before = self._tokens_before(text, place, ids, texts)
                    run += ids[at:before]
                    at = before
                if following != weight:
                    yield run, weight
                    run, weight = [], following
            run += ids[at:] if at else ids
        yield run, weight

    def _tokens_before(self, text: str, place: int, ids: list[int], texts: dict[str, list[int]]) -> int:
        """How many of the ids of `text` begin before `place`."""
        before = text[:place]
        if before not in texts:
            texts[before] = self._encode([before])[0]
        count = len(texts[before])
        if ids[:count] == texts[before]:  # the same tokens: they hold just that text
            return count
        with of_texts(self.tokenizer, [text]):
            offsets = lossless.backend_of(self.tokenizer).encode(text, add_special_tokens=False).offsets
        return sum(begin < place for begin, _ in offsets)

    def ids_of(self, texts: list[str]) -> dict[str, list[int]]:
        """The ids of each different text."""
        texts = list(dict.fromkeys(texts))
        return dict(zip(texts, self._encode(texts)))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, in which special tokens are ordinary characters."""
        return lossless.encoded(self.tokenizer, texts) if texts else []

    # ---- one conversation

    def _jobs_of(self, number: int, conversation: Conversation) -> list[Job]:
        """The samples that a conversation makes."""
        self.seen = self.number = number
        with suppress(Refused):
            return self._jobs(conversation)
        return []

    def _laid_out(self, job: Job, text: str | None) -> list[Stretch]:
        with suppress(Refused):
            return [] if text is None else self._lay_out(job, text)
        return []

    def _jobs(self, conversation: Conversation) -> list[Job]:
        messages, tools = conversation
        if tools or any(len(message) > 2 or self.control.is_suspect(message["content"]) for message in messages):
            if self.control.holds([*messages, *tools], but=frozenset() if self.rendering.allow_special else self.as_tokens):
                self.counts.special.add(self.number)
            messages, tools = self.control.hide(messages), self.control.hide(tools)
        messages = unlearned_results(messages)
        if any("spans" in message for message in messages):
            self.counts.results.add(self.number)
        wanted = self.rendering.wanted(messages)
        if not wanted:
            self.counts.skipped.add(self.number)
            return []
        try:
            samples = self._samples(messages, tools, wanted)
        except NotLearnable as error:
            self._refuse(f"the model's chat template cannot be learned from: {error}", CHANGE_TEMPLATE)
        self._count(samples)
        return [Job(self.number, messages[: sample.length], tools, sample) for sample in samples]

    def _render(self, jobs: list[Job]) -> list[str | None]:
        """What the template returns for each, None where it fails. One call for all those without tools takes half the time."""
        found: dict[int, str] = {}
        plain = [place for place, job in enumerate(jobs) if not job.tools]
        if plain:
            try:
                found = dict(zip(plain, self.apply([jobs[place].messages for place in plain], None)))
            except UserError:  # a limit, which every call would reach
                raise
            except FAILURES:  # which one it was, a call for each will say
                pass
        return [found[place] if place in found else self._of_job(job) for place, job in enumerate(jobs)]

    def _of_job(self, job: Job) -> str | None:
        self.number = job.number
        with suppress(Refused):
            return self._template(job.messages, job.tools)

    def _samples(self, messages: list[dict], tools: list[dict], wanted: list[int]) -> list[Sample]:
        """The samples that teach the wanted answers, by the shape of the conversation."""
        with_marks, marked_tools, marks = marked(messages, tools)
        shape = tuple(map(skeleton, with_marks)), tuple(wanted), bool(tools)
        if shape not in self._shapes:
            if len(self._shapes) == SHAPES:
                self._shapes.clear()
            conversing = self._conversing(with_marks, marked_tools)
            # "last" has said already what is wanted
            multi_turn = "as_is" if self.rendering.multi_turn == "as_is" else "unroll"
            samples = conversing.samples(wanted, multi_turn, self.rendering.empty_thoughts == "learn")
            self._check_places(conversing, samples, marks)
            frames = self._frames(conversing, samples, marks)
            if marked_tools or any("tool_calls" in message for message in with_marks):
                *other, other_marks = marked(messages, tools, other=True)
                other_way = self._conversing(*other)
                self._check_places(other_way, samples, other_marks)
                frames = [common(*both) for both in zip(frames, self._frames(other_way, samples, other_marks))]
            self._shapes[shape] = [self._with_frames(sample, own, marks) for sample, own in zip(samples, frames)]
        return self._shapes[shape]

    def _with_frames(self, sample: Sample, frames, marks: list[Mark]) -> Sample:
        texts = zip(texts_of(marks, sample.length), frames)
        hidden = {mark.message for mark, frame in texts if mark.kind == "thoughts" and frame is None}
        learned = [each._replace(forgotten=each.message in hidden) for each in sample.learned]
        if self.rendering.multi_turn != "as_is" and any(each.forgotten for each in learned):
            raise NotLearnable("it leaves out thoughts where they are to be learned")
        return Sample(sample.length, learned, tuple(frames))

    def _conversing(self, messages: list[dict], tools: list[dict]) -> Conversing:
        return Conversing(self._template, messages, tools, self.headers, self._rules)

    def _frames(self, conversing: Conversing, samples: list[Sample], marks: list[Mark]) -> list[list]:
        """Sample.frames of each."""
        return [frames_of(conversing.laid_out(each.length)[0], marks, each.length, self.control) for each in samples]

    def _check_places(self, conversing: Conversing, samples: list[Sample], marks: list[Mark]) -> None:
        """Has the template a place for everything that is to be learned, or to be learned from?"""
        shown = "".join(conversing.laid_out(sample.length)[0] for sample in samples)
        length = max(sample.length for sample in samples)
        learned = {each.message for sample in samples for each in sample.learned}
        for text, number, kind in marks:
            left_out = number is not None and number >= length
            left_out |= kind == "thoughts" and (number not in learned or self.rendering.multi_turn == "as_is")
            if kind in PLACES and text not in shown and not left_out:
                what, remedy = PLACES[kind]
                self._refuse(f"the model's chat template has no place for {what}", remedy)

    def _template(self, messages: list[dict], tools: list[dict] | None, **settings) -> str:
        """The conversation as text."""
        try:
            return self.apply([messages], tools, **settings)[0]
        except UserError:  # a limit
            raise
        except FAILURES as error:
            said = " ".join(str(error).split()) or type(error).__name__
            self._refuse(f"the model's chat template fails on it ({said})", CHANGE, error)

    def apply(self, conversations: list[list[dict]], tools: list[dict] | None, **settings) -> list[str]:
        """What the template returns for each conversation."""
        plain = [[{key: m[key] for key in TO_TEMPLATE if key in m} for m in messages] for messages in conversations]
        with of_template(self.tokenizer, len(plain)):
            return self.tokenizer.apply_chat_template(plain, tools=tools or None, tokenize=False, **settings)

    def _refuse(self, what: str, remedy: str, cause: Exception | None = None):
        if self.number == 0:  # no conversation yet: the template itself is asked
            raise UserError(f"{self.tokenizer.name_or_path}: {what} - {remedy}") from cause
        self.problems.refuse(self.number, f"{what} - {remedy}", cause)

    def _lay_out(self, job: Job, text: str) -> list[Stretch]:
        """A sample's stretches of text. text: what the template returned."""
        self.number, messages, _, sample = job
        try:
            places = self.headers.find(text, sum(message["role"] == "assistant" for message in messages))
        except NotLearnable as error:
            self._refuse(f"the model's chat template cannot be learned from: {error}", CHANGE_TEMPLATE)
        found, cuts = self._find_texts(messages, sample, text, places), []
        for learned in sample.learned:
            begin, end = places[learned.answer]
            if not text.startswith(learned.prompt, begin):
                what = f"the model's chat template begins the answer in message {learned.message + 1} in a way of its own"
                self._refuse(what, CHANGE)
            weight = messages[learned.message].get("weight", 1.0)
            cuts += [(begin + len(learned.prompt), weight), (end, 0.0)]
            for first, behind, own in messages[learned.message].get("spans", ()):
                for at, place, length in found[learned.message]:  # the span's share of each text that is shown
                    ends = max(first, at), min(behind, at + length)
                    if ends[0] < ends[1]:
                        cuts += [(ends[0] - at + place, own or 0.0), (ends[1] - at + place, weight)]
        return list(self.stretches(text, sorted(cuts, key=lambda cut: cut[0])))

    def _find_texts(self, messages: list[dict], sample: Sample, text: str, places: list[tuple[int, int]]) -> list[list]:
        """Finds every text in what the template returned: of each message, (place in its content, place in `text`, length)."""
        at, found, earliest = 0, [[] for _ in messages], self._earliest(messages, places)
        for part, frame in zip(parts_of(messages), sample.frames, strict=True):
            at = max(at, earliest[part.message])
            if frame is None and part.kind == "thoughts":
                continue
            before, behind = frame or ("", "")
            place = -1 if frame is None else text.find(before, at)
            place += len(before)
            form = None if place < len(before) else trimmed(part.text, text, place, behind)
            if form is None:
                self._refuse(f"the model's chat template drops or changes {shown(messages, part, self.control)}", CHANGE)
            # newlines around thoughts are the template's
            if form != part.text and (part.kind == "text" or form.strip("\n") != part.text.strip("\n")):
                self.counts.trimmed.add(self.number)
            if part.at is not None:
                found[part.message].append((part.at + part.text.index(form), place, len(form)))
            at = place + len(form)
        return found

    def _earliest(self, messages: list[dict], places: list[tuple[int, int]]) -> list[int]:
        """Where each message can begin, at the earliest."""
        found, at, answers = [], 0, iter(places)
        for message in messages:
            if message["role"] == "assistant":
                begin, end = next(answers)
                found.append(begin - len(self.headers.text))
                at = end
            else:
                found.append(at)
        return found

    def stretches(self, text: str, cuts: list[tuple[int, float]]) -> Iterator[Stretch]:
        """What stands between two control tokens in one piece, with the cuts that fall into it."""
        piece, own = "", []  # the piece so far; its cuts
        cuts = iter([*cuts, (len(text) + 1, 0.0)])
        place, weight = next(cuts)
        for begin, end, part, whose in self.control.split(text):
            special = whose == "frame" or whose == "data" and part in self.as_tokens
            if special and piece:
                yield piece, False, own
                piece, own = "", []
            while place <= begin or (not special and place < end):
                own.append((len(piece) + max(place - begin, 0), weight))
                place, weight = next(cuts)
            if special:
                yield part, True, own
                own = []
            else:
                piece += part
        if piece:
            yield piece, False, own

    def prompt_ids(self, messages: list[dict], tools: list[dict], **settings) -> list[int]:
        text = self._template(self.control.hide(messages), self.control.hide(tools), add_generation_prompt=True, **settings)
        if not text:
            self._refuse("the model's chat template lays out nothing", CHANGE_TEMPLATE)
        stretches = list(self.stretches(text, []))
        ids = self.ids_of([part for part, special, _ in stretches if not special])
        return [index for part, special, _ in stretches for index in (self.special_ids[part] if special else ids[part])]

    # ---- notes

    def _count(self, samples: list[Sample]) -> None:
        learned: list[Learned] = [each for sample in samples for each in sample.learned]
        if any(each.forgotten for each in learned):
            self.counts.forgotten.add(self.number)
        self.counts.emptied += sum(each.emptied for each in learned)
        self.counts.answers += len(learned)

    def notes(self) -> list[str]:
        """A line for each thing worth knowing."""
        return self.counts.lines(self.rendering, "one for each answer that the chat template shows differently later")


def prompt_ids(tokenizer, messages: list[dict], tools: list[dict], rendering: Rendering, **settings) -> list[int]:
    """The prompt for the next answer, as samples are laid out: special tokens that people have written are text."""
    return ChatTemplate(tokenizer, "", rendering).prompt_ids(messages, tools, **settings)


def shown(messages: list[dict], part: Part, control: ControlText) -> str:
    """A part in words."""
    text = " ".join(control.restore(part.text).split())
    text = text if len(text) <= 40 else text[:39] + "…"
    return f'the {part.kind} of message {part.message + 1}, by {messages[part.message]["role"]} ("{text}")'
