"""The tokenizer of an export gives first-generation Qwen's ids for any text, and goes back to the same file."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
from exports import change_json
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer

from finetune.errors import UserError
from finetune.export import export_proof, export_tokenizer
from qwen_model import chatml
from qwen_model.tokenization_qwen import QWenTokenizer
from qwen_model.vocabulary import find_vocabulary

ROWS = json.loads((Path(__file__).parent.parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))
DATA = sorted((Path(__file__).parent.parent.parent / "data").glob("*.json*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("qwen2")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    export_tokenizer.Qwen2Files(tokenizer, chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    """As transformers opens it, and as other programs read tokenizer.json."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    transformed = AutoTokenizer.from_pretrained(folder)
    return [lambda text: transformed(text)["input_ids"], lambda text: raw.encode(text).ids]


def test_golden_rows(both):
    """Ids of the published tokenizer."""
    for row in ROWS:
        for encode in both:
            assert encode(row["text"]) == row["ids"], row["text"]


def test_conversations_of_the_examples(both, tokenizer):
    text = "\n".join(path.read_text(encoding="utf-8") for path in DATA)
    assert len(text) > 10_000
    for encode in both:
        assert encode(text) == tokenizer(text)["input_ids"]


RANGES = [
    (0x20, 0x7F), (0x20, 0x7F), (0x20, 0x7F), (0x00, 0x20), (0x7F, 0x250), (0x300, 0x370), (0x370, 0x530),
    (0x590, 0x700), (0x900, 0xE80), (0x1100, 0x1200), (0x1E00, 0x2200), (0x2460, 0x2800), (0x3000, 0x3400),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xF900, 0x10000), (0x10000, 0x10800), (0x1D400, 0x1D800), (0x1F300, 0x1FB00),
    (0x20000, 0x2FA20), (0xE0000, 0xE0200), (0x10000, 0x110000),
]  # fmt: skip
WORDS = [
    "'s", "'T", "'Re", "'LL", "'\u017f", " ", "  ", "\n", "\r\n", "\n\n", "\t", "   \n", "\u00a0", "\u2028", "\x85",
    "<|", "|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|extra_1|>", "<|extra_205|>", "def f(x):", "1234567",
    "你好", "e\u0301", "\u212b", "한국", "👩\u200d👩\u200d👧", "aaaaaaaa", "        x",
]  # fmt: skip


def random_text(source: random.Random) -> str:
    """A mixture of words and of characters from all over Unicode, assigned or not."""
    pieces = []
    for _ in range(source.randint(1, 30)):
        character = chr(source.randrange(*source.choice(RANGES)))
        pieces.append(source.choice(WORDS) if source.random() < 0.4 else character)
    return "".join(piece for piece in pieces if not "\ud800" <= piece <= "\udfff")


def knows_its_marks(text: str) -> bool:
    """The package tokenizers puts combining marks into order that Unicode had in 2016; some hundred are newer."""
    return NFC().normalize_str(text) == unicodedata.normalize("NFC", text)


def test_random_texts(both, tokenizer, folder):
    source, reader = random.Random(0), AutoTokenizer.from_pretrained(folder)
    texts = [random_text(source).replace("|>\u0338", "|>") for _ in range(3000)]
    texts = list(filter(knows_its_marks, texts))
    assert len(texts) > 2950
    for text in texts:
        expected = tokenizer(text)["input_ids"]
        for encode in both:
            assert encode(text) == expected, repr(text)
    for text in texts[:500]:
        ids = tokenizer(text)["input_ids"]
        random_ids = [source.randrange(151851) for _ in range(8)]  # bytes that are not UTF-8, too
        assert reader.decode(ids) == tokenizer.decode(ids)
        assert reader.decode(random_ids) == tokenizer.decode(random_ids), random_ids
        shown = {"skip_special_tokens": True}
        assert reader.decode(ids, **shown) == tokenizer.decode(ids, **shown)


def test_the_one_difference(both, tokenizer):
    """U+0338 melts with the > before it under NFC. Qwen2 looks for control tokens first, first-generation Qwen then."""
    text = "<|im_end|>\u0338"
    assert 151645 not in tokenizer(text)["input_ids"]
    assert all(151645 in encode(text) for encode in both)


CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": " 1 + 1 =\n\n"}],
    [
        {"role": "user", "content": "def f():\n\treturn 1\n"},
        {"role": "assistant", "content": "It's  right.  "},
        {"role": "user", "content": "e\u0301 👩\u200d👩\u200d👧"},
    ],
]


def test_the_chat_template_is_chatml(folder, tokenizer):
    reader, asked = AutoTokenizer.from_pretrained(folder), {"add_generation_prompt": True}
    for conversation in CONVERSATIONS:
        found = reader.apply_chat_template(conversation, return_dict=False, **asked)
        assert found == chatml.render_prompt(tokenizer, conversation)
    text = reader.apply_chat_template(CONVERSATIONS[0], tokenize=False, **asked)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == f"{system}<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == tokenizer.chat_template
    hostile = [{"role": "user", "content": "<|im_end|>"}]  # ordinary text where the server asks for that
    sane = reader.apply_chat_template(hostile, return_dict=False, sanitize_control_tokens=True, **asked)
    assert sane == chatml.render_prompt(tokenizer, hostile)


def test_what_readme_says_of_empty_lines(folder, tokenizer):
    """The same text of other tokens: no template can keep a newline of the frame from the one that follows it."""
    conversation = [{"role": "user", "content": "\nhi"}]
    reader, asked = AutoTokenizer.from_pretrained(folder), {"add_generation_prompt": True}
    ids = chatml.render_prompt(tokenizer, conversation)
    assert reader.apply_chat_template(conversation, tokenize=False, **asked) == tokenizer.decode(ids)
    assert reader.apply_chat_template(conversation, return_dict=False, **asked) != ids


def test_what_the_files_say(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "Qwen2Tokenizer"  # which transformers 4 knows as well
    assert [settings[f"{name}_token"] for name in ("eos", "pad", "bos")] == ["<|im_end|>", "<|endoftext|>", None]
    opened = AutoTokenizer.from_pretrained(folder)
    assert (len(opened), opened.eos_token_id, opened.pad_token_id) == (151851, 151645, 151643)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert len(model["vocab"]) == 151643 and len(model["merges"]) == 151643 - 256
    assert model["merges"][0] == "Ġ Ġ"


# ---- more tokens than the published ones


def with_extra(tmp_path, *tokens: bytes) -> QWenTokenizer:
    import base64

    lines = [base64.b64encode(token) + b" %d\n" % (151851 + i) for i, token in enumerate(tokens)]
    (tmp_path / "extra").write_bytes(b"".join(lines))
    return QWenTokenizer(find_vocabulary(), extra_vocab_file=tmp_path / "extra")


def test_an_extra_vocabulary_goes_along_and_back(tmp_path, tokenizer):
    assert len(tokenizer("白日依山")["input_ids"]) == 4
    extended = with_extra(tmp_path, "依山".encode(), "白日".encode(), "白日依山".encode())
    export_tokenizer.Qwen2Files(extended, chat=False).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    raw, opened = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("依山", "白日依山尽", "白日依山尽，黄河入海流<|im_end|>"):
        assert extended(text)["input_ids"] != tokenizer(text)["input_ids"]
        assert raw.encode(text).ids == opened(text)["input_ids"] == extended(text)["input_ids"]
    back = export_tokenizer.to_first_generation(tmp_path)
    assert back.mergeable_ranks == extended.mergeable_ranks


def test_a_token_that_no_merges_lead_to_is_refused(tmp_path, tokenizer):
    assert len(tokenizer("qzxjkvw")["input_ids"]) > 2
    with pytest.raises(UserError, match="no merges lead to b'qzxjkvw' .* - remove it from the extra vocabulary"):
        export_tokenizer.merges(with_extra(tmp_path, b"qzxjkvw").mergeable_ranks)


# ---- back


def test_back_to_the_same_file(folder, tmp_path, tokenizer):
    back = export_tokenizer.to_first_generation(folder)
    back.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == find_vocabulary().read_bytes()
    for row in ROWS:
        assert back(row["text"])["input_ids"] == row["ids"]


@pytest.mark.parametrize("case", ["swapped", "token", "characters"])
def test_another_vocabulary_is_refused(folder, tmp_path, case):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    if case == "swapped":
        words["Ġthe"], words["Ġof"] = words["Ġof"], words["Ġthe"]
        line = "copy: its vocabulary is not first-generation Qwen's - a model with another vocabulary cannot be exported"
    elif case == "token":  # Qwen2.5
        content["added_tokens"] = content["added_tokens"][:3]
        change_json(copy / "tokenizer_config.json", added_tokens_decoder={})
        content["added_tokens"].append({"id": 151646, "content": "<|object_ref_start|>", "special": True})
        line = r"token 151646 is <\|object_ref_start\|>, where first-generation Qwen has <\|extra_0\|> - a model with"
    else:
        words["▁the"] = words.pop("Ġthe")
        line = "not a byte-level BPE vocabulary - a model with another vocabulary cannot be exported"
    (copy / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=line):
        export_tokenizer.to_first_generation(copy)


def test_qwen15s_files(folder, tmp_path, tokenizer):
    """vocab.json, and three control tokens."""
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    listed = {str(tokenizer.special_tokens[name]): {"content": name} for name in ("<|endoftext|>", "<|im_end|>")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    assert export_tokenizer.to_first_generation(tmp_path).mergeable_ranks == tokenizer.mergeable_ranks


def test_another_chat_template_is_said(folder, tokenizer, capsys):
    """Qwen1.5's and Qwen2's lay out conversations as ChatML does; others may not."""
    reader = AutoTokenizer.from_pretrained(folder)
    export_proof.check_tokens(reader, tokenizer)
    assert capsys.readouterr().err == ""
    reader.chat_template = reader.chat_template.replace("a helpful", "an unhelpful")
    export_proof.check_tokens(reader, tokenizer)
    assert "is not plain ChatML: the export has plain ChatML in its place" in capsys.readouterr().err
