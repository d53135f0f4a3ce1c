"""Text that is not UTF-8: which encoding it is in, and the command that converts it; and text of a file as messages show it."""

import codecs
import shlex
from pathlib import Path

SHOWN_CHARS = 40
# of Chinese prose, nearly all characters are among the first level of GB 2312, which are the common ones
COMMON = "gb2312", range(0xB0, 0xD8)
LEAST_COMMON = 0.6


def not_utf8(path: str, encoding: str) -> str:
    new = Path(path).with_suffix(f".utf8{Path(path).suffix}")
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {shlex.quote(str(new))}"
    return f"{path}: not UTF-8 (looks like {encoding}): {command}"


def encoding_message(path: str, error: UnicodeDecodeError, bytes_read: int) -> str:
    """Guesses the encoding from what surrounds the first byte that is not UTF-8. bytes_read: where its data ended."""
    data = error.object
    around = data[max(0, error.start - 2000) : error.start + 2000]
    text = around.decode("utf-8", "replace")
    wrong, right = text.count("\ufffd"), sum(char > "\x7f" for char in text if char != "\ufffd")
    if right < 9 * wrong and _is_gb18030(data[error.start :]):
        return not_utf8(path, "GB18030")
    offset = bytes_read - len(data) + error.start
    remedy = f"iconv -c -f UTF-8 -t UTF-8 {shlex.quote(path)} drops such bytes"
    return f"{path}: byte {offset:,} (0x{data[error.start]:02x}) is not UTF-8; repair it ({remedy})"


def _is_gb18030(data: bytes) -> bool:
    """Whether the text from here on is Chinese in GB18030: it decodes, and most of what is not ASCII are common characters.

    Latin-1 decodes as well, now and then, but into characters that hardly anybody uses. A character cut in two at the end is no
    objection.
    """
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(data[:4000])
    except UnicodeDecodeError:
        return False
    others = [char for char in text if char > "\x7f"]
    return sum(map(_is_common, others)) > LEAST_COMMON * len(others)


def _is_common(char: str) -> bool:
    """A common Chinese character, or its punctuation."""
    try:
        data = char.encode(COMMON[0])
    except UnicodeEncodeError:
        return False
    return data[0] in COMMON[1] or data[0] in (0xA1, 0xA3)


def readable(data: bytes) -> str:
    """The beginning of a text in whatever encoding, as a message shows it."""
    text = data.decode("utf-8", "replace")
    if "\ufffd" in text and _is_gb18030(data):
        text = data.decode("gb18030", "replace")
    lines = text.splitlines()
    return printable(lines[0][:SHOWN_CHARS]) if lines else ""


def printable(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
