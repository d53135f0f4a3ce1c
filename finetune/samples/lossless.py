"""A tokenizer gives back the text that it took, or nothing is learned from it: one without its vocabulary turns all text into nothing."""

from unicodedata import normalize

from ..errors import UserError
from .time_limit import of_texts

SHOWN = 30  # characters of a text in a message
LOOKED_AT = 20  # conversations of each batch that is rendered


def check(tokenizer, texts: list[str]) -> None:
    """UserError where decoding the ids of a text does not give the text, as the tokenizer's own normalization leaves it."""
    for text, ids in zip(texts, encoded(tokenizer, texts)):
        with of_texts(tokenizer, [text]):
            wanted = normalized(tokenizer, text)
            found = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if found not in (wanted, text):
            at = next((place for place, (one, other) in enumerate(zip(found, wanted)) if one != other), min(len(found), len(wanted)))
            begin = max(0, at - SHOWN // 2)
            lost, became = (each[begin : begin + SHOWN] for each in (wanted, found))
            what = f"{tokenizer.name_or_path}: its tokenizer loses text (of {lost!r} it makes {became!r})"
            raise UserError(f"{what} - take all of the tokenizer's files from the published checkpoint")


def encoded(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts, in which special tokens are ordinary characters. UserError where that takes all too long."""
    if hasattr(tokenizer, "encode_ordinary_batch"):  # first-generation Qwen's
        return tokenizer.encode_ordinary_batch(texts)
    with of_texts(tokenizer, texts):
        return [encoding.ids for encoding in backend_of(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]


def backend_of(tokenizer):
    """The tokenizer below transformers' own, which costs a third of its time; set as its last caller may not have."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def normalized(tokenizer, text: str) -> str:
    if hasattr(tokenizer, "encode_ordinary_batch"):
        return normalize("NFC", text)
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer is not None else text
