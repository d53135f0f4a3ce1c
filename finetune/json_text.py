"""JSON as it is written here, into files of every kind: no NaN and no Infinity, which are no JSON, and letters of all scripts as they are."""

import json
import math
import re
from pathlib import Path

SURROGATES = re.compile("[\ud800-\udfff]")


def finite(value):
    """The same where every number is one that JSON knows: nan and infinite ones become text."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value, indent: int | None = None, sort_keys: bool = False) -> str:
    """The text of a value, which UTF-8 can hold. TypeError for what JSON has no form for."""
    settings = {"indent": indent, "sort_keys": sort_keys, "allow_nan": False}
    text = json.dumps(finite(value), ensure_ascii=False, **settings)
    # half a pair of UTF-16, as a file's name or a cut text may have it, only an escape can write
    return json.dumps(finite(value), **settings) if SURROGATES.search(text) else text


def write(path: Path, value, indent: int | None = 2) -> None:
    """Writes a file of JSON, UTF-8, with a newline at its end."""
    path.write_text(dumps(value, indent) + "\n", encoding="utf-8")
