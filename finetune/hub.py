"""Models that are no folder yet: fetched from the Hugging Face Hub, or with USE_MODELSCOPE=1 from ModelScope."""

import os
from pathlib import Path

from .errors import UserError

PATTERNS = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.tiktoken", "*.txt", "*.jinja", "*.model"]  # no code


def fetch(name: str, cache_dir: str | None = None) -> Path:
    """The folder that OWNER/NAME was downloaded to, now or before: weights, config and tokenizer; no code."""
    if os.environ.get("USE_MODELSCOPE", "").lower() in ("1", "true"):
        source, download = "ModelScope", modelscope_download()
    else:
        from huggingface_hub import snapshot_download as download

        source = "the Hugging Face Hub"
    try:
        return Path(download(name, cache_dir=cache_dir, allow_patterns=PATTERNS))
    except Exception as error:
        raise UserError(
            f"--model_name_or_path {name}: no such folder, and it could not be fetched from {source} "
            f"({type(error).__name__}) - give the folder of a checkpoint with -m"
        ) from error


def modelscope_download():
    """The package's function, of the same use as the Hugging Face Hub's."""
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise UserError("USE_MODELSCOPE=1: the package modelscope is not installed - pip install modelscope") from error
    return snapshot_download
