"""A look as text: for a terminal of any width from 40 columns on, with colours where there is one."""

import os
import sys
import textwrap
from unicodedata import combining, east_asian_width

from .look import SHOWN_IN_TERMINAL, Bar, Look, Shown, Span

NAME = 11  # columns of a row's name
HEAD, FOOT = 4, 2  # lines of a long stretch that are shown
STRETCHES = 6  # of a sample that a run shows as it begins
LINE_END = "↵"  # of a line that ended in the stretch before
FULL = "█"
PARTS = " ▏▎▍▌▋▊▉"  # eighths of a column
COLOURS = {"learned": "\033[32m", "context": "\033[2m", "head": "\033[1m", "wrong": "\033[31m", "odd": "\033[33m"}
PLAIN = "\033[0m"


def has_colours(stream=None) -> bool:
    """Whether a stream (default: standard output) is a terminal that may be painted: https://no-color.org."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text_of(look: Look, width: int = 80, colours: bool = False) -> str:
    """The whole look, lines of at most `width` columns."""

    paint = painter(colours)

    def title(text: str, kind: str = "head") -> str:
        return paint(wrapped(text, width, "", "  "), kind)

    parts = [title(look.title), *(row(name, text, width) for name, text in look.rows)]
    parts += ["", title("How long the samples are, in tokens"), *bars(look.bars, width)]
    for shown in look.shown[:SHOWN_IN_TERMINAL]:
        parts += ["", title(heading(shown)), *sample(shown, width, paint)]
    if look.notes:
        parts += ["", title("Worth knowing"), *(bullet(note, width) for note in look.notes)]
    if look.findings:  # they come last, as errors
        parts += ["", title("A run would end here, for what is wrong; all above is of the samples that are good", "wrong")]
    return "\n".join(parts) + "\n"


def text_of_sample(shown: Shown, width: int, colours: bool = False) -> str:
    """One sample, the first stretches of it."""
    lines = [wrapped(heading(shown), width, "", "  "), *sample(shown._replace(spans=shown.spans[:STRETCHES]), width, painter(colours))]
    more = len(shown.spans) - STRETCHES
    return "\n".join([*lines, f"  ... {more} stretches more ..."] if more > 0 else lines)


def painter(colours: bool):
    """paint(text, kind of COLOURS)."""
    return lambda text, kind: f"{COLOURS[kind]}{text}{PLAIN}" if colours and text else text


def row(name: str, text: str, width: int) -> str:
    return wrapped(text, width, f"  {name:<{NAME}}", " " * (NAME + 2))


def bullet(text: str, width: int) -> str:
    return wrapped(text, width, "  - ", "    ")


def wrapped(text: str, width: int, first: str, others: str) -> str:
    """Paths and other long words are not broken: they are to be copied."""
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


# ---- lengths


def bars(found: list[Bar], width: int) -> list[str]:
    """One line a bar: its tokens, its length, its count."""
    most = max(bar.count for bar in found)
    digits = max(len(f"{bar.high:,}") for bar in found)
    counts = max(len(f"{bar.count:,}") for bar in found)
    room = max(10, width - 2 * digits - counts - 10)
    lines = []
    for bar in found:
        drawn = column(bar.count / most * room)
        lines.append(f"  {bar.low:>{digits},} - {bar.high:>{digits},}  {drawn} {bar.count:,}".rstrip())
    return lines


def column(length: float) -> str:
    """A bar of `length` columns, to an eighth; something wherever there is something."""
    whole, part = divmod(round(length * 8), 8)
    drawn = FULL * whole + PARTS[part].strip()
    return drawn or (PARTS[1] if length else "")


# ---- samples


def heading(shown: Shown) -> str:
    name = f", {shown.name}" if shown.name else ""
    return f"Sample {shown.number:,}{name}: {shown.tokens:,} tokens, {shown.learned:,} of them learned"


def sample(shown: Shown, width: int, paint) -> list[str]:
    """The stretches of a sample, each with what it is before its first line."""
    lines = []
    for span in shown.spans:
        kind = "learned" if span.learned else "context"
        edge = "┃" if span.learned else "│"
        for number, text in enumerate(lines_of(span, width - 13)):
            lines.append(f"  {kind if not number else '':<8} {edge} {paint(text, kind)}".rstrip())
    return lines


def lines_of(span: Span, width: int) -> list[str]:
    """The text of a stretch in lines; the middle of a long one is left out, and counted."""
    lines = []
    text = printable(span.text)
    begins = len(text) - len(text.lstrip("\n"))
    text = LINE_END * begins + ("\n" if begins < len(text) else "") * bool(begins) + text[begins:]  # else a line of nothing
    for line in text.removesuffix("\n").split("\n"):
        lines += pieces(line, width)
    if len(lines) > HEAD + FOOT + 1:
        lines[HEAD:-FOOT] = [f"... {len(lines) - HEAD - FOOT:,} lines more ..."]
    return lines


def pieces(line: str, width: int) -> list[str]:
    """The line in pieces of at most `width` columns, cut behind a blank where there is one. Chinese takes two columns a
    character, an accent of its own none."""
    found, begin, columns, blank = [], 0, 0, 0
    for at, char in enumerate(line):
        wide = 0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1
        if columns + wide > width:
            cut = blank if blank > begin else at
            found.append(line[begin:cut])
            begin, columns = cut, sum(2 if east_asian_width(other) in "WF" else 1 for other in line[cut:at])
        columns += wide
        if char == " ":
            blank = at + 1
    return [*found, line[begin:]]


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey; line ends stay."""
    return "".join(char if char == "\n" or char.isprintable() else escaped(char) for char in text)


def escaped(char: str) -> str:
    return "    " if char == "\t" else char.encode("unicode_escape").decode()
