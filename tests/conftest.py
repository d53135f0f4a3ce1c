"""Puts the repository root on the path, and holds the tokenizer that all tests share (do not change it in a test)."""

import os
import signal
import sys
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parent.parent))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer():
    from qwen_model.tokenization_qwen import QWenTokenizer
    from qwen_model.vocabulary import find_vocabulary

    return QWenTokenizer(find_vocabulary())


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory):
    """The key that checkpoints are signed with is of these tests, not of who runs them."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def settings_of_packages():
    """Importing gptqmodel moves Hugging Face's folders, for every program that is started later, too: not in a test."""
    warm.restore_settings()
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)  # which --logging_dir sets
