"""Packed files: what is read through its unpacker, and what is refused with the name of what it is. A table of first bytes each."""

import bz2
import gzip
import lzma
import shlex
import zipfile
import zlib
from collections.abc import Callable
from typing import BinaryIO

from ..errors import UserError
from .encodings import readable

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)


def _zstd(raw: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise UserError("reading .zst files needs zstandard: pip install zstandard") from None
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)


UNPACKERS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}
NOT_DATA = {  # first bytes -> what it is, and what to do
    b"%PDF": "is a PDF document; write its questions and answers into a JSON file",
    b"SQLite format 3\0": "is an SQLite database; export the table as CSV",
    b"\x93NUMPY": "is a numpy array, which holds no text; give the conversations that it was made from",
    b"\x80\x02": "is a pickle (of Python or torch), which may run code when it is opened; save the data as JSON",
    b"\x80\x03": "is a pickle (of Python or torch), which may run code when it is opened; save the data as JSON",
    b"\x80\x04": "is a pickle (of Python or torch), which may run code when it is opened; save the data as JSON",
    b"\x80\x05": "is a pickle (of Python or torch), which may run code when it is opened; save the data as JSON",
    b"\x89HDF": "is an HDF5 file; save the data as JSON",
    b"\x89PNG": "is a picture; give the conversations as text",
    b"\xff\xd8\xff": "is a picture; give the conversations as text",
    b"\xd0\xcf\x11\xe0": "is a document of an older Office; save it as CSV (UTF-8)",
}
IN_ZIP = {  # a file in a zip archive -> what that is
    "xl/workbook.xml": "is an Excel workbook; save the sheet as CSV (UTF-8)",
    "word/document.xml": "is a Word document; write its questions and answers into a JSON file",
    "data.pkl": "holds weights of torch, and no conversations",
}
WEB_PAGE = "is a web page, not data: the download failed, or needs a login"


def opened(path: str) -> tuple[BinaryIO, BinaryIO]:
    """(the file on disk, what it holds unpacked: the same where it is not packed)."""
    raw = open(path, "rb")
    magic = raw.read(8)
    raw.seek(0)
    for begin, unpack in UNPACKERS.items():
        if magic.startswith(begin):
            try:
                return raw, unpack(raw)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
    return raw, raw


def damaged(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: the packed file is damaged or cut short ({error}); copy it again")


def what_else(path: str, head: bytes) -> str | None:
    """What a file is that holds no samples, with what to do; None where it may hold some."""
    for begin, what in NOT_DATA.items():
        if head.startswith(begin):
            return what
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return f"{WEB_PAGE} ({readable(head.lstrip()[:80])})"
    return None


def _zip(path: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []
    for inner, what in IN_ZIP.items():
        if any(name == inner or name.endswith(f"/{inner}") for name in names):
            return what
    return f"is a zip archive; unpack it first: unzip {shlex.quote(path)}"
