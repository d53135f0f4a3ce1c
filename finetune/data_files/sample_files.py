"""From a file to raw samples, one at a time: a JSON list, JSON lines or parquet, told apart by content, not by name.

A JSON file is read through a sliding window, so that a file of any size takes the memory of its largest sample.
"""

import codecs
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

CHUNK_BYTES = 1 << 20
MAX_SAMPLE_CHARS = 1 << 28  # a larger one is a whole corpus in one piece; the window would grow with it
TOO_LARGE = (
    f"this sample has more than {MAX_SAMPLE_CHARS >> 20} million characters; one sample should be one conversation"
)
TWICE = object()  # a JSON object that names a key twice holds that key here: json alone would drop the first value
PACKED = {
    b"\x1f\x8b": "gunzip",
    b"PK\x03\x04": "unzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
}
EXACT_DIGITS = 600  # of an integer; a float ends at 309
BLANK = re.compile(r"[ \t\n\r]*")  # JSON's blanks: U+2028 and the like are text, also in JSON lines


class SampleFile:
    """A file of samples. Iterating yields (line, value): the line a sample starts on (None in parquet), what it holds.

    path: as the user gave it; it heads every message. flag: the option that named it.
    .layout: "list", "lines" or "parquet". .bytes: the file's size. .position: bytes read so far.
    Raises UserError for a file that is missing, empty, unreadable, packed or of another kind; iterating also for broken
    JSON.
    """

    def __init__(self, path: str | os.PathLike, flag: str = "--data_path"):
        self.path, self.position = str(path), 0
        head = _head(self.path, flag)
        _refuse_other_kinds(self.path, head)
        self.stamp = _stamp(self.path)
        self.bytes = self.stamp[0]
        self.layout = _layout(self.path, head)

    def __iter__(self) -> Iterator[tuple[int | None, object]]:
        return self.samples()

    def samples(self, broken_line=None) -> Iterator[tuple[int | None, object]]:
        """As iterating. broken_line(line, message, text): called for a line of JSON lines that is no JSON, which is then passed over;
        without it such a line is an error."""
        rows = self._parquet() if self.layout == "parquet" else self._json(broken_line)
        try:
            yield from rows
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raises UserError if the file is not the one that was opened."""
        if _stamp(self.path) != self.stamp:
            raise UserError(f"{self.path}: changed while it was read; start again once it stays as it is")

    def _json(self, broken_line) -> Iterator[tuple[int, object]]:
        in_list, number = self.layout == "list", 0
        with open(self.path, "rb") as file:
            text = _Window(self.path, file)
            if in_list:
                text.peek()
                text.pos += 1
            while char := text.peek():
                if in_list and char == "]":
                    if number:
                        raise text.error(number, "a comma after the last sample; remove it")
                    break
                number += 1
                self.position = text.bytes_read
                line, begin = text.line(), text.pos
                try:
                    if not in_list and char not in "{[":
                        raise text.error(number, f'one JSON object per line expected, found "{char}"')
                    value = text.value(number)
                except UserError as error:
                    if in_list or broken_line is None:
                        raise
                    number -= 1
                    broken_line(line, error.findings[0], text.rest_of_line(begin))
                    continue
                yield line, value
                if in_list and (char := text.peek()) != ",":
                    break
                text.pos += in_list
            if in_list:
                _end_of_list(text, number)

    def _parquet(self) -> Iterator[tuple[None, dict]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{self.path}: reading parquet needs pyarrow: pip install pyarrow") from None
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=256):
                    self.position += self.bytes * batch.num_rows // max(file.metadata.num_rows, 1)
                    for row in batch.to_pylist():  # a column that a row leaves out reads null there
                        yield None, {key: value for key, value in row.items() if value is not None}
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.path}: broken parquet file: {error}") from error


def _end_of_list(text: "_Window", number: int) -> None:
    char = text.peek()
    if not char:
        raise text.error(number, "the file ends before the list does; was the copy cut short?")
    if char != "]":
        raise text.error(number, f'expected "," or "]" after the sample, found "{char}"')
    text.pos += 1
    if text.peek():
        raise text.error(number, "more text after the end of the list; put everything into one list")


class _Window:
    """The part of a text file that is being parsed: grows until a whole value fits, slides on behind it."""

    def __init__(self, path: str, file):
        self.path, self.file, self.bytes_read = path, file, 0
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.decode = DECODER.raw_decode
        self.buffer, self.pos = "", 0
        self.lines_before, self.chars_before = 0, 0  # lines, and chars of the current line, that have slid out
        self.counted, self.newlines = 0, 0  # newlines in buffer[:counted]

    def fill(self) -> bool:
        """Reads on; False at the end. At least as much as is still unparsed: a long sample is tried O(log) times."""
        unread = len(self.buffer) - self.pos
        chunk = self.file.read(max(CHUNK_BYTES, unread))
        try:
            text = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(_encoding_message(self.path, error, self.bytes_read + len(chunk))) from None
        if not chunk:
            return False
        self.bytes_read += len(chunk)
        line_start = self.buffer.rfind("\n", 0, self.pos) + 1
        self.chars_before = self.pos - line_start + (0 if line_start else self.chars_before)
        self.lines_before += self._newlines_to(self.pos)
        self.buffer, self.pos, self.counted, self.newlines = self.buffer[self.pos :] + text, 0, 0, 0
        return True

    def peek(self) -> str:
        """The next character that is not blank, "" at the end of the file."""
        while True:
            self.pos = BLANK.match(self.buffer, self.pos).end()
            if self.pos < len(self.buffer):
                return self.buffer[self.pos]
            if not self.fill():
                return ""

    def value(self, number: int) -> object:
        """Parses the value that starts here and moves behind it."""
        while True:
            try:
                value, end = self.decode(self.buffer, self.pos)
            except json.JSONDecodeError as error:
                # a value that the window cuts off fails within a word of the window's end, or in an open string
                open_string = error.msg.startswith("Unterminated")
                may_be_cut = open_string or error.pos >= len(self.buffer) - 16
                if may_be_cut and len(self.buffer) - self.pos > MAX_SAMPLE_CHARS:
                    raise self.error(number, TOO_LARGE) from None
                if may_be_cut and self.fill():
                    continue
                if open_string or error.pos >= len(self.buffer.rstrip()):
                    raise self.error(number, "the file ends inside this sample; was the copy cut short?") from None
                raise self.error(number, f"{error.msg} - repair it there", error.pos) from None
            except RecursionError:
                raise self.error(number, "nested too deeply for a conversation") from None
            if end < len(self.buffer) or not self.fill():  # a number could go on behind the window's end
                self.pos = end
                return value

    def rest_of_line(self, begin: int) -> str:
        """The text from `begin`, where a value could not be read, to the end of its line; moves behind it."""
        self.pos = begin
        while (end := self.buffer.find("\n", self.pos)) < 0 and self.fill():
            pass
        end = len(self.buffer) if end < 0 else end
        rest, self.pos = self.buffer[self.pos : end], end
        return rest

    def _newlines_to(self, pos: int) -> int:
        if pos < self.counted:
            return self.buffer.count("\n", 0, pos)
        self.newlines += self.buffer.count("\n", self.counted, pos)
        self.counted = pos
        return self.newlines

    def line(self) -> int:
        """The line of the current position, counted from 1."""
        return self.lines_before + self._newlines_to(self.pos) + 1

    def error(self, number: int, message: str, pos: int | None = None) -> UserError:
        pos = self.pos if pos is None else pos
        line_start = self.buffer.rfind("\n", 0, pos) + 1
        line = self.lines_before + self.buffer.count("\n", 0, pos) + 1
        column = pos - line_start + 1 + (0 if line_start else self.chars_before)
        near = " ".join(self.buffer[max(line_start, pos - 20) : pos + 20].split())
        shown = f", here: {near}" if near else ""
        return UserError(f"{self.path}: line {line}, column {column}, near sample {max(number, 1)}: {message}{shown}")


def _object(pairs: list[tuple]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set()
        value[TWICE] = next(key for key, _ in pairs if key in seen or seen.add(key))
    return value


def _integer(digits: str) -> int | float:
    """Exact up to EXACT_DIGITS. int() takes quadratic time and refuses what is longer than sys.get_int_max_str_digits(),
    which is never below 640; float() takes linear time and gives infinity, which is refused where it would be learned."""
    return int(digits) if len(digits) <= EXACT_DIGITS else float(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)  # for all JSON that a file holds, in strings, too


def _stamp(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change, by which a changed file is known; (0, 0) if it is gone."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except OSError:
        return 0, 0


def _head(path: str, flag: str) -> bytes:
    """The first bytes of the file; a UserError where there are none."""
    if not os.path.exists(path):
        remedy = "your training JSON with -d" if flag == "--data_path" else f"an existing file with {flag}"
        raise UserError(f"{flag} {path}: no such file. Give {remedy}.")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: is a folder or a device; give one file (.json, .jsonl or .parquet)")
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from error


def _refuse_other_kinds(path: str, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{path}: is a git-lfs pointer ({os.path.getsize(path)} bytes), not the data: run git lfs pull")
    for magic, program in PACKED.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is a packed file; unpack it first: {program} {shlex.quote(path)}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(_not_utf8(path, "UTF-16"))
    if head[:2] in (b"[\0", b"{\0", b"\0[", b"\0{"):
        raise UserError(_not_utf8(path, "UTF-16BE" if head[0] == 0 else "UTF-16LE"))


def _layout(path: str, head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if not text and os.path.getsize(path) > len(head):  # a page of blanks in front
        with open(path, "rb") as file:
            text = next((part for line in file if (part := line.strip())), b"")
    if not text:
        raise UserError(f"{path}: no samples (the file is empty)")
    if text[:1] not in b"[{":
        shown = text[:20].decode("utf-8", "replace").splitlines()[0]
        expected = 'expected a JSON list ("[") or one JSON object per line ("{")'
        raise UserError(f"{path}: {expected}, found {json.dumps(shown, ensure_ascii=False)}")
    return "list" if text[:1] == b"[" and not _lists_by_line(path) else "lines"


def _lists_by_line(path: str) -> bool:
    """Whether each line is a list by itself, of turns perhaps: the first two are whole."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = (line.strip()[:CHUNK_BYTES] for line in file if line.strip())
        return all(line.startswith("[") and _is_list(line) for line in (next(lines, ""), next(lines, "")))


def _is_list(text: str) -> bool:
    try:
        return isinstance(DECODER.decode(text), list)
    except (ValueError, RecursionError):
        return False


def _not_utf8(path: str, encoding: str) -> str:
    new = Path(path).with_suffix(f".utf8{Path(path).suffix}")
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {shlex.quote(str(new))}"
    return f"{path}: not UTF-8 (looks like {encoding}): {command}"


def _encoding_message(path: str, error: UnicodeDecodeError, bytes_read: int) -> str:
    """Guesses the encoding from what surrounds the first byte that is not UTF-8. bytes_read: where its data ended."""
    data = error.object
    around = data[max(0, error.start - 2000) : error.start + 2000]
    text = around.decode("utf-8", "replace")
    wrong, right = text.count("\ufffd"), sum(char > "\x7f" for char in text if char != "\ufffd")
    if right < 9 * wrong and _is_gb18030(data[error.start :]):
        return _not_utf8(path, "GB18030")
    offset = bytes_read - len(data) + error.start
    remedy = f"iconv -c -f UTF-8 -t UTF-8 {shlex.quote(path)} drops such bytes"
    return f"{path}: byte {offset:,} (0x{data[error.start]:02x}) is not UTF-8; repair it ({remedy})"


def _is_gb18030(data: bytes) -> bool:
    """True if the text from here on decodes as GB18030; a character cut in two at the end is no objection."""
    try:
        codecs.getincrementaldecoder("gb18030")().decode(data)
        return True
    except UnicodeDecodeError:
        return False
