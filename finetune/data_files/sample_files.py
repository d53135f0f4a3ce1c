"""From a path to raw samples, one at a time. What a file is, its content decides, not its name.

JSON is read through a sliding window (window.py), tables by rows (tables.py, arrow.py), packed files through their unpacker (packed.py).
"""

import codecs
import difflib
import functools
import hashlib
import json
import os
from collections.abc import Iterator

from ..errors import UserError
from . import arrow, hub_data, packed, tables
from .encodings import not_utf8, readable
from .window import CHUNK_BYTES, DECODER, Window

HEAD_BYTES = 4096
LFS = b"version https://git-lfs.github.com/spec/"
EXPECTED = 'expected JSON ("[" or "{"), or a table with a header such as instruction,output'


class SampleFile:
    """A source of samples: a file, a folder that `datasets` saved, or a data set of the Hugging Face Hub.

    Iterating yields (line, value): the line a sample starts on (None where there are no lines), what it holds.
    path: as the user gave it; it heads every message. flag: the option that named it.
    .layout: "list", "lines", "table" or "arrow". .bytes: size on disk. .position: bytes read so far.
    Raises UserError for what is missing, empty, unreadable or of another kind; iterating also for broken content.
    """

    def __init__(self, path: str | os.PathLike, flag: str = "--data_path"):
        self.path, self.separator, self._hash = str(path), "", None
        self._read, self._raw = 0, None  # bytes read, or the file at hand that knows
        self.files = self._files(flag)
        self.layout = self._layout(flag)
        self.stamps = [_stamp(file) for file in self.files]
        self.bytes = sum(size for size, _ in self.stamps)

    def _files(self, flag: str) -> list[str]:
        """What is read: the file itself, or those of a data set."""
        if os.path.isdir(self.path):
            files = arrow.saved_files(self.path, flag)
            if files is None:
                raise UserError(f"{flag} {self.path}: is a folder; give its files")
            return files
        if hub_data.is_id(self.path):
            files, self._hash = hub_data.files_of(self.path, flag)
            return files
        if not os.path.exists(self.path):
            raise UserError(f"{flag} {self.path}: no such file. Give an existing one with {flag}.{_close_to(self.path)}")
        if not os.path.isfile(self.path):
            raise UserError(f"{flag} {self.path}: is no file but a device or a pipe, and the data are read twice; write them into a file")
        return [self.path]

    def _layout(self, flag: str) -> str:
        if self.files != [self.path]:
            return "arrow"
        head = self._head(flag)
        if head.startswith((arrow.PARQUET, arrow.ARROW_FILE, arrow.ARROW_STREAM)):
            return "arrow"
        _refuse_other_kinds(self.path, head)
        text = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
        if not text:  # a page of blanks in front
            text = self._after_blanks()
        if not text:
            raise UserError(f"{self.path}: no samples (the file is empty)")
        if text[:1] == b"[":
            return "lines" if self._has_lists_by_line() else "list"
        if text[:1] == b"{":
            return "lines"
        if separator := tables.separator_of(text):
            self.separator = separator
            return "table"
        raise UserError(f"{self.path}: {EXPECTED}, found {json.dumps(readable(text), ensure_ascii=False)}")

    def _head(self, flag: str) -> bytes:
        """The first bytes, unpacked."""
        try:
            raw, stream = packed.opened(self.path)
        except OSError as error:
            raise UserError(f"{flag} {self.path}: cannot be read ({error.strerror})") from error
        with raw:
            try:
                return stream.read(HEAD_BYTES)
            except packed.DAMAGED as error:
                raise packed.damaged(self.path, error) from error

    def _after_blanks(self) -> bytes:
        with self._opened() as (_, stream):
            return next((part for line in stream if (part := line.strip())), b"")

    def _has_lists_by_line(self) -> bool:
        """Whether each line is a list by itself, of turns perhaps: the first two are whole, within 2 x CHUNK_BYTES."""
        with self._opened() as (_, stream):
            lines = [line for part in _begin(stream, 2 * CHUNK_BYTES).split(b"\n") if (line := part.strip())][:2]
        return len(lines) == 2 and all(line.endswith(b"]") and _is_list(line.decode("utf-8-sig", "replace")) for line in lines)

    def _opened(self):
        return _Opened(self.path)

    # ---- reading

    def __iter__(self) -> Iterator[tuple[int | None, object]]:
        return self.samples()

    def samples(self, broken_line=None) -> Iterator[tuple[int | None, object]]:
        """As iterating. broken_line(line, message, text): called for a line of JSON lines that is no JSON, or a row of a table that has
        too many cells, which is then passed over; without it such a line is an error."""
        try:
            if self.layout == "arrow":
                for self._read, row in arrow.rows_of(self.path, self.files):
                    yield None, row
            else:
                with self._opened() as (self._raw, stream):
                    yield from self._rows(stream, broken_line) if self.layout == "table" else self._json(stream, broken_line)
                    self._read, self._raw = self._raw.tell(), None
        except UserError:
            raise
        except packed.DAMAGED as error:
            if isinstance(error, OSError) and error.strerror:
                raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
            raise packed.damaged(self.path, error) from error
        self.check_unchanged()

    @property
    def position(self) -> int:
        """Bytes read so far, of those on disk."""
        return self._read if self._raw is None or self._raw.closed else self._raw.tell()

    def _rows(self, stream, broken_line):
        return tables.rows_of(self.path, stream, self.separator, broken_line)

    def _json(self, stream, broken_line) -> Iterator[tuple[int, object]]:
        in_list, number = self.layout == "list", 0
        text = Window(self.path, stream)
        if in_list:
            text.peek()
            text.pos += 1
        while char := text.peek():
            if in_list and char == "]":
                if number:
                    raise text.error(number, "a comma after the last sample; remove it")
                break
            number += 1
            line, begin = text.line(), text.pos
            try:
                if not in_list and char not in "{[":
                    raise text.error(number, f'one JSON object per line expected, found "{char}"')
                value = text.value(number)
            except UserError as error:
                if in_list or broken_line is None:
                    raise
                number -= 1
                broken_line(line, error.findings[0].removeprefix(f"{self.path}: "), text.rest_of_line(begin))
                continue
            if number == 1 and not in_list and isinstance(value, dict) and not text.peek() and (rows := tables.unwrapped(value)):
                yield from ((None, row) for row in rows)
                return
            yield line, value
            if in_list and (char := text.peek()) != ",":
                break
            text.pos += in_list
        if in_list:
            _end_of_list(text, number)

    # ---- what it is known by

    def content_hash(self) -> str:
        """A hash of all bytes, by which the same content is known under any name."""
        if self._hash is None:
            digests = [_file_hash(file, *_stamp(file)) for file in self.files]
            self._hash = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return self._hash

    def check_unchanged(self) -> None:
        """Raises UserError if a file is not the one that was opened."""
        if [_stamp(file) for file in self.files] != self.stamps:
            raise UserError(f"{self.path}: changed while it was read; start again once it stays as it is")


class _Opened:
    """with _Opened(path) as (raw, stream): the file on disk, and what it holds unpacked."""

    def __init__(self, path: str):
        self.raw, self.stream = packed.opened(path)

    def __enter__(self):
        return self.raw, self.stream

    def __exit__(self, *error) -> None:
        self.raw.close()


def _begin(stream, size: int) -> bytes:
    """The first `size` bytes, or all. An unpacker may give fewer at a time than were asked for."""
    begin = b""
    while len(begin) < size and (chunk := stream.read(size - len(begin))):
        begin += chunk
    return begin


def _end_of_list(text: Window, number: int) -> None:
    char = text.peek()
    if not char:
        raise text.error(number, "the file ends before the list does; was the copy cut short?")
    if char != "]":
        raise text.error(number, f'expected "," or "]" after the sample, found "{char}"')
    text.pos += 1
    if text.peek():
        raise text.error(number, "more text after the end of the list; put everything into one list")


def _is_list(text: str) -> bool:
    try:
        return isinstance(DECODER.decode(text), list)
    except (ValueError, RecursionError):
        return False


def _close_to(path: str) -> str:
    """" Did you mean FILE?", for a file that is not there and has one of nearly its name beside it."""
    folder, name = os.path.split(path)
    try:
        files = [each for each in sorted(os.listdir(folder or ".")) if os.path.isfile(os.path.join(folder, each))]
    except OSError:
        return ""
    near = difflib.get_close_matches(name, files, 1, 0.75)
    return f" Did you mean {os.path.join(folder, near[0])}?" if near else ""


def _stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change, by which a changed file is known; (0, 0) if it is gone."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except OSError:
        return 0, 0


@functools.lru_cache(maxsize=1024)
def _file_hash(path: str, size: int, changed_ns: int) -> str:
    """SHA-256 of a file, read once for each of its stamps."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_other_kinds(path: str, head: bytes) -> None:
    if head.startswith(LFS):
        raise UserError(f"{path}: is a git-lfs pointer ({os.path.getsize(path)} bytes), not the data: run git lfs pull")
    if what := packed.what_else(path, head):
        raise UserError(f"{path}: {what}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(not_utf8(path, "UTF-16"))
    if head[:2] in (b"[\0", b"{\0", b"\0[", b"\0{"):
        raise UserError(not_utf8(path, "UTF-16BE" if head[0] == 0 else "UTF-16LE"))
