"""Arrow's tables: parquet, .arrow files, folders that `datasets` saved (save_to_disk). Read in batches of rows."""

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, note

BATCH_ROWS = 256
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
STATE, SPLITS = "state.json", "dataset_dict.json"


def without_null(row: dict) -> dict:
    """A column that a row leaves out reads null there."""
    return {key: value for key, value in row.items() if value is not None}


def rows_of(path: str, files: list[str]) -> Iterator[tuple[int, dict]]:
    """(bytes read so far, row) of the files of one data set. path: as the user gave it, for messages."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    done = 0
    for file in files:
        size = Path(file).stat().st_size
        with open(file, "rb") as opened:
            magic = opened.read(8)
        kind = "parquet" if magic.startswith(PARQUET) else "Arrow"
        try:
            for share, batch in _parquet(pyarrow, file) if kind == "parquet" else _arrow(pyarrow, file, magic):
                for row in batch.to_pylist():
                    yield done + int(size * share), without_null(row)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: broken {kind} file: {error}") from error
        done += size


def _parquet(pyarrow, file: str) -> Iterator:
    """(share of the file that is read, batch)."""
    with pyarrow.parquet.ParquetFile(file) as table:
        every, read = max(table.metadata.num_rows, 1), 0
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            read += batch.num_rows
            yield read / every, batch


def _arrow(pyarrow, file: str, magic: bytes) -> Iterator:
    with pyarrow.memory_map(file) as source:
        if magic.startswith(ARROW_FILE):
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            for begin in range(0, batch.num_rows, BATCH_ROWS):
                yield 0.5, batch.slice(begin, BATCH_ROWS)


def saved_files(folder: str, flag: str) -> list[str] | None:
    """The files of a folder that `datasets` saved, in order; None for another folder. Of several splits, train."""
    place = Path(folder)
    if (place / SPLITS).is_file():
        splits = _json(place / SPLITS).get("splits", [])
        if splits != ["train"] and len(splits) != 1 and "train" not in splits:
            choices = ", ".join(f"{folder.rstrip('/')}/{split}" for split in splits)
            raise UserError(f"{flag} {folder}: is a data set of several splits; give one of them: {choices}")
        chosen = "train" if "train" in splits else splits[0]
        if len(splits) > 1:
            note(f"{flag} {folder}: has the splits {', '.join(splits)}; taken is {chosen}")
        place = place / chosen
    if not (place / STATE).is_file():
        return None
    names = [entry.get("filename") for entry in _json(place / STATE).get("_data_files", [])]
    missing = [name for name in names if not (place / str(name)).is_file()]
    if missing or not names:
        raise UserError(f"{flag} {folder}: {', '.join(map(str, missing)) or 'data files'} missing; was the copy cut short?")
    return [str(place / name) for name in names]


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save the data set again") from error
    return found if isinstance(found, dict) else {}
