"""The tokenizer against the golden rows, and everything that users and transformers do with one."""

import base64
import copy
import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import qwen_model
from qwen_model import tokenization_qwen
from qwen_model.tokenization_qwen import CHAT_TEMPLATE, LONGEST_BLANK, QWenTokenizer, read_ranks
from qwen_model.vocabulary import VOCABULARY_SHA256, find_vocabulary

GOLDEN = Path(__file__).parent.parent / "golden"
ROWS = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
EOD, IM_START, IM_END, EXTRA_0 = 151643, 151644, 151645, 151646


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published folder as far as a tokenizer is concerned."""
    folder = tmp_path_factory.mktemp("Qwen 1.8B")
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "nano_checkpoint" / name, folder)
    shutil.copy(find_vocabulary(), folder)
    return folder


# ---- text to ids


def test_golden_rows(tokenizer):
    for row in ROWS:
        text = row["text"]
        assert tokenizer(text).input_ids == tokenizer.encode(text) == row["ids"]
        assert tokenizer(text, allowed_special=set()).input_ids == row["ids_plain"]
        assert tokenizer(text, split_special_tokens=True).input_ids == row["ids_plain"]
        assert tokenizer.encode_ordinary(text) == row["ids_plain"]


def test_golden_rows_in_batches(tokenizer):
    texts = [row["text"] for row in ROWS]
    assert tokenizer(texts).input_ids == [row["ids"] for row in ROWS]
    many = 20 * texts  # enough characters for threads
    assert sum(map(len, many)) > 20_000
    assert tokenizer(many).input_ids == 20 * [row["ids"] for row in ROWS]
    assert tokenizer(many, allowed_special=set()).input_ids == 20 * [row["ids_plain"] for row in ROWS]
    assert tokenizer.encode_ordinary_batch(many) == 20 * [row["ids_plain"] for row in ROWS]
    assert tokenizer.encode_ordinary_batch([]) == []


def test_only_the_allowed_special_tokens_are_parsed(tokenizer):
    ids = tokenizer("<|im_start|><|im_end|>", allowed_special={"<|im_end|>"}).input_ids
    assert ids[-1] == IM_END and IM_START not in ids
    with pytest.raises(ValueError, match="im_start"):
        tokenizer("<|im_start|>", allowed_special=set(), disallowed_special="all")


def test_text_is_normalized(tokenizer):
    decomposed = unicodedata.normalize("NFD", "Ångström 각")
    assert decomposed != "Ångström 각"
    assert tokenizer.encode_ordinary(decomposed) == tokenizer.encode_ordinary("Ångström 각")
    assert tokenizer(decomposed + "<|im_end|>").input_ids == [*tokenizer.encode_ordinary("Ångström 각"), IM_END]


def test_surrogates_become_characters_or_replacements(tokenizer):
    assert tokenizer.decode(tokenizer.encode_ordinary("\ud83d\ude00 \ud800 x")) == "😀 \ufffd x"
    assert tokenizer.decode(tokenizer("\ud83d\ude00 \ud800 x").input_ids) == "😀 \ufffd x"


def test_runs_of_blanks_that_tiktoken_gives_up_on(tokenizer):
    text = "a" + " " * 1_100_000 + "b"
    for ids in (tokenizer.encode_ordinary(text), tokenizer(text, verbose=False).input_ids):
        assert tokenizer.decode(ids) == text
    # a long text without such a run is not cut anywhere
    text = ("word " * LONGEST_BLANK)[: LONGEST_BLANK + 9]
    assert tokenizer.encode_ordinary(text) == tokenizer.tokenizer.encode_ordinary(text)


def test_what_is_not_text_is_an_error(tokenizer):
    for wrong in (None, 5, b"bytes"):
        with pytest.raises((TypeError, ValueError)):
            tokenizer.encode_ordinary_batch([wrong])
        with pytest.raises((TypeError, ValueError)):
            tokenizer(wrong)


def test_pairs_and_words_go_the_same_way(tokenizer):
    assert tokenizer("Hi", "you<|im_end|>").input_ids == [
        *tokenizer("Hi").input_ids,
        *tokenizer("you<|im_end|>").input_ids,
    ]
    assert tokenizer(["Hi", " you"], is_split_into_words=True).input_ids == tokenizer("Hi you").input_ids


# ---- tokens


def test_tokens_are_bytes_and_special_tokens_strings(tokenizer):
    text = "你好 naïve 👩<|im_end|>"
    tokens = tokenizer.tokenize(text)
    assert tokens[-1] == "<|im_end|>" and all(isinstance(token, bytes) for token in tokens[:-1])
    assert b"".join(tokens[:-1]).decode() + tokens[-1] == text
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.convert_tokens_to_string(tokens) == text
    assert b"".join(tokenizer.tokenize("<|im_end|>", allowed_special=set())) == b"<|im_end|>"


def test_single_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids("<|extra_204|>") == 151850
    assert tokenizer.convert_tokens_to_ids("hello") == tokenizer.convert_tokens_to_ids(b"hello") == 14990
    assert tokenizer.convert_tokens_to_ids(b"no such token") is None
    assert tokenizer.convert_ids_to_tokens(EOD) == "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens([14990, IM_END], skip_special_tokens=True) == [b"hello"]
    assert tokenizer.convert_ids_to_tokens(151900) is None  # the model's vocabulary is padded


def test_vocabulary(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 151851
    assert len(tokenizer.special_tokens) == 208 and len(tokenizer.mergeable_ranks) == 151643
    assert sorted(tokenizer.get_vocab().values()) == list(range(151851))
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (EOD, IM_START, IM_END)
    assert sorted(tokenizer.all_special_ids) == list(range(EOD, 151851))


def test_named_tokens(tokenizer):
    assert tokenizer.bos_token_id is None and tokenizer.eos_token_id is None and tokenizer.unk_token_id is None
    assert tokenizer.pad_token_id == EOD
    named = QWenTokenizer(find_vocabulary(), pad_token="<|extra_0|>", eos_token="<|im_end|>")
    assert (named.pad_token_id, named.eos_token_id, len(named)) == (EXTRA_0, IM_END, 151851)
    named.pad_token_id = named.eod_id
    assert named.pad_token == "<|endoftext|>"


def test_new_tokens_are_refused(tokenizer):
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra_7|>"]}) == 0
    with pytest.raises(ValueError, match="<tool>.*<|extra_0|>"):
        tokenizer.add_tokens(["<tool>"])
    with pytest.raises(ValueError, match="</s>"):
        QWenTokenizer(find_vocabulary(), eos_token="</s>")
    with pytest.raises(ValueError, match="<new>"):
        QWenTokenizer(find_vocabulary(), added_tokens_decoder={151851: "<new>"})
    assert len(tokenizer) == 151851


# ---- ids to text


def test_decode(tokenizer):
    for row in ROWS:
        if unicodedata.is_normalized("NFC", row["text"]):
            assert tokenizer.decode(row["ids"]) == row["text"] == tokenizer.decode(row["ids_plain"])
    ids = tokenizer("<|im_start|>user\nhi<|extra_9|><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert (
        tokenizer.decode(torch.tensor(ids))
        == tokenizer.decode(np.array(ids))
        == "<|im_start|>user\nhi<|extra_9|><|im_end|>"
    )
    assert tokenizer.batch_decode([ids[:1], ids[1:2]]) == ["<|im_start|>", "user"]
    assert tokenizer.decode(14990) == "hello"
    assert tokenizer.decode(tokenizer.encode("a . b"), clean_up_tokenization_spaces=True) == "a. b"


def test_decode_of_half_a_character(tokenizer):
    half = tokenizer.convert_tokens_to_ids([b"\xe4", b"\xbd"])
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode(half, errors="ignore") == ""
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(half, errors="strict")
    assert QWenTokenizer(find_vocabulary(), errors="ignore").decode(half) == ""


def test_decode_of_padded_ids(tokenizer):
    assert tokenizer.decode([14990, 151900, 14990]) == "hello\ufffdhello"


# ---- batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(tokenizer, side):
    batch = tokenizer(["Hi", "hello there"], padding=True, padding_side=side, return_tensors="pt")
    short, long = tokenizer("Hi").input_ids, tokenizer("hello there").input_ids
    padding = [EOD] * (len(long) - len(short))
    assert padding
    assert batch.input_ids.tolist() == [padding + short if side == "left" else short + padding, long]
    mask = [0] * len(padding), [1] * len(short)
    assert batch.attention_mask.tolist() == [sum(mask if side == "left" else mask[::-1], []), [1] * len(long)]


def test_truncation_lengths_and_tensors(tokenizer):
    ids = tokenizer("one two three four").input_ids
    assert tokenizer("one two three four", truncation=True, max_length=3).input_ids == ids[:3]
    batch = tokenizer(["one two three four", "one"], truncation=True, max_length=3, padding="max_length")
    assert batch.input_ids == [ids[:3], [ids[0], EOD, EOD]] and batch.attention_mask == [[1, 1, 1], [1, 0, 0]]
    batch = tokenizer(["one two three four five", "one"], padding=True, pad_to_multiple_of=4, return_length=True)
    assert [len(row) for row in batch.input_ids] == [8, 8] and batch.length == [5, 1]
    assert tokenizer("one", return_tensors="pt").input_ids.shape == (1, 1)
    assert tokenizer.encode("one", return_tensors="pt").shape == (1, 1)
    assert tokenizer.pad({"input_ids": [[1], [2, 3]]}, padding=True)["input_ids"] == [[1, EOD], [2, 3]]
    assert tokenizer("").input_ids == [] and tokenizer(["", "one"]).input_ids == [[], ids[:1]]


# ---- files


def test_auto_tokenizer_opens_a_published_folder(folder):
    qwen_model.register()
    loaded = AutoTokenizer.from_pretrained(folder, pad_token="<|extra_0|>", padding_side="left")
    assert type(loaded) is QWenTokenizer
    assert (loaded.pad_token_id, loaded.padding_side, loaded.model_max_length) == (EXTRA_0, "left", 8192)
    assert loaded(["Hi", "hello there"], padding=True).input_ids[0][0] == EXTRA_0


def test_saved_folder_opens_elsewhere(tokenizer, tmp_path, monkeypatch):
    """In another Python, which does not find this toolkit: the folder carries the code."""
    # a class that nobody has registered
    (tmp_path / "elsewhere").mkdir()
    for name in ("tokenization_qwen.py", "compat.py", "versions.py"):
        shutil.copy(Path(tokenization_qwen.__file__).with_name(name), tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(tmp_path)
    fresh = importlib.import_module("elsewhere.tokenization_qwen")
    named = fresh.QWenTokenizer(find_vocabulary(), pad_token="<|extra_0|>", padding_side="left", errors="ignore")
    saved = tmp_path / "saved model 1.0"
    named.save_pretrained(saved)
    assert hashlib.sha256((saved / "qwen.tiktoken").read_bytes()).hexdigest() == VOCABULARY_SHA256
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "QWenTokenizer"
    assert config["auto_map"]["AutoTokenizer"] == ["tokenization_qwen.QWenTokenizer", None]
    assert str(tmp_path) not in json.dumps(config) and str(find_vocabulary()) not in json.dumps(config)
    program = """
import importlib.util, json, sys
from transformers import AutoTokenizer
assert importlib.util.find_spec("qwen_model") is None
t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
chat = t.apply_chat_template([{"role": "user", "content": "<|im_end|>"}], add_generation_prompt=True)
t.save_pretrained(sys.argv[1] + " again")
print(json.dumps([t.pad_token_id, t.padding_side, t.errors, t("Hi<|im_end|>").input_ids, chat.input_ids]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", program, str(saved)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "<|im_end|>"}], add_generation_prompt=True)
    expected = [EXTRA_0, "left", "ignore", tokenizer("Hi<|im_end|>").input_ids, chat.input_ids]
    assert json.loads(run.stdout) == expected
    again = saved.with_name(saved.name + " again")
    for name in ("qwen.tiktoken", "tokenization_qwen.py", "chat_template.jinja"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def extra_vocabulary(path, lines: list[tuple[bytes, int]]):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines))
    return path


def test_extra_vocab_file(tokenizer, tmp_path):
    word = "Quantenchromodynamik".encode()
    pieces = [word[:end] for end in range(2, len(word) + 1) if word[:end] not in tokenizer.mergeable_ranks]
    extra = extra_vocabulary(tmp_path / "extra", [(piece, 151851 + i) for i, piece in enumerate(pieces)])
    larger = QWenTokenizer(find_vocabulary(), extra_vocab_file=extra)
    assert len(larger) == 151851 + len(pieces)
    ids = larger.encode_ordinary("Quantenchromodynamik")
    assert max(ids) >= 151851 and len(ids) < len(tokenizer.encode_ordinary("Quantenchromodynamik"))
    assert larger.decode(ids, skip_special_tokens=True) == "Quantenchromodynamik"
    assert larger("Hi<|im_end|>").input_ids == tokenizer("Hi<|im_end|>").input_ids
    larger.save_pretrained(tmp_path / "saved")
    assert QWenTokenizer.from_pretrained(tmp_path / "saved").encode_ordinary("Quantenchromodynamik") == ids
    again = QWenTokenizer.from_pretrained(tmp_path / "saved", extra_vocab_file=extra)
    assert again.get_vocab() == larger.get_vocab()


@pytest.mark.parametrize(
    "lines", [[(b"one two", 17)], [(b"one two", 151700)], [(b"one two", 151851), (b"one two three", 151851)]]
)
def test_extra_vocab_file_with_taken_ids(tmp_path, lines):
    extra = extra_vocabulary(tmp_path / "extra", lines)
    with pytest.raises(ValueError, match="extra: id .* is taken - number new tokens from 151851 on"):
        QWenTokenizer(find_vocabulary(), extra_vocab_file=extra)


def test_extra_vocab_file_with_known_tokens(tokenizer, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(tokenization_qwen.logger, "warning", warnings.append)
    extra = extra_vocabulary(tmp_path / "extra", [(b"hello", 151851)])
    assert QWenTokenizer(find_vocabulary(), extra_vocab_file=extra).encode_ordinary("hello") == [14990]
    assert len(warnings) == 1 and "keeps its id 14990" in warnings[0]


def test_broken_vocabulary_files(tmp_path):
    path = tmp_path / "qwen.tiktoken"
    path.write_text("aGk= 0\nnot a line\n")
    with pytest.raises(ValueError, match=r"qwen.tiktoken, line 2: expected 'base64 rank'"):
        read_ranks(path)
    path.write_text("aGk= 0\n")
    with pytest.raises(ValueError, match="not complete"):
        QWenTokenizer(path)
    with pytest.raises(ValueError, match="no qwen.tiktoken"):
        QWenTokenizer(None, name_or_path="some/folder")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(tokenizer, copied):
    twin = copied(tokenizer)
    assert twin is not tokenizer and twin.tokenizer is not None
    for row in ROWS:
        assert twin(row["text"]).input_ids == row["ids"]
    assert twin.decode(ROWS[-1]["ids"]) == tokenizer.decode(ROWS[-1]["ids"])


def test_finding_the_vocabulary(monkeypatch, tmp_path):
    assert (
        "dashscope" not in sys.modules and find_vocabulary().name == "qwen.tiktoken" and "dashscope" not in sys.modules
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install dashscope"):
        find_vocabulary()
    other = tmp_path / "resources" / "qwen.tiktoken"
    other.parent.mkdir()
    other.write_text("aGk= 0\n")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="not the published vocabulary"):
        find_vocabulary()


# ---- the chat template (its ids: tests/qwen_model/test_chatml.py)


def test_chat_template_text(tokenizer):
    messages = [{"role": "user", "content": " <|im_end|>\n"}, {"role": "assistant", "content": "b"}]
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n <|im_end|>\n<|im_end|>\n"
    text += "<|im_start|>assistant\nb<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": ""}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>system\n<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("message", [{"role": "tool", "content": "x"}, {"role": "user", "content": [{"text": "x"}]}])
def test_chat_template_refuses(tokenizer, message):
    for tokenize in (True, False):
        with pytest.raises(Exception, match="role system, user or assistant"):
            tokenizer.apply_chat_template([message], tokenize=tokenize)


def test_chat_template_of_the_user(folder):
    """Another template is transformers' business, with its own way of keeping contents ordinary."""
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    own = QWenTokenizer.from_pretrained(folder, chat_template=template)
    messages = [{"role": "user", "content": "a<|im_end|>"}]
    assert own.chat_template != CHAT_TEMPLATE
    assert own.apply_chat_template(messages).input_ids == [IM_START, *own("a<|im_end|>").input_ids]
