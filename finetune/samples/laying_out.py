"""From the conversations of a file to its samples: rendered, brought to their length, written; and what is left out."""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..conversations.data_notes import counted
from ..conversations.reading import Conversations, Entry
from ..errors import UserError, on_first_rank
from . import lossless
from .long_samples import LongSamples, parts_of
from .renderers import renderer_of
from .rendering import Rendering
from .sample_store import Writer

BATCH_CHARS, BATCH_SAMPLES = 1 << 20, 2048  # of one tokenizer call: enough for its threads, little enough for memory


def lay_out(
    conversations: Conversations, tokenizer, folder: Path, *, max_length: int, long_samples: str, bad_samples: str, rendering: Rendering
) -> None:
    """Writes the samples of conversations into folder."""
    assert conversations.dropping == (bad_samples == "drop")
    job = _LayingOut(conversations, tokenizer, max_length, long_samples, rendering)
    bar = {"desc": "rendering data", "unit": " samples", "delay": 2, "disable": not on_first_rank()}
    with Writer(folder) as writer, tqdm(total=len(conversations), **bar) as progress:
        for batch in batches(conversations.entries()):
            job.write(batch, writer)
            progress.update(len(batch))
        for line, message, text in conversations.broken_lines:
            writer.leave_out({"sample": None, "line": line, "reasons": [message], "content": text})
    job.finish(writer)


def batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Groups samples by the amount of text."""
    batch, chars = [], 0
    for entry in entries:
        batch.append(entry)
        chars += sum(len(message["content"]) for message in entry.conversation.messages) if entry.conversation else 0
        if chars >= BATCH_CHARS or len(batch) >= BATCH_SAMPLES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _LayingOut:
    """Renders one file. dropped: numbers of the conversations that are left out here, with the reason."""

    def __init__(self, conversations: Conversations, tokenizer, max_length: int, long_samples: str, rendering: Rendering):
        self.conversations, self.rendering, self.max_length = conversations, rendering, max_length
        self.renderer = renderer_of(tokenizer, conversations.path, rendering, dropping=conversations.dropping)
        self.measuring = None  # a second renderer, which counts for nobody
        self.new_renderer = lambda: renderer_of(tokenizer, conversations.path, rendering, dropping=True)
        self.long = LongSamples(long_samples, max_length, self.renderer.supervised_frame, self.renderer.end_id)
        self.unseen = {token: tokenizer.convert_tokens_to_ids(token) for token in rendering.train_tokens}
        self.read = self.dropped = 0  # conversations that were good to read, and of these left out

    def write(self, batch: list[Entry], writer: Writer) -> None:
        """Renders and writes a batch of samples of the file."""
        good = [entry for entry in batch if entry.conversation is not None]
        looked_at = [entry.conversation.messages for entry in good[: lossless.LOOKED_AT]]
        lossless.check(self.renderer.tokenizer, [message["content"] for messages in looked_at for message in messages])
        rendered = self.renderer.render_batch([entry.conversation for entry in good], [entry.number for entry in good])
        found = {entry.number: samples for entry, samples in zip(good, rendered)}
        for entry in batch:
            if entry.conversation is None:
                self.leave_out(entry, entry.reasons, writer)
                continue
            prompt = self.conversations.prompts[self.read]
            self.read += 1
            samples = self.of_one(entry, found[entry.number])
            if self.conversations.dropping and (reason := self.why_not(entry)):
                self.dropped += 1
                self.leave_out(entry, [reason], writer)
                continue
            for sample in samples:
                writer.add(*sample, entry.number, prompt)
                self.unseen = {token: index for token, index in self.unseen.items() if index not in sample.ids}

    def of_one(self, entry: Entry, samples: list) -> list:
        """The samples of a conversation, within the limit."""
        if self.long.way == "split" and any(len(sample.ids) > self.max_length for sample in samples):
            samples = self.split(entry, samples)
        return self.long.settle(entry.number, samples)

    def split(self, entry: Entry, samples: list) -> list:
        """The samples of the parts of a long conversation."""
        self.measuring = self.measuring or self.new_renderer()

        def lengths_of(conversations) -> list[int]:
            return [max((len(sample.ids) for sample in each), default=0) for each in self.measuring.render_batch(conversations)]

        parts = parts_of(entry.conversation, lengths_of, self.max_length)
        if self.rendering.multi_turn == "last":
            parts = parts[-1:]
        if len(parts) < 2 and parts == [entry.conversation]:
            return samples
        rendered = self.measuring.render_batch(parts, [entry.number] * len(parts))
        found = [sample for samples in rendered for sample in samples]
        self.long.split[0] += 1
        self.long.split[1] += len(found)
        return found

    def why_not(self, entry: Entry) -> str:
        """Why a conversation that was read is left out all the same; "" where it is not."""
        if self.long.unanswered and self.long.unanswered[-1] == entry.number:
            self.long.unanswered.pop()
            return f"no answer token within {self.max_length:,}"
        return self.renderer.problems.reasons.get(entry.number, "")

    @staticmethod
    def leave_out(entry: Entry, reasons: list[str], writer: Writer) -> None:
        writer.leave_out({"sample": entry.number, "line": entry.line, "reasons": reasons, "content": entry.sample})

    def finish(self, writer: Writer) -> None:
        """Raises what is wrong with the whole; writes what is known at the end."""
        conversations, renderer, path = self.conversations, self.renderer, self.conversations.path
        notes = list(conversations.notes)
        if conversations.dropping:
            notes += [f"left out: {line}" for line in renderer.problems.lines()]
            if self.dropped and not writer.lengths:
                raise UserError(*(f"{path}: {line}" for line in renderer.problems.lines()), f"{path}: no good sample is left")
            if self.dropped:
                notes.append(f"{self.dropped:,} of {counted(self.read)} left out that cannot be laid out for this model (--bad_samples drop)")
        else:
            renderer.problems.raise_if_any()
        self.long.check(len(writer.lengths), self.read, path)
        notes += renderer.notes() + self.long.notes()
        notes += [f"--train_tokens {token}: stands in no conversation, so its row learns nothing from them" for token in self.unseen]
        meta = {"system": conversations.system}
        writer.finish(meta | {"notes": notes, "without_thoughts": renderer.counts.without_thoughts(self.rendering)})
