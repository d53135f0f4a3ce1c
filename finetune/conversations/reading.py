"""Reads and validates a file of conversations: all that is wrong with it at once, each kind with its places and one remedy.

Samples and turns are counted from 1. sample_reader.py finds the form of each sample and reads its turns (turns.py), calls and results
are put together (tool_turns.py), then their order is checked (order.py); what is allowed but worth a line is counted in
data_notes.py. Which forms there are is said in forms.py, which keys mean something in keys.py.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..data_files.sample_files import SampleFile
from ..errors import UserError, on_first_rank
from .data_notes import counted
from .file_findings import quoted
from .messages import Conversation
from .sample_reader import SampleReader, named

BEGINNING_BYTES = 8 << 20  # a tenth to half a second of work
MOST_BAD = 100_000  # samples; behind them a file is not read on: it says the same, seconds later
MANY = 0.5  # the share of bad samples from which on dropping them is no small matter


class Entry(NamedTuple):
    """One sample of a file: its number and line (None in a table), what the file holds, and what was read of it.

    conversation: None where the sample is left out; reasons: why.
    """

    number: int
    line: int | None
    sample: object
    conversation: Conversation | None
    reasons: list[str]


class Conversations:
    """The conversations of one validated file. Iterating reads the file again, so that no more than one is in memory.

    len() is their number; each is a messages.Conversation. notes: lines to print. prompts: int64, a hash of the prompt of each, the
    same on every machine. system: the system text that all of them have; None where they have none, or several. dropping: whether bad samples are left out; then broken_lines has those that are no JSON: (line, message,
    text).
    """

    def __init__(self, file: SampleFile, notes: list[str], prompts: np.ndarray, system: str | None, dropping: bool, broken_lines: list):
        self.file, self.count, self.notes, self.prompts, self.system = file, len(prompts), notes, prompts, system
        self.dropping, self.broken_lines = dropping, broken_lines

    @property
    def path(self) -> str:
        return self.file.path

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Conversation]:
        if self.dropping:
            yield from (entry.conversation for entry in self.entries() if entry.conversation is not None)
            return
        reader = SampleReader(self.path)
        for line, sample in self.file:
            yield reader.again(line, sample)

    def entries(self) -> Iterator[Entry]:
        """All samples of the file, those that are left out as well."""
        reader = SampleReader(self.path, self.dropping)
        for line, sample in samples_of(self.file, reader):
            if self.dropping:
                conversation = reader.read(line, sample)
                yield Entry(reader.found.number, line, sample, conversation, reader.found.reasons)
            else:
                yield Entry(reader.found.number + 1, line, sample, reader.again(line, sample), [])


def samples_of(file: SampleFile, reader: SampleReader) -> Iterator[tuple[int | None, object]]:
    """The samples of a file; where the reader drops what is bad, without lines that are no JSON."""
    return file.samples(broken_line=reader.broken_line if reader.drop else None)


def read(path: str | os.PathLike, *, flag: str = "--data_path", bad_samples: str = "error") -> Conversations:
    """Reads a whole file (see data/README.md for its forms) and checks every sample; holds none of them.

    flag: the option that named the file. bad_samples: "error", or "drop" to leave out what is wrong. Raises UserError with all
    findings, of which 20 kinds are spelt out.
    """
    file = SampleFile(path, flag)
    reader = SampleReader(file.path, drop=bad_samples == "drop")
    bar = {"desc": "checking data", "unit": "B", "unit_scale": True, "delay": 2, "disable": not on_first_rank()}
    bad = 0
    with tqdm(total=file.bytes, **bar) as progress:
        try:
            for line, sample in samples_of(file, reader):
                bad += reader.turns_of(line, sample) is None
                if bad == MOST_BAD and not reader.drop:
                    raise UserError(f"{file.path}: was not read on behind sample {reader.found.number:,}: {bad:,} are bad so far")
                if not reader.found.number % 256:
                    progress.update(file.position - progress.n)
        except UserError as error:  # broken JSON ends the reading; what was found before it counts too
            raise UserError(*reader.found.lines(), *error.findings) from None
    notes = finish(reader, file.layout, bad)
    noted = reader.noted
    return Conversations(file, notes + noted.lines(), noted.hashes(), noted.system(), reader.drop, reader.broken_lines)


def begins_well(path: str | os.PathLike, flag: str = "--data_path") -> bool:
    """Is nothing wrong with the first BEGINNING_BYTES of a file? read() tells what is.

    For a program that reads the file later, after what takes seconds: of a file of usual size it is all.
    """
    try:
        file = SampleFile(path, flag)
        reader = SampleReader(file.path)
        for line, sample in file:
            reader.turns_of(line, sample)
            if reader.found.count or file.position > BEGINNING_BYTES:
                return not reader.found.count
        finish(reader, file.layout, 0)
    except UserError:
        return False
    return True


def finish(reader: SampleReader, layout: str, bad: int) -> list[str]:
    """Raises the findings of a file that was read to its end, all together; where they are dropped, returns notes on them."""
    found = reader.found
    if not found.number and not reader.broken:
        raise UserError(f"{found.path}: no samples")
    if found.number == 1 and layout == "lines" and reader.nameless is not None:
        what = f"top level is an object with keys {quoted(reader.nameless)}"
        raise UserError(f"{found.path}: {what}; expected a list of samples")
    lines, mixed = found.lines(), []
    if len(reader.forms) > 1:
        firsts = ", ".join(f"{named(*form)} (first: sample {number})" for form, number in reader.forms.items())
        mixed = [f"mixes forms: {firsts}"]
    if not reader.drop:
        if mixed or lines:
            raise UserError(*(f"{found.path}: {line}; keep one form per file" for line in mixed), *lines)
        return []
    if reader.broken:
        _, message, _ = reader.broken_lines[0]
        lines.append(f"{found.path}: {reader.broken:,} line{'s' * (reader.broken > 1)} that cannot be read (first: {message})")
    if not reader.noted.prompts:
        raise UserError(*lines)
    if not lines:
        return mixed
    left_out, every = bad + reader.broken, found.number + reader.broken
    loud = "MORE THAN HALF: " if left_out > MANY * every else ""
    head = f"{loud}{left_out:,} of {counted(every)} left out (--bad_samples drop)"
    return [*mixed, head, *(f"left out: {line.removeprefix(f'{found.path}: ')}" for line in lines)]
