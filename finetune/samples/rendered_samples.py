"""From a conversation file to training samples: rendered once, kept in a cache folder, memory-mapped from there.

A folder of the cache holds one data set: ids and labels of all samples one behind the other (int32), where each begins
(offsets, int64), how many of its tokens are supervised (int64) and the sum of their weights (float64), and meta.json; the
weights of all tokens (float32) only where some are not 1. Its name is a hash over everything that its content depends on.
Such a folder may be deleted at any time; a file of conversations is then rendered again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..conversations.data_notes import too_long
from ..conversations.messages import Conversation
from ..conversations.reading import Conversations, read
from ..data_files.sample_files import SampleFile
from ..distributed.ranks import one_at_a_time
from ..errors import UserError, note, on_first_rank
from .renderers import renderer_of
from .rendering import Rendering

BATCH_CHARS, BATCH_SAMPLES = 1 << 20, 2048  # of one tokenizer call: enough for its threads, little enough for memory
ABANDONED_SECONDS = 3600  # a temporary folder that nobody has written to for so long belongs to a killed run
ARRAYS = {"ids": np.int32, "labels": np.int32, "offsets": np.int64, "supervised": np.int64, "weight_sums": np.float64}
WEIGHTS = {"weights": np.float32}  # beside them, where some are not 1


class Samples:
    """The rendered samples of one file: samples[i] is (ids, labels), read-only int32 arrays, at most max_length long.

    lengths, supervised: int64[n], tokens of each sample, and those of them with a label (not position 0, which nothing
    predicts). weight_sums: float64[n], the sum of the weights of those. total_tokens, total_supervised: sums over the
    samples. without_thoughts: True if the model can think and every answer was learned without thoughts. notes: lines to
    print. fingerprint: a hash of all ids, labels, weights and lengths, thus equal wherever the samples are the same ones.
    """

    def __init__(self, path: str, max_length: int, arrays: dict[str, np.ndarray], meta: dict):
        self.path, self.max_length = path, max_length
        self._ids, self._labels, self._offsets = arrays["ids"], arrays["labels"], arrays["offsets"]
        self.supervised, self.weight_sums = arrays["supervised"], arrays["weight_sums"]
        self._weights = arrays.get("weights")
        self.lengths = np.diff(self._offsets)
        self.total_tokens, self.total_supervised = int(self._offsets[-1]), int(self.supervised.sum())
        self.fingerprint, self.without_thoughts = meta["fingerprint"], meta["without_thoughts"]
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

    def describe(self) -> str:
        """One line for people."""
        share = f"{self.total_supervised:,} of them supervised ({self.total_supervised / self.total_tokens:.0%})"
        longest = f"longest {self.lengths.max():,} (limit {self.max_length:,})"
        return f"{self.path}: {len(self):,} samples, {self.total_tokens:,} tokens, {share}, {longest}"


def load(
    path: str | os.PathLike,
    tokenizer,
    *,
    max_length: int,
    cache_dir: str | os.PathLike | None = None,
    long_samples: str = "cut",
    flag: str = "--data_path",
    **rendering,
) -> Samples:
    """Reads, checks and renders a file of conversations, or opens what an earlier call rendered from the same content.

    max_length: tokens per sample; what is longer is cut on the right (long_samples "cut") or left out ("drop").
    rendering: see rendering.Rendering. cache_dir: default FINETUNE_CACHE or the user's cache folder. flag: the option that
    named the file.
    Of several processes that call it together, one renders and the others wait for its result.
    Raises UserError with everything that is wrong with the file, and where samples have no answer left to learn from.
    """
    assert long_samples in ("cut", "drop"), long_samples
    file = SampleFile(path, flag)
    settings = {"max_length": max_length, "long_samples": long_samples, "rendering": Rendering(**rendering)}
    root = Path(cache_dir or os.environ.get("FINETUNE_CACHE") or _user_cache_dir() / "finetune").expanduser()
    folder = root / _key(file.path, tokenizer, settings)
    if stored := _open(folder):
        return Samples(file.path, max_length, *stored)
    conversations = None
    try:
        with one_at_a_time(f"rendering-{folder.name[:16]}"):
            if stored := _open(folder):  # another process of this machine has just done it
                return Samples(file.path, max_length, *stored)
            conversations = read(path, flag=flag)
            with _temporary_folder(root) as temporary:
                _render(conversations, tokenizer, temporary, **settings)
                file.check_unchanged()  # since it was hashed
                samples = Samples(file.path, max_length, *_open(temporary))  # what is mapped may be renamed
                _publish(temporary, folder)
                return samples
    except OSError as error:
        reason = error.strerror or error
        note(f"the cache folder {root} cannot be written ({reason}): the data will be rendered again next time")
    if conversations is None:
        conversations = read(path, flag=flag)
    try:
        with tempfile.TemporaryDirectory() as temporary:  # its files live on as long as they are mapped
            _render(conversations, tokenizer, Path(temporary), **settings)
            return Samples(file.path, max_length, *_open(Path(temporary)))
    except OSError as error:
        remedy = "give FINETUNE_CACHE a folder that has room"
        raise UserError(f"{file.path}: the rendered samples cannot be written ({error}); {remedy}") from error


def _render(
    conversations: Conversations, tokenizer, folder: Path, *, max_length: int, long_samples: str, rendering: Rendering
) -> None:
    """Writes the samples of conversations into folder, cut or dropped as long_samples says."""
    from qwen_model.chatml import IGNORE  # reading data does without torch until it is rendered

    renderer = renderer_of(tokenizer, conversations.path, rendering)
    unseen = {token: tokenizer.convert_tokens_to_ids(token) for token in rendering.train_tokens}
    full, source, number = [], [], 0  # tokens of each sample before cutting, and the number of its conversation in the file
    unanswered, behind = [], 0  # conversations of which no answer is left, by number; answers of others that are not
    frame_ids = [IGNORE, *renderer.supervised_frame]
    bar = {"desc": "rendering data", "unit": " samples", "delay": 2, "disable": not on_first_rank()}
    with _Writer(folder) as writer, tqdm(total=len(conversations), **bar) as progress:
        for batch in _batches(conversations):
            for samples in renderer.render_batch(batch):
                number += 1
                full += [len(sample.ids) for sample in samples]
                source += [number] * len(samples)
                if long_samples == "drop":
                    samples = [sample for sample in samples if len(sample.ids) <= max_length]
                answered = [not _answer_is_cut(sample, max_length, frame_ids) for sample in samples]
                if any(answered):  # of a conversation that was unrolled, later answers may lie behind the limit
                    behind += len(answered) - sum(answered)
                    samples = [sample for sample, there in zip(samples, answered) if there]
                elif samples:
                    unanswered.append(number)
                for ids, labels, weights in samples:
                    ids, labels = ids[:max_length], labels[:max_length]
                    writer.add(ids, labels, None if weights is None else weights[:max_length])
                    unseen = {token: index for token, index in unseen.items() if index not in ids}
            progress.update(len(batch))
    renderer.problems.raise_if_any()
    full, source = np.array(full, np.int64), np.array(source, np.int64)
    _check_left(full, len(writer.lengths), unanswered, number, max_length, conversations.path)
    notes = conversations.notes + renderer.notes() + too_long(full, source, max_length, long_samples)
    if behind:
        notes.append(f"{behind:,} samples of unrolled conversations are left out: their answers lie behind {max_length:,} tokens")
    notes += [f"--train_tokens {token}: stands in no conversation, so its row learns nothing from them" for token in unseen]
    writer.finish({"notes": notes, "without_thoughts": renderer.counts.without_thoughts(rendering)})


class _Writer:
    """Writes samples into a folder of the cache, one behind the other."""

    def __init__(self, folder: Path):
        self.folder, self.digest, self.tokens = folder, hashlib.sha256(), 0
        self.lengths, self.supervised, self.weight_sums = [], [], []
        self.files = {name: open(folder / name, "wb") for name in ("ids", "labels")}

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for file in self.files.values():
            file.close()

    def add(self, ids: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> None:
        """ids, labels int32[T], weights float32[T] or None for 1 everywhere."""
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

    def _write(self, name: str, values: np.ndarray) -> None:
        self.files[name].write(values)
        self.digest.update(values)

    def finish(self, meta: dict) -> None:
        """Writes what is known at the end."""
        offsets = np.concatenate(([0], np.cumsum(self.lengths))).astype(np.int64)
        self.digest.update(offsets)
        offsets.tofile(self.folder / "offsets")
        np.array(self.supervised, np.int64).tofile(self.folder / "supervised")
        np.array(self.weight_sums, np.float64).tofile(self.folder / "weight_sums")
        meta |= {"samples": len(self.lengths), "tokens": self.tokens, "weighted": "weights" in self.files}
        meta |= {"fingerprint": self.digest.hexdigest()}
        (self.folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Groups conversations by the amount of text."""
    batch, chars = [], 0
    for conversation in conversations:
        batch.append(conversation)
        chars += sum(len(message["content"]) for message in conversation.messages)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_SAMPLES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _answer_is_cut(sample, max_length: int, frame_ids: list[int]) -> bool:
    """Whether cutting a chatml.Rendered leaves no token of an answer. frame_ids: labels that are none."""
    return len(sample.ids) > max_length and bool(np.isin(sample.labels[1:max_length], frame_ids).all())


def _check_left(full: np.ndarray, kept: int, unanswered: list[int], conversations: int, max_length: int, path: str) -> None:
    """A UserError where cutting or dropping leaves nothing to learn.

    full: int[n], tokens of every sample before cutting; kept: samples that are left; unanswered: numbers of the conversations,
    of so many, of which no answer is.
    """
    if not len(full):
        raise UserError(f"{path}: no sample whose last answer is to be learned, so --multi_turn last leaves none; leave it out")
    if not kept:
        what = f"all samples are longer than {max_length:,} tokens (shortest {full.min():,})"
        raise UserError(f"{path}: {what}, so --long_samples drop leaves none; raise --model_max_length")
    if unanswered:
        first = ", ".join(map(str, unanswered[:5])) + ", …" * (len(unanswered) > 5)
        what = f"{len(unanswered):,} of {conversations:,} samples have no answer token within {max_length:,}"
        raise UserError(f"{path}: {what}: sample {first}; raise --model_max_length or --long_samples drop")


# ---- the cache


def _user_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _key(path: str, tokenizer, settings: dict) -> str:
    """A hash over what the rendered samples depend on: the file's bytes, our code, the tokenizer, the settings."""
    here, model = Path(__file__).parents[1], Path(__file__).parents[2] / "qwen_model"
    code = [source for wing in ("data_files", "conversations", "samples") for source in sorted((here / wing).glob("*.py"))]
    code += [model / f"{name}.py" for name in ("chatml", "react", "react_text")]
    parts = [_file_hash(path), *(_file_hash(source) for source in code), _tokenizer_hash(tokenizer), settings]
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


def _open(folder: Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """The arrays of a folder, memory-mapped, and its meta; None where there is none or a part is missing."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        samples, tokens = meta["samples"], meta["tokens"]
        sizes = {"ids": tokens, "labels": tokens, "offsets": samples + 1, "supervised": samples}
        sizes |= {"weight_sums": samples} | ({"weights": tokens} if meta["weighted"] else {})
        kinds = ARRAYS | WEIGHTS
        # a plain array over the mapping: slicing it costs a tenth of slicing a memmap
        arrays = {name: np.asarray(np.memmap(folder / name, kinds[name], "r")) for name in sizes}
        return (arrays, meta) if all(len(arrays[name]) == size for name, size in sizes.items()) else None
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _temporary_folder(root: Path) -> Iterator[Path]:
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


def _publish(temporary: Path, folder: Path) -> None:
    """Gives a finished folder its name, unless another process was faster; what is on disk then is complete."""
    for name in [path.name for path in temporary.iterdir()]:
        with open(temporary / name, "rb") as file:
            os.fsync(file.fileno())
    try:
        os.rename(temporary, folder)
    except OSError:
        if not _open(folder):  # a damaged one is in the way
            damaged = temporary.with_name(f"{temporary.name}-damaged")
            os.rename(folder, damaged)
            os.rename(temporary, folder)
            shutil.rmtree(damaged, ignore_errors=True)
