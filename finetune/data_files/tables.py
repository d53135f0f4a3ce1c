"""Tables: CSV and TSV with a header, and pandas' column-wise JSON. A row is a dict of its cells, without those that are empty."""

import csv
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import UserError
from .encodings import encoding_message

SEPARATORS = "\t,;"
# a header has one of these: without, a text with commas would pass for a table
COLUMNS = frozenset(
    "messages conversations conversation instruction input output prompt response completion question answer query system text user "
    "assistant human bot history context chosen rejected problem solution".split()
)
INDEX = re.compile(r"\d+")
WRAPPERS = ("data", "train", "rows", "samples", "examples", "items", "records", "dataset")


def separator_of(head: bytes) -> str | None:
    """What separates the cells of a table with a header that is known; None for what is no such table."""
    line = head.split(b"\n", 1)[0].decode("utf-8-sig", "replace").strip("\r")
    for separator in sorted(SEPARATORS, key=line.count, reverse=True):
        try:
            names = [name.strip().lower() for name in next(csv.reader([line], delimiter=separator), [])]
        except csv.Error:  # a carriage return within, a field without end
            continue
        if len(names) > 1 and COLUMNS & set(names) and all(len(name) <= 60 for name in names):
            return separator
    return None


def rows_of(path: str, stream: BinaryIO, separator: str, broken_line) -> Iterator[tuple[int, dict]]:
    """(line, row) of a CSV file. broken_line: as in SampleFile.samples()."""
    csv.field_size_limit(1 << 28)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=separator)
    try:
        header = [name.strip() for name in next(reader)]
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if not any(cells):
                continue
            if len(cells) > len(header) or len(cells) < 2:
                message = f"line {line}: {len(cells)} cells where the header has {len(header)}; put texts with {separator!r} or line ends into quotes"
                if broken_line is None:
                    raise UserError(f"{path}: {message}")
                broken_line(line, message, separator.join(cells))
                continue
            yield line, {name: cell for name, cell in zip(header, cells) if cell.strip() and name}
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}; repair it there") from error
    except UnicodeDecodeError as error:
        raise UserError(encoding_message(path, error, 0)) from None
    finally:
        text.detach()


def unwrapped(value: dict) -> list | None:
    """The samples of a file that is a single object: pandas' columns, or a list under a key that says so; None for one sample."""
    columns = _columns(value)
    if columns is not None:
        return columns
    lists = [key for key in WRAPPERS if isinstance(value.get(key), list) and value[key]]
    if len(lists) != 1 or not all(isinstance(each, dict) for each in value[lists[0]]):
        return None
    rows = value[lists[0]]
    if all(set(row) >= {"row"} and isinstance(row["row"], dict) for row in rows):  # the Hub's viewer
        return [row["row"] for row in rows]
    return None if any(map(_is_turn, rows)) else rows


def _is_turn(value: object) -> bool:
    """Whether a value is a turn of a conversation, so that a list of such is one sample."""
    return isinstance(value, dict) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value))


def _columns(value: dict) -> list[dict] | None:
    """Rows of {"a": {"0": x, "1": y}, ...} or of {"a": [x, y], "b": [z, w]}."""
    cells = list(value.values())
    if not cells or not all(isinstance(key, str) for key in value):
        return None
    if all(isinstance(each, dict) and each and all(isinstance(key, str) and INDEX.fullmatch(key) for key in each) for each in cells):
        indices = list(cells[0])
        return [{name: column[index] for name, column in value.items() if column.get(index) is not None} for index in indices]
    lists = all(isinstance(each, list) and each for each in cells) and not any(_is_turn(each[0]) for each in cells)
    if lists and len({len(each) for each in cells}) == 1:
        if len(cells) > 1 or all(isinstance(each, list) for each in cells[0]):
            return [{name: column[row] for name, column in value.items() if column[row] is not None} for row in range(len(cells[0]))]
    return None
