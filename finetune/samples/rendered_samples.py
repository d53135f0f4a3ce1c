"""From a conversation file to training samples: rendered once, kept in a cache folder, memory-mapped from there.

sample_store.py has the folders of the cache, laying_out.py what becomes of the conversations.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from .. import json_text
from ..conversations.reading import read
from ..data_files.sample_files import SampleFile
from ..distributed.ranks import one_at_a_time
from ..errors import UserError, note
from .laying_out import lay_out
from .long_samples import WAYS
from .rendering import Rendering
from .sample_store import key_of, open_folder, publish, temporary_folder, user_cache_dir


class Samples:
    """The rendered samples of one file: samples[i] is (ids, labels), read-only int32 arrays, at most max_length long.

    lengths, supervised: int64[n], tokens of each sample, and those of them with a label (not position 0, which nothing
    predicts). weight_sums: float64[n], the sum of the weights of those. total_tokens, total_supervised: sums over the
    samples. conversations, prompts: int64[n], the number of each sample's conversation in the file, from 1, and a hash of its
    prompt. left_out: JSON lines (UTF-8), what --bad_samples drop left out. system: the system text that all conversations have; None where
    they have none, or several. without_thoughts: True if the model can think and every
    answer was learned without thoughts. notes: lines to print. fingerprint: a hash of all ids, labels, weights and lengths, thus equal wherever the samples are the same ones.
    """

    def __init__(self, path: str, max_length: int, arrays: dict[str, np.ndarray], meta: dict):
        self.path, self.max_length = path, max_length
        self._ids, self._labels, self._offsets = arrays["ids"], arrays["labels"], arrays["offsets"]
        self.supervised, self.weight_sums = arrays["supervised"], arrays["weight_sums"]
        self.conversations, self.prompts = arrays["conversations"], arrays["prompts"]
        self._weights = arrays.get("weights")
        self.lengths = np.diff(self._offsets)
        self.total_tokens, self.total_supervised = int(self._offsets[-1]), int(self.supervised.sum())
        self.fingerprint, self.without_thoughts = meta["fingerprint"], meta["without_thoughts"]
        self.system: str | None = meta["system"]
        lines = arrays["left_out"].tobytes().splitlines(True) if "left_out" in arrays else []
        head = json_text.dumps({"file": path})[:-1].encode() + b", "
        self.left_out = b"".join(head + line[1:] for line in lines)
        self.notes = [f"{path}: {line}" for line in meta["notes"]]

    def __len__(self) -> int:
        return len(self.supervised)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        begin, end = self._offsets[i % len(self)], self._offsets[i % len(self) + 1]
        return self._ids[begin:end], self._labels[begin:end]

    def token_weights(self, i: int) -> np.ndarray | None:
        """What each token of sample i counts in the loss, float32[T]; None where all that are supervised count 1."""
        if self._weights is None:
            return None
        _, labels = self[i]
        weights = self._weights[self._offsets[i % len(self)] :][: len(labels)]
        return None if (weights[labels >= 0] == 1).all() else weights

    def origin(self, i: int) -> tuple[str, int]:
        """Where sample i comes from: the file, and the number of its conversation there, from 1."""
        return self.path, int(self.conversations[i])

    def describe(self) -> str:
        return described(self)


def described(samples) -> str:
    """Samples in one line for people."""
    share = f"{samples.total_supervised:,} of them supervised ({samples.total_supervised / samples.total_tokens:.0%})"
    longest = f"longest {samples.lengths.max():,} (limit {samples.max_length:,})"
    return f"{samples.path}: {len(samples):,} samples, {samples.total_tokens:,} tokens, {share}, {longest}"


def load(
    path: str | os.PathLike,
    tokenizer,
    *,
    max_length: int,
    cache_dir: str | os.PathLike | None = None,
    long_samples: str = "cut",
    bad_samples: str = "error",
    flag: str = "--data_path",
    **rendering,
) -> Samples:
    """Reads, checks and renders a file of conversations, or opens what an earlier call rendered from the same content.

    max_length: tokens per sample; long_samples: what happens to longer ones, of long_samples.WAYS. bad_samples: "error", or "drop"
    to leave out what is wrong. rendering: see rendering.Rendering. cache_dir: default FINETUNE_CACHE or the user's cache folder. flag: the option that
    named the file.
    Of several processes that call it together, one renders and the others wait for its result.
    Raises UserError with everything that is wrong with the file, and where samples have no answer left to learn from.
    """
    assert long_samples in WAYS and bad_samples in ("error", "drop"), (long_samples, bad_samples)
    file = SampleFile(path, flag)
    settings = {
        "max_length": max_length, "long_samples": long_samples, "bad_samples": bad_samples, "rendering": Rendering(**rendering)
    }  # fmt: skip
    root = Path(cache_dir or os.environ.get("FINETUNE_CACHE") or user_cache_dir() / "finetune").expanduser()
    folder = root / key_of(file, tokenizer, settings)
    if stored := open_folder(folder):
        return Samples(file.path, max_length, *stored)
    conversations = None
    try:
        with one_at_a_time(f"rendering-{folder.name[:16]}"):
            if stored := open_folder(folder):  # another process of this machine has just done it
                return Samples(file.path, max_length, *stored)
            if folder.exists():
                note(f"{folder}: the rendered samples are not as they were written, so the data is rendered again")
            conversations = read(path, flag=flag, bad_samples=bad_samples)
            with temporary_folder(root) as temporary:
                lay_out(conversations, tokenizer, temporary, **settings)
                file.check_unchanged()  # since it was hashed
                samples = Samples(file.path, max_length, *open_folder(temporary))  # what is mapped may be renamed
                publish(temporary, folder)
                return samples
    except OSError as error:
        reason = error.strerror or error
        note(f"the cache folder {root} cannot be written ({reason}): the data will be rendered again next time")
    if conversations is None:
        conversations = read(path, flag=flag, bad_samples=bad_samples)
    try:
        with tempfile.TemporaryDirectory() as temporary:  # its files live on as long as they are mapped
            lay_out(conversations, tokenizer, Path(temporary), **settings)
            return Samples(file.path, max_length, *open_folder(Path(temporary)))
    except OSError as error:
        remedy = "give FINETUNE_CACHE a folder that has room"
        raise UserError(f"{file.path}: the rendered samples cannot be written ({error}); {remedy}") from error
