"""What lays out conversations for a tokenizer: first-generation Qwen's ChatML, or the chat template of a later Qwen."""

from contextlib import suppress

from ..conversations.messages import Conversation
from .chat_template import ChatTemplate
from .control_text import ControlText
from .render_notes import Counts
from .rendering import PROBE, Problems, Refused, Rendering, identity_of, unlearned_results

NO_THOUGHTS = (
    'the thoughts of an answer ("reasoning_content") have no place in first-generation Qwen\'s format - '
    "remove them, or train a later Qwen"
)

REACT = "first-generation Qwen's tools are text (ReAct), one call after the other, each with its result: change that message"
TOOLS_IN_TEXT = (
    "tools are called, but they are listed only in the system turn's text: first-generation Qwen has a form of its own for them (ReAct) - list "
    'them in "tools" beside the turns, and take them out of the system turn'
)


def renderer_of(tokenizer, path: str = "", rendering: Rendering = Rendering(), dropping: bool = False):
    """What lays out conversations for this tokenizer. path: of the file they come from, for messages; dropping: see Problems.

    It has render_batch(conversations, numbers), which returns the samples of each, chatml.Rendered; numbers: of the conversations in
    their file, left out where they are counted. supervised_frame, ids that are supervised without being content; end_id, the one that
    ends an answer; problems, of what could not be rendered; notes(), lines about what was rendered so far; identity(), text that tells it apart.
    """
    kind = ChatML if hasattr(tokenizer, "encode_ordinary") else ChatTemplate
    renderer = kind(tokenizer, path, rendering)
    renderer.problems.dropping = dropping
    return renderer


class ChatML:
    """First-generation Qwen's format, which has no template: qwen_model/chatml.py, and react.py where there are tools."""

    def __init__(self, tokenizer, path: str = "", rendering: Rendering = Rendering()):
        self.tokenizer, self.path, self.rendering, self.number = tokenizer, path, rendering, 0
        self.end_id = tokenizer.im_end_id
        self.supervised_frame = {tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.encode_ordinary("\n")}
        self.control = ControlText(list(getattr(tokenizer, "special_tokens", {})))
        self.as_tokens = rendering.tokens_in_text([])
        self.problems, self.counts = Problems(path), Counts()

    def render_batch(self, conversations: list[Conversation], numbers: list[int] | None = None) -> list[list]:
        """The samples of each conversation; none of those that the format has no place for: problems.raise_if_any() names them."""
        from qwen_model import chatml  # reading data does without torch until it is rendered

        numbers = numbers or range(self.number + 1, self.number + 1 + len(conversations))
        laid_out = [self._lay_out(number, conversation) for number, conversation in zip(numbers, conversations)]
        settings = {"supervise": self.rendering.supervise, "allow_special": self.rendering.allow_special}
        if self.rendering.train_tokens:
            settings["as_tokens"] = self.as_tokens
        flat = iter(chatml.render_batch(self.tokenizer, [each for samples in laid_out for each in samples], **settings))
        rendered = [[next(flat) for _ in samples] for samples in laid_out]
        self.counts.add_unrolled(rendered)
        return rendered

    def _lay_out(self, number: int, conversation: Conversation) -> list[list[dict]]:
        """ChatML's messages of each sample that a conversation makes."""
        self.number = number
        with suppress(Refused):
            return self._samples(*conversation)
        return []

    def _samples(self, messages: list[dict], tools: list[dict]) -> list[list[dict]]:
        if self.control.holds([*messages, *tools], but=self.as_tokens):
            self.counts.special.add(self.number)
        wanted = self.rendering.wanted(messages)
        if not wanted:
            self.counts.skipped.add(self.number)
            return []
        if tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            return self._react(messages, tools, wanted)
        if any("reasoning_content" in message for message in messages):
            self.problems.refuse(self.number, NO_THOUGHTS)
        marked = unlearned_results(messages)
        if any("spans" in message for message in marked):
            self.counts.results.add(self.number)
        return [only(marked, wanted)]

    def _react(self, messages: list[dict], tools: list[dict], wanted: list[int]) -> list[list[dict]]:
        """With tools: what is being asked carries the instruction, and no earlier question, so each answer has its own sample."""
        from qwen_model import react

        if not tools:
            self.problems.refuse(self.number, TOOLS_IN_TEXT)
        messages = only(messages, wanted)
        each = [messages] if self.rendering.multi_turn == "as_is" else react.by_question(messages)
        try:
            samples = [react.render(messages, tools) for messages in each]
        except ValueError as error:
            self.problems.refuse(self.number, f"{error} - {REACT}", error)
        return samples

    def notes(self) -> list[str]:
        """A line for each thing worth knowing."""
        return self.counts.lines(self.rendering, "each with the tools in the question that is answered")

    def identity(self) -> str:
        tokenizer = self.tokenizer
        special = [tokenizer.im_start_id, tokenizer.im_end_id, *sorted(getattr(tokenizer, "special_tokens", {}).items())]
        return identity_of(special, tokenizer.encode_ordinary(PROBE))


def only(messages: list[dict], learned: list[int]) -> list[dict]:
    """The messages, of which the other answers are context."""
    others = {number for number, message in enumerate(messages) if message["role"] == "assistant"}.difference(learned)
    return [message | {"weight": 0.0} if number in others else message for number, message in enumerate(messages)]
