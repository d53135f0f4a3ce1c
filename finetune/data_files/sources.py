"""What -d names: files, shares of files, folders of files."""

import os
import re
from typing import NamedTuple

from ..errors import UserError, note
from . import arrow

SHARE = re.compile(r"(.+):(\d*\.?\d+(?:[eE]-?\d+)?)")


class Source(NamedTuple):
    """One file (or whatever SampleFile reads). share: of its conversations, above 0 and at most 1. flag: the option that named it."""

    path: str
    share: float
    flag: str

    def __str__(self) -> str:
        return self.path if self.share == 1 else f"{self.path}:{self.share:g}"


def sources_of(words: list[str], flag: str) -> list[Source]:
    """words: FILE, FOLDER or FILE:SHARE each; a path that exists is a path. Raises UserError for shares that are none."""
    found, findings = [], []
    for word in words:
        path, share = word, 1.0
        match = None if os.path.exists(word) else SHARE.fullmatch(word)
        if match:
            path, share = match[1], float(match[2])
            if not 0 < share <= 1:
                findings.append(f"{flag} {word}: {match[2]} is no share of a file - give one above 0 and up to 1, as {path}:0.3")
        try:
            found += [Source(each, share, flag) for each in expand(path, flag)]
        except UserError as error:
            findings += error.findings
    if findings:
        raise UserError(*findings)
    once = {os.path.realpath(source.path): source for source in reversed(found)}
    for source in found:
        if once[os.path.realpath(source.path)] is not source:
            note(f"{flag} {source.path}: is named twice, and taken once")
    return [source for source in found if once[os.path.realpath(source.path)] is source]


def not_there(words: list[str]) -> list[str]:
    """Of FILE, FOLDER and FILE:SHARE, the paths at which there is nothing."""
    paths = [word if os.path.exists(word) or not (match := SHARE.fullmatch(word)) else match[1] for word in words]
    return [path for path in paths if not os.path.exists(path)]


PASSED_OVER = (".md", ".txt", ".yaml", ".yml", ".py", ".sh", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".lock", ".log", ".license")


def expand(path: str, flag: str) -> list[str]:
    """A folder of data files becomes its files, in order of their names, those of folders in it as well; every other path is itself.

    Hidden files and such as hold no data (README.md, pictures) are passed over, and a note names them.
    """
    if not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, name)) for name in (arrow.STATE, arrow.SPLITS)):
        return [path]
    found, passed_over = [], []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                holds_none = name.lower().endswith(PASSED_OVER) or "." not in name
                (passed_over if holds_none else found).append(os.path.join(folder, name))
    if passed_over:
        shown = ", ".join(os.path.relpath(each, path) for each in passed_over[:6]) + ", ..." * (len(passed_over) > 6)
        note(f"{flag} {path}: passed over {shown}")
    if not found:
        raise UserError(f"{flag} {path}: is a folder without data files; give one with .json, .jsonl, .csv, .parquet or the like")
    return found
