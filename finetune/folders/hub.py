"""Models that are no folder yet: fetched from the Hugging Face Hub, or with USE_MODELSCOPE=1 from ModelScope."""

import os
import textwrap
from pathlib import Path

from ..errors import UserError
from . import meant
from .model_folder import is_hub_id

PATTERNS = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.tiktoken", "*.txt", "*.jinja", "*.model"]  # no code


class NotFetched(UserError):
    """why: from where, and for what reason."""

    def __init__(self, finding: str, why: str):
        super().__init__(finding)
        self.why = why


def find_folder(name: str, cache_dir: str | None = None) -> Path:
    """The model's folder: a path as it is, or the id of a model on a hub, downloaded."""
    if os.path.isdir(name):
        return Path(name).resolve()  # an adapter stores it: it must mean the same from every folder
    return fetch(name, cache_dir)


def fetch(name: str, cache_dir: str | None = None) -> Path:
    """The folder that OWNER/NAME was downloaded to, now or before: weights, config and tokenizer; no code."""
    if not is_hub_id(name):
        what = f"{name}: no such folder - give the folder of a checkpoint, or its Hugging Face id"
        raise NotFetched(what + meant.folder(name, meant.EITHER), "no such folder")
    if os.environ.get("USE_MODELSCOPE", "").lower() in ("1", "true"):
        source, download = "ModelScope", modelscope_download()
    else:
        from huggingface_hub import snapshot_download as download

        source = "the Hugging Face Hub"
    try:
        return Path(download(name, cache_dir=cache_dir, allow_patterns=PATTERNS))
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        what = f"{name}: no such folder, and it could not be fetched from {source}"
        remedy = f"mend that, or give the folder of a checkpoint{meant.folder(name, meant.EITHER)}"
        raise NotFetched(f"{what} ({reason}) - {remedy}", f"{source}: {reason}") from error


def modelscope_download():
    """The package's function, of the same use as the Hugging Face Hub's."""
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise UserError("USE_MODELSCOPE=1: the package modelscope is not installed - pip install modelscope") from error
    return snapshot_download
