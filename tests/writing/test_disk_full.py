"""A disk that is full in a save: one line with what is needed and free, and the half one is gone."""

import errno
import os

import pytest
import safetensors

from finetune import errors
from finetune.errors import DiskFull
from finetune.folders import output_folder
from finetune.writing import disk_full

FULL = {
    "Python": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "a quota": lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "safetensors": lambda: safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": lambda: RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 22"),
}


@pytest.mark.parametrize("how", FULL)
def test_it_is_one_line(tmp_path, how):
    staging = output_folder.begin_staging(tmp_path)
    (staging / "half").write_text("a")
    with pytest.raises(DiskFull) as raised, disk_full.told(tmp_path, "checkpoint-4", 3e9, staging):
        raise FULL[how]()
    line = errors.explained(raised.value)
    assert line.startswith(f"{tmp_path}: no room for checkpoint-4: it takes about 3 GB, ") and " GB are free" in line
    assert "\n" not in line and list(tmp_path.iterdir()) == []


def test_what_it_takes_is_no_less_than_was_written(tmp_path):
    """A small adapter's checkpoint: the tokenizer beside it is more than its weights."""
    staging = output_folder.begin_staging(tmp_path)
    (staging / "checkpoint-4").mkdir()
    (staging / "checkpoint-4" / "qwen.tiktoken").write_bytes(bytes(2_500_000))
    with pytest.raises(DiskFull, match="it takes more than 0.0025 GB, "), disk_full.told(tmp_path, "checkpoint-4", 3e4, staging):
        raise FULL["Python"]()


def test_anything_else_is_no_full_disk(tmp_path):
    staging = output_folder.begin_staging(tmp_path)
    with pytest.raises(RuntimeError, match="^a fault$"), disk_full.told(tmp_path, "checkpoint-4", 3e9, staging):
        raise RuntimeError("a fault")
    assert staging.exists()


def test_a_full_disk_elsewhere_is_a_line_too():
    line = errors.explained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/training_log.jsonl"))
    assert line.startswith("out/training_log.jsonl: could not be written, the disk or its quota is full - ")
