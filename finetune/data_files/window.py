"""The text of a JSON file through a sliding window, so that a file of any size takes the memory of its largest sample."""

import codecs
import json
import re

from ..errors import UserError
from .encodings import encoding_message, printable

CHUNK_BYTES = 1 << 20
MAX_SAMPLE_CHARS = 1 << 28  # a larger one is a whole corpus in one piece; the window would grow with it
TOO_LARGE = f"this sample has more than {MAX_SAMPLE_CHARS >> 20} million characters; one sample should be one conversation"
TWICE = object()  # a JSON object that names a key twice holds that key here: json alone would drop the first value
EXACT_DIGITS = 600  # of an integer; a float ends at 309
BLANK = re.compile(r"[ \t\n\r]*")  # JSON's blanks: U+2028 and the like are text, also in JSON lines


class Window:
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
            raise UserError(encoding_message(self.path, error, self.bytes_read + len(chunk))) from None
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
        near = printable(" ".join(self.buffer[max(line_start, pos - 20) : pos + 20].split()))
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
