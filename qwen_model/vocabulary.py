"""Where to find qwen.tiktoken, the vocabulary file of first-generation Qwen, on this machine."""

import hashlib
import importlib.util
from pathlib import Path

VOCABULARY_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def find_vocabulary() -> Path:
    """The published qwen.tiktoken inside the installed PyPI package `dashscope`, which is found but not imported.

    Every published checkpoint folder holds the same file; this one serves where there is no checkpoint yet.
    Raises ValueError, with the command to run, where the package is missing or carries another file.
    """
    spec = importlib.util.find_spec("dashscope")
    folders = spec.submodule_search_locations if spec else []
    found = [path for folder in folders if (path := Path(folder, "resources", "qwen.tiktoken")).is_file()]
    if not found:
        raise ValueError("qwen.tiktoken is not on this machine - run: pip install dashscope (the package carries it)")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != VOCABULARY_SHA256:
        raise ValueError(f"{found[0]} is not the published vocabulary - run: pip install --force-reinstall dashscope")
    return found[0]
