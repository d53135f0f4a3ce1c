"""Base model or chat model? Told by what the checkpoint's files say of where its answers end; never by its name.

A base model has not seen the chat format's tokens in training, so LoRA trains their rows of embedding and head as well.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..folders import config_files

END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
OF_FORMAT = {"chatml": "chat", "raw": "base"}
OF_END = {END_OF_TURN: "chat", END_OF_TEXT: "base"}


def kind(folder: Path) -> str | None:
    """ "base", "chat", or None where the files do not tell: generation_config.json, else the tokenizer's eos_token."""
    settings, tokenizer = read(folder / "generation_config.json"), read(folder / "tokenizer_config.json")
    if config_files.config_of(folder).get("model_type") == "qwen":
        return OF_FORMAT.get(settings.get("chat_format"))
    stops, ids = settings.get("eos_token_id"), special_tokens(folder, tokenizer)
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    if ids.get(END_OF_TURN) in stops:
        return "chat"
    if stops == {ids.get(END_OF_TEXT)}:
        return "base"
    return OF_END.get(text_of(tokenizer.get("eos_token")))


def embeddings_of_run(args, folder: Path) -> str:
    """--train_embeddings, with auto decided: "chat_rows" for a base model, "none" for a chat model; else as given."""
    if args.lora.train_embeddings != "auto":
        return args.lora.train_embeddings
    given = args.model.model_kind
    return "chat_rows" if (kind(folder) if given == "auto" else given) == "base" else "none"


def kind_problems(args, folder: Path) -> Iterator[str]:
    """A line where --train_embeddings auto has to know the kind, and files do not tell or the folder's name says another."""
    lora, begun = args.lora, args.lora.lora_weight_path is not None  # an adapter knows what trains in it
    if (
        not (lora.use_lora or lora.q_lora)
        or begun
        or (lora.train_embeddings, args.model.model_kind) != ("auto", "auto")
    ):
        return
    found, named, what = kind(folder), kind_in_name(folder), f"--model_name_or_path {args.model.model_name_or_path}"
    if found is None:
        missing = "generation_config.json does not say whether it is a base or a chat model"
        yield f"{what}: {missing} - give --model_kind base or chat"
    elif named not in (None, found):
        yield f"{what}: folder name says {named}, generation_config says {found} - give --model_kind base or chat"


def kind_in_name(folder: Path) -> str | None:
    """What the folder's own name says, or that of the model in the Hub's cache: Qwen2.5-7B-Instruct, Qwen3-8B-Base."""
    words = re.split(r"[^a-z0-9]+", config_files.name_of(folder).lower())
    says = {
        "chat": {"chat", "instruct"} & set(words),
        "base": "base" in words[1:],
    }  # a folder may be called just "base"
    said = [kind for kind, found in says.items() if found]
    return said[0] if len(said) == 1 else None


def special_tokens(folder: Path, tokenizer: dict) -> dict[str, int]:
    """{token: id} of what the tokenizer's files list beside the vocabulary."""
    listed = tokenizer.get("added_tokens_decoder") or {}
    if found := {text_of(token): int(index) for index, token in listed.items()}:
        return found
    whole = read(folder / "tokenizer.json").get("added_tokens") or []
    return {token["content"]: token["id"] for token in whole} or read(folder / "added_tokens.json")


def text_of(token) -> str | None:
    """Tokenizer files hold a token as its text, or as an object with it."""
    return token.get("content") if isinstance(token, dict) else token


def read(path: Path) -> dict:
    """A JSON object, or {} where there is none to read."""
    try:
        return config_files.read_json(path)
    except UserError:
        return {}
