"""Files of every kind: JSON lists, JSON lines, parquet, other encodings, broken ones, large ones."""

import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from talks import GOOD, TALK, findings, turns, write

from finetune.conversations.reading import read
from finetune.data_files import window
from finetune.data_files.sample_files import EXPECTED
from finetune.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \r\n"])
@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl", "talk"])
def test_json_lines_by_content(tmp_path, name, between, end):
    sample = json.dumps({"messages": TALK}, ensure_ascii=False)
    path = write(tmp_path, sample + between + sample.replace("Hello", "Bye") + between + sample + end, name)
    other = [TALK[0], {"role": "assistant", "content": "Bye"}, *TALK[2:]]
    assert [conversation.messages for conversation in read(path)] == [TALK, other, TALK]


@pytest.mark.parametrize("data", [GOOD, [GOOD]])
@pytest.mark.parametrize("front", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n", b"\n" * 5000])
def test_single_object_byte_order_mark_and_blanks_in_front(tmp_path, data, front):
    conversations = read(write(tmp_path, front + json.dumps(data).encode()))
    [conversation] = conversations
    assert conversation.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_parquet(tmp_path):
    """Over several row groups; what a row leaves out is null in its columns."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    answers = [{"from": "assistant", "value": "a", "train": False}, *({"from": "assistant", "value": f"a{i}"} for i in range(1, 700))]
    rows = [
        {"system": None, "conversations": [{"from": "user", "value": f"q{i}"}, answers[i]], "messages": None}
        for i in range(700)
    ]
    rows[0]["conversations"] += [{"from": "user", "value": "and"}, {"from": "assistant", "value": "b"}]
    rows[6]["system"] = "S"
    parquet.write_table(Table.from_pylist(rows), tmp_path / "talk.json", row_group_size=100)
    conversations = read(tmp_path / "talk.json")
    first, *rest = (conversation.messages for conversation in conversations)
    assert first[:2] == [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a", "weight": 0.0}]
    assert first[3] == {"role": "assistant", "content": "b"}
    assert rest[5][0] == {"role": "system", "content": "S"}
    assert rest[698] == [{"role": "user", "content": "q699"}, {"role": "assistant", "content": "a699"}]
    system = "a system text, the commonest in 1 sample, none in 699 samples: the model answers as trained when it is asked with the one that fits (finetune.ask --system)"
    assert len(conversations) == 700 and conversations.notes == [system]
    rows[300]["conversations"][1] = {"from": "assistant", "value": None}
    parquet.write_table(Table.from_pylist(rows), tmp_path / "talk.json", row_group_size=100)
    assert findings(tmp_path / "talk.json") == ['sample 301 turn 2: "value" must be a string, found null']


def test_parquet_without_pyarrow_and_broken(tmp_path, monkeypatch):
    path = write(tmp_path, b"PAR1 and no more")
    assert findings(path)[0].startswith("broken parquet file: ")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert findings(path) == ["reading parquet needs pyarrow: pip install pyarrow"]


# ---- files that are none


def test_missing_file_and_folder(tmp_path):
    missing = tmp_path / "path_to_data"
    with pytest.raises(UserError) as caught:
        read(missing)
    assert str(caught.value) == f"--data_path {missing}: no such file. Give an existing one with --data_path."
    with pytest.raises(UserError) as caught:
        read(missing, flag="--eval_data_path")
    assert str(caught.value) == f"--eval_data_path {missing}: no such file. Give an existing one with --eval_data_path."
    (tmp_path / "path_to_data.json").write_text("[]")
    with pytest.raises(UserError, match=f"Did you mean {missing}.json\\?"):
        read(missing)
    with pytest.raises(UserError, match="is a folder; give its files"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no samples (the file is empty)"),
        (b" \n" * 3000, "no samples (the file is empty)"),
        (b"[ ]", "no samples"),
        (
            b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
            "is a git-lfs pointer (50 bytes), not the data: run git lfs pull",
        ),
        (b"<html>\n", "is a web page, not data: the download failed, or needs a login (<html>)"),
        (b"Hello, world.\n", f'{EXPECTED}, found "Hello, world."'),
        ("你好，世界。今天天气很好。\n".encode("gbk"), f'{EXPECTED}, found "你好，世界。今天天气很好。"'),
        (b"\x1b[31mred\n", f'{EXPECTED}, found "\\\\x1b[31mred"'),
        (
            b'{"data": [], "version": 1}',
            'top level is an object with keys "data", "version"; expected a list of samples',
        ),
    ],
)
def test_other_content(tmp_path, data, message):
    assert findings(write(tmp_path, data)) == [message]


CHINESE = json.dumps([turns(("user", "今天天气怎么样，适合出门吗"), ("assistant", "很好。"))] * 40, ensure_ascii=False)


@pytest.mark.parametrize(
    ("codec", "named"),
    [
        ("gb18030", "GB18030"),
        ("gbk", "GB18030"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
    ],
)
def test_other_encodings_and_the_command_that_repairs_them(tmp_path, codec, named):
    path = write(tmp_path, CHINESE.encode(codec), "小 talk.json")
    [message] = findings(path)
    new = tmp_path / "小 talk.utf8.json"
    command = f"iconv -f {named} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"
    assert message == f"not UTF-8 (looks like {named}): {command}"
    if shutil.which("iconv"):
        subprocess.run(["bash", "-c", command], check=True)
        assert len(read(new)) == 40


@pytest.mark.parametrize("front", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("at", [30, 2500])
def test_damaged_byte(tmp_path, at, front, monkeypatch):
    monkeypatch.setattr(window, "CHUNK_BYTES", 1000)
    data = CHINESE.encode()
    place = data.index("天".encode(), at)
    path = write(tmp_path, front + data[:place] + b"\xff" + data[place:])
    assert findings(path)[0].startswith(f"byte {place + len(front):,} (0xff) is not UTF-8; repair it (iconv -c ")


def test_half_a_character_of_utf8(tmp_path):
    """From the break on, the bytes would pass for GB18030; what stands before tells that they are not."""
    data = CHINESE.encode()
    place = data.rindex("。".encode())
    data = data[: place + 2] + data[place + 3 :]
    data[place:].decode("gb18030")
    assert findings(write(tmp_path, data))[0].startswith(f"byte {place:,} (0xe3) is not UTF-8; repair it (iconv -c ")


# ---- broken JSON


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('"value" @"nine"', "Expecting ':' delimiter"),
        ('"value": "ni@\nne"', "Invalid control character at"),
        ('"value": @nine', "Expecting value"),
        (r'"value": "ni@\xne"', r"Invalid \escape"),
    ],
)
def test_broken_json_is_located(tmp_path, monkeypatch, chunk, broken, message):
    """@ stands before the character to be named."""
    monkeypatch.setattr(window, "CHUNK_BYTES", chunk)
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    lines = [json.dumps(turns(("user", f"问 {name}"), ("assistant", name)), ensure_ascii=False) for name in names]
    text = ("[\n" + ",\n".join(lines) + "]").replace('"value": "nine"', broken)
    column = text.split("\n")[9].index("@") + 1
    [found] = findings(write(tmp_path, text.replace("@", "")))
    assert found.startswith(f"line 10, column {column}, near sample 9: {message}")
    assert " - repair it there, here: " in found


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_columns_of_a_file_of_one_line(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(window, "CHUNK_BYTES", chunk)
    text = json.dumps([GOOD] * 5)
    column = text.rindex(": ") + 1
    [found] = findings(write(tmp_path, "\n" + text[: column - 1] + text[column:]))
    assert found.startswith(f"line 2, column {column + 1}, near sample 5: Expecting ':' delimiter")


def test_broken_line_of_json_lines_after_other_findings(tmp_path):
    lines = [json.dumps(GOOD), json.dumps(turns(("user", "x"))), json.dumps(GOOD)[:-1] + ",}", json.dumps(GOOD)]
    column = len(lines[2])
    wrong, broken = findings(write(tmp_path, "\n".join(lines)))
    assert wrong == "sample 2 (line 2): no assistant answer to learn from; add one, or remove the sample"
    # which character is named, the comma or the brace, differs between Python versions
    assert broken.startswith(
        (f"line 3, column {column}, near sample 3: ", f"line 3, column {column - 1}, near sample 3: ")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([GOOD, GOOD])[:-30], "near sample 2: the file ends inside this sample; was the copy cut short?"),
        (json.dumps(GOOD)[:-10], "near sample 1: the file ends inside this sample; was the copy cut short?"),
        (json.dumps([GOOD])[:-1], "near sample 1: the file ends before the list does; was the copy cut short?"),
        (json.dumps([GOOD])[:-1] + ",\n", "near sample 1: the file ends before the list does; was the copy cut short?"),
        (json.dumps([GOOD])[:-1] + ", ]", "near sample 1: a comma after the last sample; remove it"),
        (json.dumps([GOOD])[:-1] + "}", 'near sample 1: expected "," or "]" after the sample, found "}"'),
        (
            json.dumps([GOOD]) + "\n[",
            "near sample 1: more text after the end of the list; put everything into one list",
        ),
        (
            json.dumps([GOOD]) + "\u2028",
            "near sample 1: more text after the end of the list; put everything into one list",
        ),
        (json.dumps(GOOD) + ",\n" + json.dumps(GOOD), 'near sample 2: one JSON object per line expected, found ","'),
        ('[{"conversations": ' + "[" * 100_000, "near sample 1: nested too deeply for a conversation"),
    ],
)
def test_broken_structure(tmp_path, text, message):
    assert message in findings(write(tmp_path, text))[-1]


def test_one_endless_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(window, "CHUNK_BYTES", 100)
    monkeypatch.setattr(window, "MAX_SAMPLE_CHARS", 5000)
    path = write(tmp_path, {"data": [GOOD] * 1000})
    [found] = findings(path)
    assert "near sample 1: this sample has more than 256 million characters" in found


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64, 4096])
def test_windows_of_any_size_read_the_same(tmp_path, monkeypatch, chunk):
    draw = random.Random(chunk)
    words = ["a", '"', "\\", "\n", "é", "你", "😀", "\u2028", "{", "]", ",", " "]
    samples = [
        turns(*((role, "x" + "".join(draw.choices(words, k=draw.randrange(40)))) for role in ("user", "assistant")))
        for _ in range(60)
    ]
    expected = [[turn["value"] for turn in sample["conversations"]] for sample in samples]
    monkeypatch.setattr(window, "CHUNK_BYTES", chunk)
    for ascii_only in (True, False):
        lines = [json.dumps(sample, ensure_ascii=ascii_only, indent=draw.choice([None, 1])) for sample in samples]
        for text in ("[" + " ,\n".join(lines) + "\n] ", "\n".join(lines)):
            found = list(read(write(tmp_path, text)))
            assert [[message["content"] for message in messages] for messages, _ in found] == expected


def test_the_file_may_not_change_between_checking_and_reading(tmp_path):
    path = write(tmp_path, [GOOD])
    conversations = read(path)
    write(tmp_path, [GOOD, GOOD])
    with pytest.raises(UserError, match="changed while it was read"):
        list(conversations)


# ---- large files


def test_a_large_sample_is_tried_a_few_times_only(tmp_path, monkeypatch):
    """A sample of 2,000 windows: the window doubles, or parsing would take 2,000 tries of growing size."""
    monkeypatch.setattr(window, "CHUNK_BYTES", 1000)
    reads, fill = [], window.Window.fill
    monkeypatch.setattr(window.Window, "fill", lambda window: reads.append(window) or fill(window))
    [(messages, _)] = read(write(tmp_path, [turns(("user", "long " * 400_000), ("assistant", "x"))]))
    assert len(messages[0]["content"]) == 2_000_000 and len(reads) < 60  # in two readings


def test_a_number_of_any_length_is_no_obstacle(tmp_path):
    assert len(read(write(tmp_path, f'[{{"id": {"7" * 5000}, {json.dumps(GOOD)[1:]}]'))) == 1


MEASURE = """
import sys
from finetune.conversations.reading import read
from finetune.memory.peak_memory import resident_gb
before = resident_gb()
conversations = read(sys.argv[1])
print(len(conversations), resident_gb() - before, "torch" in sys.modules)
"""


def test_memory_of_a_large_file(tmp_path):
    """100,000 conversations in one line, 34 MB of JSON: read in less than half of the file's size."""
    path, count = tmp_path / "large.json", 100_000
    with open(path, "w") as file:
        file.write("[")
        for i in range(count):
            pair = f'{{"from": "user", "value": "{i} {"why " * 25}"}}, {{"from": "assistant", "value": "{"so " * 40}"}}'
            file.write(f'{", " * (i > 0)}{{"id": "x", "conversations": [{pair}]}}')
        file.write("]")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, path], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    samples, growth_gb, torch = result.stdout.split()
    assert int(samples) == count and torch == "False"
    assert float(growth_gb) * 1e9 < path.stat().st_size / 2
