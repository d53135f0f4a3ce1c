"""A folder of the cache: one data set as arrays in files, memory-mapped. Its name is a hash over all that its content depends on.

It holds ids and labels of all samples one behind the other (int32), where each begins (offsets, int64), how many of its tokens are
supervised (int64) and the sum of their weights (float64), the number of its conversation and a hash of that one's prompt (int64), and
meta.json, which has the SHA-256 of every array; the weights of all tokens (float32) only where some are not 1, and what was left out, JSON lines, only where something was.
Such a folder may be deleted at any time; a file of conversations is then rendered again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from .. import json_text
from ..data_files.sample_files import SampleFile
from ..hashing import sha256_of_array
from .renderers import renderer_of

ABANDONED_SECONDS = 3600  # a temporary folder that nobody has written to for so long belongs to a killed run
ARRAYS = {
    "ids": np.int32, "labels": np.int32, "offsets": np.int64, "supervised": np.int64, "weight_sums": np.float64,
    "conversations": np.int64, "prompts": np.int64, "weights": np.float32, "left_out": np.uint8,
}  # fmt: skip


class Writer:
    """Writes samples into a folder of the cache, one behind the other."""

    def __init__(self, folder: Path):
        self.folder, self.digest, self.tokens = folder, hashlib.sha256(), 0
        self.hashes = {}  # of each file, as it is written
        self.lengths, self.supervised, self.weight_sums, self.conversations, self.prompts = [], [], [], [], []
        self.left_out = 0  # bytes
        self.files = {name: open(folder / name, "wb") for name in ("ids", "labels")}

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for file in self.files.values():
            file.close()

    def add(self, ids: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, conversation: int, prompt: int) -> None:
        """ids, labels int32[T], weights float32[T] or None for 1 everywhere; conversation, prompt: its number, and its prompt's hash."""
        self.conversations.append(conversation)
        self.prompts.append(prompt)
        if weights is not None and "weights" not in self.files:  # the first: all that came before count 1
            self.files["weights"] = open(self.folder / "weights", "wb")
            for begin in range(0, self.tokens, 1 << 20):
                self._write("weights", np.ones(min(1 << 20, self.tokens - begin), np.float32))
        self._write("ids", np.ascontiguousarray(ids, np.int32))
        self._write("labels", np.ascontiguousarray(labels, np.int32))
        counts = labels[1:] >= 0
        self.tokens += len(ids)
        self.lengths.append(len(ids))
        self.supervised.append(np.count_nonzero(counts))
        self.weight_sums.append(self.supervised[-1] if weights is None else weights[1:][counts].sum(dtype=np.float64))
        if "weights" in self.files:
            self._write("weights", np.ones(len(ids), np.float32) if weights is None else np.ascontiguousarray(weights, np.float32))

    def leave_out(self, line: dict) -> None:
        """Keeps what is left out, and why."""
        text = (json_text.dumps(line) + "\n").encode(errors="surrogatepass")
        if not self.left_out:
            self.files["left_out"] = open(self.folder / "left_out", "wb")
        self.put("left_out", text)
        self.left_out += len(text)

    def _write(self, name: str, values: np.ndarray) -> None:
        self.put(name, values)
        self.digest.update(values)

    def put(self, name: str, content) -> None:
        self.files[name].write(content)
        self.hashes.setdefault(name, hashlib.sha256()).update(content)

    def finish(self, meta: dict) -> None:
        """Writes what is known at the end."""
        offsets = np.concatenate(([0], np.cumsum(self.lengths))).astype(np.int64)
        self.digest.update(offsets)
        arrays = {"offsets": offsets}
        arrays |= {name: np.array(getattr(self, name), ARRAYS[name]) for name in ("supervised", "weight_sums", "conversations", "prompts")}
        for name, array in arrays.items():
            array.tofile(self.folder / name)
        meta |= {"samples": len(self.lengths), "tokens": self.tokens, "weighted": "weights" in self.files, "left_out": self.left_out}
        meta |= {"fingerprint": self.digest.hexdigest()}
        meta["hashes"] = {name: digest.hexdigest() for name, digest in self.hashes.items()}
        meta["hashes"] |= {name: sha256_of_array(array) for name, array in arrays.items()}
        json_text.write(self.folder / "meta.json", meta | {"hash": hash_of_meta(meta)}, indent=None)


def hash_of_meta(meta: dict) -> str:
    """Of what meta.json says, notes and fingerprint among it."""
    kept = {name: value for name, value in meta.items() if name != "hash"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def user_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def key_of(file: SampleFile, tokenizer, settings: dict) -> str:
    """A hash over what the rendered samples depend on: the file's bytes, our code, the tokenizer, the settings."""
    here, model = Path(__file__).parents[1], Path(__file__).parents[2] / "qwen_model"
    code = [source for wing in ("data_files", "conversations", "samples") for source in sorted((here / wing).glob("*.py"))]
    code += [model / f"{name}.py" for name in ("chatml", "react", "react_text")]
    parts = [file.content_hash(), *(_file_hash(source) for source in code), _tokenizer_hash(tokenizer), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _file_hash(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_hash(tokenizer) -> str:
    """A hash over vocabulary, special tokens, format and, through a probe, the way text is normalized and taken apart."""
    if hasattr(tokenizer, "mergeable_ranks"):
        ranks = tokenizer.mergeable_ranks
        vocabulary = b"".join(b"%d %d " % (rank, len(token)) + token for token, rank in ranks.items())
    elif hasattr(tokenizer, "backend_tokenizer"):
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        passing = dict.fromkeys(("padding", "truncation"))  # set by whoever called the tokenizer last
        vocabulary = json.dumps(whole | passing).encode()
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    return hashlib.sha256(vocabulary + renderer_of(tokenizer).identity().encode()).hexdigest()


def open_folder(folder: Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """The arrays of a folder, memory-mapped, and its meta; None where there is none, or a part is missing or not as it was written.

    Every byte is read and hashed, 1.5 GB a second: what is damaged must not be trained on.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        samples, tokens = meta["samples"], meta["tokens"]
        sizes = {"ids": tokens, "labels": tokens, "offsets": samples + 1, "supervised": samples}
        sizes |= dict.fromkeys(("weight_sums", "conversations", "prompts"), samples)
        sizes |= ({"weights": tokens} if meta["weighted"] else {}) | ({"left_out": meta["left_out"]} if meta["left_out"] else {})
        # a plain array over the mapping: slicing it costs a tenth of slicing a memmap
        arrays = {name: np.asarray(np.memmap(folder / name, ARRAYS[name], "r")) for name in sizes}
        whole = meta["hash"] == hash_of_meta(meta) and all(len(arrays[name]) == size for name, size in sizes.items())
        same = whole and all(sha256_of_array(array) == meta["hashes"][name] for name, array in arrays.items())
        return (arrays, meta) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def temporary_folder(root: Path) -> Iterator[Path]:
    """A new folder below root, gone afterwards unless it was renamed; sweeps away those that killed runs left."""
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(".unfinished-*"):
        with suppress(FileNotFoundError):  # another process has just finished with it
            touched = max(part.stat().st_mtime for part in (old, *old.iterdir()))
            if time.time() - touched > ABANDONED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Gives a finished folder its name, unless another process was faster; what is on disk then is complete."""
    for name in [path.name for path in temporary.iterdir()]:
        with open(temporary / name, "rb") as file:
            os.fsync(file.fileno())
    try:
        os.rename(temporary, folder)
    except OSError:
        if not open_folder(folder):  # a damaged one is in the way
            damaged = temporary.with_name(f"{temporary.name}-damaged")
            os.rename(folder, damaged)
            os.rename(temporary, folder)
            shutil.rmtree(damaged, ignore_errors=True)
