"""What happened to conversations on their way to ids: counted while they are rendered, told in one line each."""

from dataclasses import dataclass, field

from ..conversations.data_notes import Seen, counted
from .rendering import Rendering


@dataclass
class Counts:
    """Which samples something concerns; and numbers of answers, samples and tokens."""

    special: Seen = field(default_factory=Seen)  # special-token text
    results: Seen = field(default_factory=Seen)  # results inside answers of plain text
    skipped: Seen = field(default_factory=Seen)  # nothing of them is learned
    forgotten: Seen = field(default_factory=Seen)  # thoughts that the template leaves out
    trimmed: Seen = field(default_factory=Seen)
    can_skip: bool = True  # can the model be asked for an answer without thoughts?
    emptied: int = 0  # answers behind an empty block of thoughts
    answers: int = 0
    unrolled: int = 0  # conversations
    into: int = 0  # samples that they make
    tokens: int = 0  # of these
    longest: int = 0  # of the longest sample of each, together

    def add_unrolled(self, rendered: list[list]) -> None:
        """rendered: the samples of each conversation."""
        for samples in rendered:
            if len(samples) > 1:
                lengths = [len(sample.ids) for sample in samples]
                self.unrolled += 1
                self.into += len(samples)
                self.tokens += sum(lengths)
                self.longest += max(lengths)

    def without_thoughts(self, rendering: Rendering) -> bool:
        """Whether every answer is learned behind an empty block of thoughts."""
        return self.can_skip and 0 < self.answers == self.emptied and rendering.empty_thoughts == "context"

    def lines(self, rendering: Rendering, why_unrolled: str) -> list[str]:
        """One line for each thing there is to know."""
        lines = []
        if self.special.samples:
            stays = "it is encoded as plain text. --allow_special to change"
            what = "it becomes control tokens" if rendering.allow_special else stays
            contain = "contains" if self.special.samples == 1 else "contain"
            lines.append(f"{counted(self.special.samples)} {contain} special-token text (first: {self.special.first}); {what}")
        if self.unrolled:
            what = f"{self.unrolled:,} conversation{'s' * (self.unrolled > 1)} unrolled into {self.into:,} samples, {why_unrolled}"
            lines.append(f"{what} ({self.tokens / self.longest:.1f} times the tokens); --multi_turn last or as_is to change")
        if self.forgotten.samples:
            what = f"thoughts before an answer that is not the last (first: {self.forgotten.first})"
            lines.append(f"{counted(self.forgotten.samples)} with {what}: the model's chat template leaves them out")
        if self.skipped.samples:
            lines.append(f"{counted(self.skipped.samples)} left out whose last answer is not to be learned (first: {self.skipped.first})")
        if self.emptied:
            learn = rendering.empty_thoughts == "learn"
            done = "learned" if learn else "context, not learned (--empty_thoughts learn to change)"
            what = f"{self.emptied:,} of {self.answers:,} answers have no thoughts"
            asked = "" if self.can_skip else "; this model always thinks when it is asked"
            lines.append(f"{what}: the empty block of thoughts that the template adds is {done}{asked}")
        if self.results.samples:
            lines.append(f"{counted(self.results.samples)} with ReAct answers: the results in them (Observation) are not learned")
        if self.trimmed.samples:
            what = f"blanks or newlines around a text (first: {self.trimmed.first})"
            lines.append(f"{counted(self.trimmed.samples)} with {what}: the model's chat template trims them")
        return lines
