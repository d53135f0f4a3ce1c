"""Data sets of the Hugging Face Hub, by their id: OWNER/NAME, or OWNER/NAME:SPLIT. Through the library `datasets`."""

import os
import re

from ..errors import UserError, note

ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")
FILE_ENDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".bz2", ".xz", ".zip", ".py", ".yaml")


def is_id(name: str) -> bool:
    """Whether a name that is no path may be the id of a data set."""
    match = ID.fullmatch(name)
    return bool(match) and not os.path.exists(name) and not os.path.isdir(name.split("/")[0]) and not match[1].endswith(FILE_ENDS)


def files_of(name: str, flag: str) -> tuple[list[str], str]:
    """(Arrow files of a data set, its fingerprint); downloaded once, and kept where `datasets` keeps them.

    Of several splits, train. Raises UserError where the library or the data set is missing.
    """
    try:
        import datasets
    except ImportError:
        what = "no such file; as the id of a data set on the Hugging Face Hub it needs the library datasets"
        raise UserError(f"{flag} {name}: {what}: pip install datasets") from None
    identity, split = ID.fullmatch(name).groups()
    try:
        found = datasets.load_dataset(identity, split=split)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag} {name}: no such file, and no data set of the Hugging Face Hub that can be read ({reason})") from error
    if isinstance(found, dict):
        chosen = "train" if "train" in found else next(iter(found))
        if len(found) > 1:
            note(f"{flag} {name}: has the splits {', '.join(found)}; taken is {chosen} ({identity}:SPLIT for another)")
        found = found[chosen]
    return [entry["filename"] for entry in found.cache_files], found._fingerprint
