"""The tokenizer of first-generation Qwen: byte-level BPE through tiktoken, over qwen.tiktoken.

Tokens are bytes (a piece of text need not be whole characters), special tokens are strings. By default the surface
forms of special tokens in a text become the special tokens; `allowed_special=set()`, or transformers' own
`split_special_tokens=True`, leaves them ordinary text.
"""

import base64
import binascii
import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from unicodedata import normalize

import tiktoken
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.utils import logging

from .compat import overrides

logger = logging.get_logger(__name__)

VOCABULARY_NAME = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_RANKS = 151643  # ids 0 .. 151642 are pieces of text, the 208 special tokens follow
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

# tiktoken's regular expressions give up on a run of about a million blanks (a panic that no `except Exception` sees).
LONGEST_BLANK = 500_000
# Below this many characters in a batch, starting threads costs more than it saves.
SERIAL_CHARACTERS = 20_000
# Around a message's content on its way through the chat template. Text never holds them: surrogates are replaced first.
CONTENT_START, CONTENT_END = "\ud800", "\udfff"

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] or message['content'] is not string %}
        {{- raise_exception("a message needs the role system, user or assistant, and a content that is a string") }}
    {%- endif %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def read_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Reads a vocabulary file, lines of "base64 rank". Raises ValueError naming file and line of one it cannot read."""
    ranks = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise ValueError(f"{path}, line {number}: expected 'base64 rank', found {line[:60]!r}") from None
    return ranks


def add_ranks(ranks: dict[bytes, int], path: str | os.PathLike) -> None:
    """Adds the ranks of an `extra_vocab_file`. Tokens already there keep their id (a warning); a taken id fails."""
    taken = set(ranks.values())
    for token, rank in read_ranks(path).items():
        if ranks.get(token, rank) != rank:
            logger.warning(f"{path}: {token!r} is in the vocabulary already, it keeps its id {ranks[token]}")
        elif token not in ranks and (rank in taken or rank < N_RANKS + len(SPECIAL_TOKENS)):
            free = N_RANKS + len(SPECIAL_TOKENS)
            raise ValueError(f"{path}: id {rank} of {token!r} is taken - number new tokens from {free} on")
        else:
            ranks[token] = rank
            taken.add(rank)


def replace_surrogates(text: str) -> str:
    """Surrogate pairs become the character they mean, lone surrogates U+FFFD: what tiktoken does to them too."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_blanks(text: str) -> list[str]:
    """Cuts a text inside runs of blanks longer than tiktoken can take; nearly always, that is nowhere."""
    if len(text) <= LONGEST_BLANK:
        return [text]
    runs = [range(*run.span(), LONGEST_BLANK) for run in re.finditer(r"\s+", text)]
    cuts = [cut for run in runs for cut in run[1:]]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]


class QWenTokenizer(PreTrainedTokenizer):
    """First-generation Qwen's tokenizer.

    vocab_file: qwen.tiktoken; extra_vocab_file: ranks learned afterwards, ids from 151851 on; errors: how `decode`
    treats bytes that are not UTF-8 ("replace", "ignore", "strict"). There is no bos, eos or unk token unless one is
    set; <|endoftext|> serves as pad. A token set by name (`pad_token="<|extra_0|>"`) must be one of the 208 special.

    Attributes: tokenizer (the tiktoken.Encoding), mergeable_ranks (bytes -> id), special_tokens (str -> id), eod_id,
    im_start_id, im_end_id. Pickled and copied like any object.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_NAME}
    model_input_names = ["input_ids", "attention_mask"]
    _auto_class = "AutoTokenizer"  # save_pretrained writes this file and an auto_map beside the vocabulary

    def __init__(self, vocab_file, errors: str = "replace", extra_vocab_file=None, **kwargs):
        if vocab_file is None:
            raise ValueError(f"{kwargs.get('name_or_path') or 'the tokenizer folder'} has no {VOCABULARY_NAME}")
        self.errors = errors
        self.mergeable_ranks = read_ranks(vocab_file)
        if len({rank for rank in self.mergeable_ranks.values() if rank < N_RANKS}) < N_RANKS:
            raise ValueError(f"{vocab_file} is not complete: it should hold all ids from 0 to {N_RANKS - 1}")
        if extra_vocab_file is not None:
            add_ranks(self.mergeable_ranks, extra_vocab_file)
        self.special_tokens = {token: N_RANKS + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.tokenizer = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=self.mergeable_ranks, special_tokens=self.special_tokens
        )
        self.eod_id, self.im_start_id, self.im_end_id = (self.special_tokens[token] for token in SPECIAL_TOKENS[:3])
        self._special_names = {index: token for token, index in self.special_tokens.items()}

        # transformers' own bookkeeping of special tokens, so that its helpers (and servers built on them) know all 208
        self._added_tokens_decoder = {
            index: AddedToken(token, special=True, normalized=False) for index, token in self._special_names.items()
        }
        for index, token in kwargs.get("added_tokens_decoder", {}).items():
            self._add_tokens([token] if self._special_names.get(int(index)) != str(token) else [])
        kwargs["pad_token"] = kwargs.get("pad_token") or SPECIAL_TOKENS[0]
        kwargs["chat_template"] = kwargs.get("chat_template") or CHAT_TEMPLATE
        super().__init__(errors=errors, **kwargs)

    # -- vocabulary --

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: 151851 without extra tokens. (The model's vocab_size is padded above it.)"""
        return self.tokenizer.n_vocab

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[bytes | str, int]:
        """All tokens with their ids: pieces of text as bytes, special tokens as strings. They can be sorted together."""
        return {**self.mergeable_ranks, **{SpecialToken(token): index for token, index in self.special_tokens.items()}}

    @property
    def all_special_tokens(self) -> list[str]:
        """The 208 special tokens, and whatever else a user has set by name."""
        return list(dict.fromkeys([*self.special_tokens, *super().all_special_tokens]))

    @overrides(PreTrainedTokenizer, "new_tokens", "special_tokens")
    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        """Accepts the special tokens there are (0 are added). Ids of new ones would lie outside the embedding."""
        unknown = [str(token) for token in new_tokens if str(token) not in self.special_tokens]
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: not a token of Qwen's vocabulary, which has a fixed size - use one of "
                "<|extra_0|> to <|extra_204|>, or teach new pieces of text with extra_vocab_file"
            )
        return 0

    @overrides(PreTrainedTokenizer, "save_directory", "filename_prefix")
    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Writes qwen.tiktoken, extra tokens included, so that the folder needs no second file."""
        path = Path(save_directory, f"{filename_prefix}-{VOCABULARY_NAME}" if filename_prefix else VOCABULARY_NAME)
        by_rank = sorted(self.mergeable_ranks.items(), key=lambda item: item[1])
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank))
        return (str(path),)

    # -- text to ids --

    def encode_ordinary(self, text: str) -> list[int]:
        """Text to ids, NFC-normalized; special-token text stays ordinary text."""
        text = normalize("NFC", text)  # hands back the same object, at once, where text is NFC already
        if len(text) <= LONGEST_BLANK:
            return self.tokenizer.encode_ordinary(text)
        return [index for piece in cut_blanks(text) for index in self.tokenizer.encode_ordinary(piece)]

    def encode_ordinary_batch(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts, on all cores. A thread takes many texts at a time (tiktoken's batch call: one)."""
        return map_in_threads(self.encode_ordinary, texts)

    def encode_special(self, text: str, allowed_special="all", disallowed_special=()) -> list[int]:
        """Text to ids, NFC-normalized; the surface forms of `allowed_special` ("all" or a set) become special tokens.

        Raises ValueError where the text holds a form of `disallowed_special`.
        """
        pieces = cut_blanks(normalize("NFC", text))
        allowed = allowed_special if allowed_special == "all" else set(allowed_special)
        special = {"allowed_special": allowed, "disallowed_special": disallowed_special}
        return list(chain.from_iterable(self.tokenizer.encode(piece, **special) for piece in pieces))

    def _encode_marked(self, text: str) -> list[int]:
        """A rendered chat with marked contents: those are ordinary text, what the template wrote around them is not."""
        template_text, *marked = text.split(CONTENT_START)
        ids = self.encode_special(template_text)
        for part in marked:
            content, template_text = part.split(CONTENT_END)
            ids += self.encode_ordinary(content) + self.encode_special(template_text)
        return ids

    def tokenize(self, text: str, allowed_special=None, disallowed_special=(), split_special_tokens=None, **kwargs):
        """Text to tokens: bytes, and strings for special tokens."""
        allowed_special = self._allowed(allowed_special, split_special_tokens)
        return self.convert_ids_to_tokens(self.encode_special(text, allowed_special, disallowed_special))

    def _allowed(self, allowed_special, split_special_tokens):
        """`allowed_special` as given; else nothing under transformers' split_special_tokens, and all without it."""
        if allowed_special is not None:
            return allowed_special
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        return set() if split else "all"

    @overrides(PreTrainedTokenizer, "text", "text_pair", "padding_strategy", "truncation_strategy")
    def _encode_plus(
        self, text, text_pair=None, allowed_special=None, disallowed_special=(), content_marked=False, **kwargs
    ) -> BatchEncoding:
        """What tokenizer(...) and encode(...) end in: texts are encoded together, in threads."""
        texts = [text] if isinstance(text, str) else text
        plain = isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
        rare = ("is_split_into_words", "return_overflowing_tokens", "sanitize_control_tokens")
        if text_pair is not None or not plain or any(kwargs.get(key) for key in rare):
            special = {"allowed_special": allowed_special, "disallowed_special": disallowed_special}
            return super()._encode_plus(text, text_pair, **special, **kwargs)

        allowed_special = self._allowed(allowed_special, kwargs.pop("split_special_tokens", None))
        if content_marked:
            encode = self._encode_marked
        elif not allowed_special and not disallowed_special:
            encode = self.encode_ordinary
        else:
            encode = lambda text: self.encode_special(text, allowed_special, disallowed_special)  # noqa: E731
        rows = map_in_threads(encode, texts)
        return self._collate(rows, batched=not isinstance(text, str), **kwargs)

    def _collate(self, rows: list[list[int]], batched: bool, padding_strategy, truncation_strategy, **kwargs):
        """Ids to a BatchEncoding: truncated, then padded together, then tensors if `return_tensors` asks for them."""
        pad = {key: kwargs.pop(key, None) for key in ("pad_to_multiple_of", "padding_side", "return_attention_mask")}
        pad |= {"padding": padding_strategy.value, "max_length": kwargs.get("max_length")}
        tensors = kwargs.pop("return_tensors", None)
        kwargs["truncation"] = truncation_strategy.value
        if not batched:
            return self.prepare_for_model(rows[0], return_tensors=tensors, prepend_batch_axis=True, **kwargs | pad)
        prepared = [self.prepare_for_model(row, return_attention_mask=False, **kwargs) for row in rows]
        batch = {key: [row[key] for row in prepared] for key in prepared[0]}
        return BatchEncoding(self.pad(batch, **pad), tensor_type=tensors)

    # -- ids to text --

    def convert_tokens_to_ids(self, tokens):
        """bytes or str -> id (None if there is no such token); a list of them -> a list of ids."""
        if not isinstance(tokens, (bytes, str)):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        if isinstance(tokens, bytes):
            return self.mergeable_ranks.get(tokens)
        return self.special_tokens.get(tokens, self.mergeable_ranks.get(tokens.encode("utf-8", "replace")))

    def convert_ids_to_tokens(self, ids, skip_special_tokens: bool = False):
        """id -> bytes, str (special token) or None (no such id: the model's vocabulary is padded); a list -> a list."""
        if isinstance(ids, int):
            return self._token(ids)
        ids = [int(index) for index in ids]
        return [self._token(index) for index in ids if not (skip_special_tokens and index in self._special_names)]

    def _token(self, index: int) -> bytes | str | None:
        if index in self._special_names:
            return self._special_names[index]
        try:
            return self.tokenizer.decode_single_token_bytes(index)
        except KeyError:
            return None

    _convert_id_to_token = _token  # the name under which generate's stop_strings looks for it

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that the ids stand for. An id that is no token (the model's vocabulary is padded) is U+FFFD."""
        try:
            return self.tokenizer.decode_bytes(ids)
        except KeyError:
            return b"".join(as_bytes(self._token(index)) for index in ids)

    def convert_tokens_to_string(self, tokens: list[bytes | str]) -> str:
        return b"".join(map(as_bytes, tokens)).decode("utf-8", errors=self.errors)

    @overrides(PreTrainedTokenizer, "token_ids", "skip_special_tokens", "clean_up_tokenization_spaces")
    def _decode(
        self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, errors=None, **kwargs
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if skip_special_tokens:
            ids = [index for index in ids if index not in self._special_names]
        text = self.decode_bytes(ids).decode("utf-8", errors=errors or self.errors)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    # -- chat --

    @overrides(PreTrainedTokenizer, "conversation", "tokenize", "tokenizer_kwargs")
    def apply_chat_template(
        self,
        conversation,
        tools=None,
        documents=None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **kwargs,
    ):
        """transformers' method, which see.

        Tokenized with this class's own template, contents are ordinary text (no character of a message can become a
        control token) and tokenized by themselves: the ids of `chat`. Other templates are left to transformers.
        """
        if tokenize and self.get_chat_template(chat_template, tools) == CHAT_TEMPLATE:
            conversation = mark_contents(conversation)
            kwargs["tokenizer_kwargs"] = {**(kwargs.get("tokenizer_kwargs") or {}), "content_marked": True}
            kwargs.pop("sanitize_control_tokens", None)  # done, and more of it
        return super().apply_chat_template(
            conversation,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            **kwargs,
        )


class SpecialToken(str):
    """A special token's name, which takes its place among tokens that are bytes: `generate`'s stop_strings sorts them."""

    __hash__ = str.__hash__

    def __lt__(self, other) -> bool:
        return as_bytes(self) < as_bytes(other)

    def __gt__(self, other) -> bool:
        return as_bytes(self) > as_bytes(other)


def as_bytes(token: bytes | str | None) -> bytes:
    """A token as `convert_ids_to_tokens` gives it, as bytes; None (an id that is no token) as U+FFFD."""
    if token is None:
        return "\ufffd".encode()
    return token if isinstance(token, bytes) else token.encode()


def mark_contents(conversation):
    """A copy of one conversation or a list of them, with each message's content between the two markers."""
    if isinstance(conversation, dict):
        text = conversation.get("content")
        if not isinstance(text, str):
            return conversation  # the template says what is wrong with it
        return {**conversation, "content": CONTENT_START + replace_surrogates(text) + CONTENT_END}
    messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"a message must be a dict with role and content, found {messages!r}")
    return [mark_contents(message) for message in messages]


def map_in_threads(function, texts: list[str]) -> list:
    """[function(text) for text in texts], on all cores: tiktoken lets go of the interpreter while it works."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(8, cores, len(texts))
    if threads < 2 or sum(map(len, texts)) < SERIAL_CHARACTERS:
        return [function(text) for text in texts]
    size = -(-len(texts) // (threads * 8))  # pieces small enough that the threads end together
    pieces = [texts[start : start + size] for start in range(0, len(texts), size)]
    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(lambda piece: [function(text) for text in piece], pieces)
        return list(chain.from_iterable(done))
