"""First-generation Qwen's tokenizer in the files of later ones, and back: qwen.tiktoken <-> tokenizer.json.

Both are byte-level BPE with the same ids. qwen.tiktoken lists pieces of bytes by rank, which is the id and says when
two neighbours melt into one; tokenizer.json lists the merges, and writes a byte as a printable character (GPT-2).
"""

import base64
import hashlib
import json
from pathlib import Path

from qwen_model.tokenization_qwen import N_RANKS, PATTERN, SPECIAL_TOKENS, VOCABULARY_NAME
from qwen_model.vocabulary import VOCABULARY_SHA256

from ..errors import UserError
from ..folders import config_files
from ..model import kinds

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT, END_OF_TURN = SPECIAL_TOKENS[0], SPECIAL_TOKENS[2]
OTHER_VOCABULARY = "- a model with another vocabulary cannot go there; use it in its own layout"
# Both ways of writing é, contractions, digits, blanks, control tokens, several alphabets: what tokenizers differ in.
PROBES = (
    "It's 1984, DON'T\r\n\tpanic!  \u00e9 e\u0301 \u212b \u017f 你好，世界 👩\u200d👩\u200d👧  \n\n x  ",
    "<|im_start|>user\n1<|im_end|><|endoftext|><|extra_204|><|extra_205|> <|im_sep|>",
    "def f(x):\n    return [x ** 2 for _ in range(10)]\n\n\n# 一二三 \u0661\u0662 \u00b2 \u00bd \u2167 한국어 ไทย हिन्दी",
    "\u00a0\u3000\u2028\x0b\x1c\x85\ufeff|\ufb01",
)


class Qwen2Files:
    """Stands where a tokenizer does in model_writer.write_frame: save_pretrained writes tokenizer.json and its config.

    tokenizer: first-generation Qwen's; chats: whether the model is one that ends its answers with <|im_end|>.
    """

    def __init__(self, tokenizer, chats: bool):
        self.tokenizer, self.chats = tokenizer, chats

    def save_pretrained(self, folder: Path) -> None:
        write(folder / TOKENIZER_FILE, definition(self.tokenizer.mergeable_ranks, self.tokenizer.special_tokens))
        write(folder / TOKENIZER_CONFIG, settings(self.tokenizer, self.chats))


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def definition(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> dict:
    """tokenizer.json, as published for Qwen2. UserError for a vocabulary that no merges lead to."""
    names = printable_bytes()
    as_text = lambda token: "".join(names[byte] for byte in token)  # noqa: E731
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {as_text(token): rank for token, rank in ranks.items()}
    if len(ranks) > N_RANKS:  # then control tokens must stand in it, too: else they would be numbered after its last
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
    """As published for Qwen2: looked for before NFC, and not after it as by first-generation Qwen.

    That is another thing only where U+0338 follows a token, which NFC melts with its ">".
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text} | flags


def settings(tokenizer, chats: bool) -> dict:
    """tokenizer_config.json; the chat template is in it, where every server looks."""
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
        "eos_token": END_OF_TURN if chats else END_OF_TEXT,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


# ---- bytes and merges


def printable_bytes() -> list[str]:
    """The character that stands for each byte: itself where it can be seen, else the next one from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each piece of more than one byte, by rank, the two pieces that BPE makes it of."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            found.append(last_merge(ranks, token, rank))
    return found


def last_merge(ranks: dict[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes]:
    """What the token consists of when all merges before it are done: two pieces, of a vocabulary that BPE has made."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in zip(pieces, pieces[1:])]
        first = min(pairs)
        if first >= rank:
            what = f"{VOCABULARY_NAME}: no merges lead to {token!r} (id {rank})"
            raise UserError(f"{what}, so tokenizer.json cannot hold it - leave it out of the extra vocabulary")
        at = pairs.index(first)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces[0], pieces[1]


# ---- and back


def first_generation(folder: Path):
    """First-generation Qwen's tokenizer, made of a later Qwen's files. UserError if the vocabulary is another one."""
    import tempfile

    from qwen_model.tokenization_qwen import QWenTokenizer

    settings = config_files.read_json(folder / TOKENIZER_CONFIG)
    ranks = ranks_of(folder)
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


def ranks_of(folder: Path) -> dict[bytes, int]:
    """The vocabulary of tokenizer.json, or of the older vocab.json, as bytes."""
    path = folder / TOKENIZER_FILE
    model = config_files.read_json(path).get("model") or {} if path.is_file() else {}
    vocabulary = model.get("vocab") if path.is_file() else config_files.read_json(folder / "vocab.json")
    byte_of = {character: byte for byte, character in enumerate(printable_bytes())}
    special = set(SPECIAL_TOKENS)
    try:
        pieces = ((text, rank) for text, rank in vocabulary.items() if text not in special)
        return {bytes(byte_of[character] for character in text): rank for text, rank in pieces}
    except (KeyError, AttributeError):
        raise UserError(f"{path}: is no byte-level BPE {OTHER_VOCABULARY}") from None


def check_special_tokens(folder: Path, settings: dict) -> None:
    """UserError unless what the tokenizer lists beside the vocabulary are first-generation Qwen's tokens, by id."""
    path, ours = folder / TOKENIZER_FILE, {text: N_RANKS + i for i, text in enumerate(SPECIAL_TOKENS)}
    added = config_files.read_json(path).get("added_tokens") or [] if path.is_file() else []
    listed = kinds.special_tokens(folder, settings) | {token["content"]: token["id"] for token in added}
    for text, index in sorted(listed.items(), key=lambda item: item[1]):
        if ours.get(text) != index:
            wanted = SPECIAL_TOKENS[index - N_RANKS] if 0 <= index - N_RANKS < len(SPECIAL_TOKENS) else "nothing"
            what = f"{folder}: token {index} is {text}, where first-generation Qwen has {wanted}"
            raise UserError(f"{what} {OTHER_VOCABULARY}")
