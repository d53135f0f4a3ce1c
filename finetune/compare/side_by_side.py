"""Texts beside each other in a terminal, where Chinese characters are two columns wide."""

import shutil
import unicodedata

LEAST_WIDTH = 30  # of a column; where the terminal has less for each, texts stand one below another
GAP = "  "


def answers(questions: list[str], columns: list[list[str]], labels: str, width: int | None = None) -> str:
    """Each question, and below it the models' answers. columns: the answers of each model; labels: a letter for each."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    each = (width - 2 - len(GAP) * (len(columns) - 1)) // len(columns)
    blocks = []
    for i, question in enumerate(questions):
        texts, fits = [found[i] for found in columns], each >= LEAST_WIDTH
        cells = [labelled(label, one, each if fits else width - 2) for label, one in zip(labels, texts)]
        lines = beside(cells, each) if fits else [line for cell in cells for line in cell]
        blocks.append("\n".join(["", *wrapped(f"Q: {question}", width), *(f"  {line}".rstrip() for line in lines)]))
    return "\n".join(blocks)


def labelled(label: str, one: str, width: int) -> list[str]:
    """A text's lines, its label before the first."""
    lines = wrapped(one, width - len(label) - 2)
    return [f"{label if i == 0 else ' '}  {line}" for i, line in enumerate(lines)]


def beside(cells: list[list[str]], width: int) -> list[str]:
    """Cells of lines as columns of a width."""
    height = max(map(len, cells))
    rows = zip(*(lines + [""] * (height - len(lines)) for lines in cells))
    return [GAP.join(line + " " * (width - columns_of(line)) for line in row) for row in rows]


def wrapped(one: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at blanks where there is one, else anywhere."""
    lines = []
    for line in one.split("\n"):
        while columns_of(line) > width:
            end = fitting(line, width)
            blank = line.rfind(" ", 1, end + 1)
            end = blank if blank > 0 else end
            lines.append(line[:end])
            line = line[end:].removeprefix(" ")
        lines.append(line)
    return lines


def fitting(line: str, width: int) -> int:
    """How many characters fit into so many columns."""
    used = 0
    for i, character in enumerate(line):
        used += columns_of(character)
        if used > width:
            return max(i, 1)
    return len(line)


def columns_of(line: str) -> int:
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in line)
