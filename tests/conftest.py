"""Puts the repository root on the path, and holds the tokenizer that all tests share (do not change it in a test)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def tokenizer():
    from qwen_model.tokenization_qwen import QWenTokenizer
    from qwen_model.vocabulary import find_vocabulary

    return QWenTokenizer(find_vocabulary())
