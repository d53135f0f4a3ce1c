"""Converts the tokenizer between qwen.tiktoken (first-generation Qwen) and tokenizer.json (later ones).

Both are byte-level BPE with the same ids. qwen.tiktoken lists byte strings by rank, which is the id and the priority of the
merge that makes it; tokenizer.json lists the merges, and writes each byte as a printable character, as GPT-2 does.
"""

import base64
import hashlib
import tempfile
from pathlib import Path

from qwen_model.tokenization_qwen import N_RANKS, PATTERN, SPECIAL_TOKENS, VOCABULARY_NAME, QWenTokenizer
from qwen_model.vocabulary import VOCABULARY_SHA256

from .. import json_text
from ..errors import UserError
from ..folders import config_files
from ..model import kinds

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT, END_OF_TURN = SPECIAL_TOKENS[0], SPECIAL_TOKENS[2]
OTHER_VOCABULARY = "- a model with another vocabulary cannot be exported; use it in its own layout"
# What tokenizers differ in: composed and decomposed é, contractions, digits, blanks, control tokens, several scripts.
PROBE_TEXTS = (
    "It's 1984, DON'T\r\n\tpanic!  \u00e9 e\u0301 \u212b \u017f 你好，世界 👩\u200d👩\u200d👧  \n\n x  ",
    "<|im_start|>user\n1<|im_end|><|endoftext|><|extra_204|><|extra_205|> <|im_sep|>",
    "def f(x):\n    return [x ** 2 for _ in range(10)]\n\n\n# 一二三 \u0661\u0662 \u00b2 \u00bd \u2167 한국어 ไทย हिन्दी",
    "\u00a0\u3000\u2028\x0b\x1c\x85\ufeff|\ufb01",
)


class Qwen2Files:
    """Given to model_writer.write_frame in the place of a tokenizer: save_pretrained writes Qwen2's tokenizer files.

    tokenizer: first-generation Qwen's; chat: whether the model is a chat model, whose answers end with <|im_end|>.
    """

    def __init__(self, tokenizer, chat: bool):
        self.tokenizer, self.chat = tokenizer, chat

    def save_pretrained(self, folder: Path) -> None:
        definition = tokenizer_json(self.tokenizer.mergeable_ranks, self.tokenizer.special_tokens)
        json_text.write(folder / TOKENIZER_FILE, definition)
        json_text.write(folder / TOKENIZER_CONFIG, tokenizer_config(self.tokenizer, self.chat))


def tokenizer_json(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> dict:
    """tokenizer.json as published for Qwen2. UserError for a token that no sequence of merges makes."""
    names = printable_bytes()
    as_text = lambda token: "".join(names[byte] for byte in token)  # noqa: E731
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {as_text(token): rank for token, rank in ranks.items()}
    if len(ranks) > N_RANKS:  # then control tokens must be in it, too: else they would get the ids after its last
        vocabulary |= special_tokens
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    bpe = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(index, text) for text, index in special_tokens.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE"}
        | bpe
        | {
            "vocab": vocabulary,
            "merges": [f"{as_text(left)} {as_text(right)}" for left, right in merges(ranks)],
        },
    }


def added_token(index: int, text: str) -> dict:
    """As published for Qwen2, which finds special tokens before NFC normalization; first-generation Qwen finds them after it.

    The two differ only where U+0338 follows a token: NFC composes it with the token's ">".
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text} | flags


def tokenizer_config(tokenizer, chat: bool) -> dict:
    """tokenizer_config.json, with the chat template in it, where every server reads it."""
    special = {str(index): added_token(index, text) for text, index in tokenizer.special_tokens.items()}
    for token in special.values():
        del token["id"]
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": special,
        "bos_token": None,
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN if chat else END_OF_TEXT,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


# ---- bytes and merges


def printable_bytes() -> list[str]:
    """GPT-2's character for each byte: the byte's own where that is printable, else the next one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token of more than one byte, by rank, the two tokens that BPE merges into it."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            found.append(last_merge(ranks, token, rank))
    return found


def last_merge(ranks: dict[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes]:
    """The two tokens that remain of `token` after all merges of a lower rank. UserError where more than two remain."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in zip(pieces, pieces[1:])]
        first = min(pairs)
        if first >= rank:
            what = f"{VOCABULARY_NAME}: no merges lead to {token!r} (id {rank})"
            raise UserError(f"{what}, so tokenizer.json cannot hold it - remove it from the extra vocabulary")
        at = pairs.index(first)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces[0], pieces[1]


# ---- from tokenizer.json to qwen.tiktoken


def to_first_generation(folder: Path):
    """A QWenTokenizer made from a later Qwen's tokenizer files. UserError if the vocabulary is another one."""
    settings = config_files.read_json(folder / TOKENIZER_CONFIG)
    ranks = read_ranks(folder)
    check_special_tokens(folder, settings)
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank]
    if hashlib.sha256(b"".join(lines[:N_RANKS])).hexdigest() != VOCABULARY_SHA256:
        raise UserError(f"{folder}: its vocabulary is not first-generation Qwen's {OTHER_VOCABULARY}")
    length = settings.get("model_max_length")
    known = {"model_max_length": length} if isinstance(length, int) and length < 10**9 else {}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, VOCABULARY_NAME)
        file.write_bytes(b"".join(lines))
        return QWenTokenizer(file, pad_token=kinds.text_of(settings.get("pad_token")), **known)


def read_ranks(folder: Path) -> dict[bytes, int]:
    """{byte string: id} of tokenizer.json, or of the older vocab.json."""
    path = folder / TOKENIZER_FILE
    model = config_files.read_json(path).get("model") or {} if path.is_file() else {}
    vocabulary = model.get("vocab") if path.is_file() else config_files.read_json(folder / "vocab.json")
    byte_of = {character: byte for byte, character in enumerate(printable_bytes())}
    special = set(SPECIAL_TOKENS)
    try:
        pieces = ((text, rank) for text, rank in vocabulary.items() if text not in special)
        return {bytes(byte_of[character] for character in text): rank for text, rank in pieces}
    except (KeyError, AttributeError):
        raise UserError(f"{path}: not a byte-level BPE vocabulary {OTHER_VOCABULARY}") from None


def check_special_tokens(folder: Path, settings: dict) -> None:
    """UserError unless the special tokens are first-generation Qwen's, with the same ids."""
    path, ours = folder / TOKENIZER_FILE, {text: N_RANKS + i for i, text in enumerate(SPECIAL_TOKENS)}
    added = config_files.read_json(path).get("added_tokens") or [] if path.is_file() else []
    listed = kinds.special_tokens(folder, settings) | {token["content"]: token["id"] for token in added}
    for text, index in sorted(listed.items(), key=lambda item: item[1]):
        if ours.get(text) != index:
            wanted = SPECIAL_TOKENS[index - N_RANKS] if 0 <= index - N_RANKS < len(SPECIAL_TOKENS) else "nothing"
            what = f"{folder}: token {index} is {text}, where first-generation Qwen has {wanted}"
            raise UserError(f"{what} {OTHER_VOCABULARY}")
