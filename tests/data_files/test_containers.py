"""Every container of samples, from a file made here to the same two conversations; and what is none, with its remedy followed."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from talks import write

from finetune.conversations.reading import read
from finetune.data_files import hub_data, sources
from finetune.data_files.sample_files import EXPECTED, SampleFile
from finetune.errors import UserError

ROWS = [{"instruction": "Say \"A\",\nplease", "output": "A"}, {"instruction": "说好", "output": "好；对", "system": "S"}]
TURNS = [
    [{"role": "user", "content": 'Say "A",\nplease'}, {"role": "assistant", "content": "A"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "说好"}, {"role": "assistant", "content": "好；对"}],
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
LIST = json.dumps(ROWS, indent=1).encode()


def csv_text(separator: str, *header: str, front: str = "") -> bytes:
    lines = [separator.join(header)]
    for row in ROWS:
        cells = [row.get(name.lower(), "") for name in header]
        lines.append(separator.join('"' + cell.replace('"', '""') + '"' if cell else "" for cell in cells))
    return (front + "\r\n".join(lines) + "\r\n\r\n").encode()


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def parquet(data) -> bytes:
    pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    out = io.BytesIO()
    write_table(Table.from_pylist(data), out)
    return out.getvalue()


def arrow(data, kind: str) -> bytes:
    pytest.importorskip("pyarrow")
    from pyarrow import BufferOutputStream, Table, ipc

    table, out = Table.from_pylist(data), BufferOutputStream()
    with getattr(ipc, f"new_{kind}")(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue().to_pybytes()


FULL = [{"instruction": row["instruction"], "output": row["output"], "system": row.get("system")} for row in ROWS]
COLUMNS = {name: [row[name] for row in FULL] for name in FULL[0]}
CONTAINERS = {
    "list": lambda: LIST,
    "lines": lambda: LINES,
    "lines with a byte-order mark": lambda: b"\xef\xbb\xbf" + LINES,
    "list, gz": lambda: gzip.compress(LIST),
    "lines, gz": lambda: gzip.compress(LINES),
    "lines, bz2": lambda: bz2.compress(LINES),
    "lines, xz": lambda: lzma.compress(LINES),
    "lines, zst": lambda: zstd(LINES),
    "csv": lambda: csv_text(",", "instruction", "output", "system"),
    "csv with a byte-order mark": lambda: csv_text(",", "Instruction", "Output", "System", front="\ufeff"),
    "csv, semicolons": lambda: csv_text(";", "id", "instruction", "output", "system"),
    "tsv": lambda: csv_text("\t", "output", "system", "instruction"),
    "csv, gz": lambda: gzip.compress(csv_text(",", "instruction", "output", "system")),
    "parquet": lambda: parquet(FULL),
    "arrow, stream": lambda: arrow(FULL, "stream"),
    "arrow, file": lambda: arrow(FULL, "file"),
    "columns of pandas": lambda: json.dumps({name: dict(zip("01", cells)) for name, cells in COLUMNS.items()}).encode(),
    "columns of lists": lambda: json.dumps(COLUMNS).encode(),
    "under data": lambda: json.dumps({"version": 1, "data": ROWS}).encode(),
    "rows of the Hub's viewer": lambda: json.dumps({"features": [], "rows": [{"row_idx": i, "row": row} for i, row in enumerate(FULL)]}).encode(),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_holds_the_same(tmp_path, name):
    path = write(tmp_path, CONTAINERS[name](), "any.name")
    conversations = read(path)
    assert [conversation.messages for conversation in conversations] == TURNS
    assert [conversation.messages for conversation in conversations] == TURNS  # again
    file = SampleFile(path)
    list(file)
    assert 0 < file.position <= file.bytes == path.stat().st_size and len(file.content_hash()) == 64


def test_one_object_is_one_sample(tmp_path):
    assert [conversation.messages for conversation in read(write(tmp_path, json.dumps(ROWS[0], indent=2)))] == TURNS[:1]
    for one in ({"messages": TURNS[0]}, {"id": ["a", "b"], "messages": TURNS[0]}, {"data": TURNS[0]}):
        assert [conversation.messages for conversation in read(write(tmp_path, one))] == TURNS[:1]


def test_lists_of_turns_by_line(tmp_path):
    path = write(tmp_path, "\n\n".join(json.dumps(turns) for turns in TURNS))
    assert [conversation.messages for conversation in read(path)] == TURNS
    assert [conversation.messages for conversation in read(write(tmp_path, TURNS))] == TURNS


def test_json_in_the_cells_of_a_table(tmp_path):
    cell = json.dumps(TURNS[1], ensure_ascii=False).replace('"', '""')
    path = write(tmp_path, f'id,messages\n1,"{cell}"\n')
    assert next(iter(read(path))).messages == TURNS[1]


# ---- folders, the Hub


def test_a_folder_is_its_files(tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jsonl", "more/a.json", "README.md", ".hidden.json", "LICENSE", "picture.PNG"):
        write(folder, LINES, name)
    found = sources.sources_of([str(folder)], "--data_path")
    assert [source.path for source in found] == [str(folder / "b.jsonl"), str(folder / "more/a.json")]
    assert capsys.readouterr().err == f"note: --data_path {folder}: passed over LICENSE, README.md, picture.PNG\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="is a folder without data files"):
        sources.sources_of([str(empty)], "--data_path")


def test_shares_and_names(tmp_path, capsys):
    path, odd = write(tmp_path, LINES), write(tmp_path, LINES, "talk.json:0.5")
    found = sources.sources_of([f"{path}:0.25", str(odd), str(path)], "-d")
    assert [(source.path, source.share) for source in found] == [(str(path), 0.25), (str(odd), 1)]
    assert capsys.readouterr().err == f"note: -d {path}: is named twice, and taken once\n"
    with pytest.raises(UserError) as caught:
        sources.sources_of([f"{path}:0", f"{path}:1.5"], "--data_path")
    assert [line.split(" - ")[0] for line in caught.value.findings] == [
        f"--data_path {path}:{share}: {share} is no share of a file" for share in ("0", "1.5")
    ]


def test_a_folder_that_datasets_saved(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(FULL)
    train.save_to_disk(str(tmp_path / "one"), num_shards=2)
    splits = datasets.DatasetDict({"test": train.select([0]), "train": train})
    splits.save_to_disk(str(tmp_path / "splits"))
    for name in ("one", "splits", "splits/train"):
        assert sources.sources_of([str(tmp_path / name)], "-d")[0].path == str(tmp_path / name)
        assert [conversation.messages for conversation in read(tmp_path / name)] == TURNS
    assert "has the splits test, train; taken is train" in capsys.readouterr().err
    datasets.DatasetDict({"a": train, "b": train}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UserError, match="is a data set of several splits; give one of them: .*/two/a, .*/two/b"):
        read(tmp_path / "two")
    for file in (tmp_path / "one").glob("data-00000*"):
        file.unlink()
    with pytest.raises(UserError, match="data-00000-of-00002.arrow missing; was the copy cut short"):
        read(tmp_path / "one")


def test_a_data_set_of_the_hub(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    file = write(tmp_path, LINES, "local.jsonl")
    local = datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path / "cache"))
    asked = []

    def load_dataset(identity, split=None):
        asked.append((identity, split))
        if identity == "no/where":
            raise ConnectionError("offline\nand more")
        return local[split] if split else local

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/name", "owner/name:train"):
        assert [conversation.messages for conversation in read(name)] == TURNS
    assert asked[0] == ("owner/name", None) and asked[-1] == ("owner/name", "train")
    assert SampleFile("owner/name").content_hash() == local["train"]._fingerprint
    with pytest.raises(UserError) as caught:
        read("no/where")
    assert str(caught.value).endswith("no data set of the Hugging Face Hub that can be read (offline)")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="owner/name: no such file; .* pip install datasets"):
        read("owner/name")
    assert not any(map(hub_data.is_id, ("nowhere.json", "a/b.jsonl", "a/b/c", "~/x", "./x", str(tmp_path))))


# ---- what is none


def office(inner: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(inner, "<xml/>")
    return out.getvalue()


NONE = {
    "excel": (lambda: office("xl/workbook.xml"), "is an Excel workbook; save the sheet as CSV (UTF-8)"),
    "word": (lambda: office("word/document.xml"), "is a Word document; write its questions and answers into a JSON file"),
    "torch": (lambda: office("archive/data.pkl"), "holds weights of torch, and no conversations"),
    "pickle": (lambda: b"\x80\x04\x95", "is a pickle (of Python or torch), which may run code when it is opened; save the data as JSON"),
    "pdf": (lambda: b"%PDF-1.7", "is a PDF document; write its questions and answers into a JSON file"),
    "sqlite": (lambda: b"SQLite format 3\0", "is an SQLite database; export the table as CSV"),
    "numpy": (lambda: b"\x93NUMPY\1", "is a numpy array, which holds no text; give the conversations that it was made from"),
    "web page": (
        lambda: b"\n<!DOCTYPE html>\n<html>", "is a web page, not data: the download failed, or needs a login (<!DOCTYPE html>)"),
    "prose": (lambda: b"# Title\n\nSome, text.", f'{EXPECTED}, found "# Title"'),
    "a table without a header": (lambda: b"hello,you\nyes,no\n", f'{EXPECTED}, found "hello,you"'),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_what_holds_no_samples_is_named(tmp_path, name):
    data, message = NONE[name]
    path = write(tmp_path, data())
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.findings == [f"{path}: {message}"]


def test_a_zip_archive_by_its_remedy(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("inner.json", LIST)
    path = write(tmp_path, out.getvalue(), "my talk.zip")
    with pytest.raises(UserError, match="is a zip archive; unpack it first: unzip ") as caught:
        read(path)
    command = str(caught.value).split("first: ")[1].replace("unzip", "python3 -m zipfile -e") + " ."
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert len(read(tmp_path / "inner.json")) == 2


@pytest.mark.parametrize("name", ["lines, gz", "lines, bz2", "lines, xz", "parquet", "arrow, file", "list, gz", "csv, gz"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_cut_short(tmp_path, name, share):
    data = CONTAINERS[name]()
    path = write(tmp_path, data[: int(len(data) * share)])
    with pytest.raises(UserError) as caught:
        read(path)
    assert len(caught.value.findings) == 1 and caught.value.findings[0].startswith(f"{path}: ")
    assert "damaged or cut short" in str(caught.value) or "broken" in str(caught.value)


def test_zstandard_is_needed_for_zst_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    path = write(tmp_path, b"\x28\xb5\x2f\xfd....")
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: reading .zst files needs zstandard: pip install zstandard"
    assert len(read(write(tmp_path, gzip.compress(LINES)))) == 2


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no file but a device or a pipe, and the data are read twice"):
        read(tmp_path / "pipe")


def test_rows_with_other_numbers_of_cells(tmp_path):
    path = write(tmp_path, 'question,answer\na,b\nc,d, e\nf,"g, h"\n')
    with pytest.raises(UserError) as caught:
        read(path)
    message = f"{path}: line 3: 3 cells where the header has 2; put texts with ',' or line ends into quotes"
    assert str(caught.value) == message
    path.write_text(path.read_text().replace("d, e", '"d, e"'))
    assert [conversation.messages[1]["content"] for conversation in read(path)] == ["b", "d, e", "g, h"]


FRENCH = "Le café était fermé, alors nous sommes allés à l'hôtel où l'été nous a été promis. Très tôt, déjà!"
GERMAN = "Für größere Übungen müssen wir die Äpfel schälen. Die Straße heißt Mühlenweg, schöne Grüße!"


@pytest.mark.parametrize("text", [FRENCH, GERMAN])
@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
def test_latin_text_is_not_taken_for_chinese(tmp_path, text, codec):
    data = json.dumps([{"instruction": text, "output": text}] * 30, ensure_ascii=False).encode(codec)
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, data))
    assert "GB18030" not in str(caught.value) and "is not UTF-8" in str(caught.value)


@pytest.mark.slow
def test_a_packed_file_takes_the_memory_of_its_samples(tmp_path):
    import sys

    path = tmp_path / "large.jsonl.gz"
    line = json.dumps({"instruction": "word " * 60, "output": "other " * 60}).encode() + b"\n"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100_000):  # 66 MB
            file.write(line)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from finetune.conversations.reading import read
from finetune.memory.peak_memory import resident_gb
before = resident_gb()
assert len(read({str(path)!r})) == 100_000
print((resident_gb() - before) * 1e3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40  # MB


@pytest.mark.parametrize("head", [b"question,answer\rwhy,so\r", b'question,"answer\n', b"prompt\0,output\n"], ids=repr)
def test_a_first_line_that_csv_cannot_read(tmp_path, head):
    """It is no table, or one with a broken line: a finding, never an exception of the csv module."""
    path = tmp_path / "odd.txt"
    path.write_bytes(head * 3)
    with pytest.raises(UserError):
        read(path)
