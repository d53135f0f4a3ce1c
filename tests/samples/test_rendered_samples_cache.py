"""Rendered once, opened from then on: what the cache depends on, and that nothing that happens to it does harm."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from talks import SAMPLES, ByteTokenizer, laid_out, messages_of, talk, write

from finetune.data_files.sample_files import SampleFile
from finetune.errors import UserError
from finetune.samples import laying_out, rendered_samples
from finetune.samples.rendered_samples import load
from qwen_model import chatml


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FINETUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def renderings(monkeypatch) -> list:
    """Grows by one with each batch that is rendered."""
    calls, render_batch = [], chatml.render_batch

    def counting(tokenizer, conversations, **settings):
        calls.append(len(conversations))
        return render_batch(tokenizer, conversations, **settings)

    monkeypatch.setattr(chatml, "render_batch", counting)
    return calls


def test_findings_of_the_file_come_before_any_rendering(tmp_path, cache, renderings):
    path = write(tmp_path, [talk("a", "b")] * 3000 + [talk("a")])
    with pytest.raises(UserError, match="sample 3001: no assistant answer to learn from"):
        load(path, ByteTokenizer(), max_length=100)
    with pytest.raises(UserError, match="--eval_data_path .*: no such file"):
        load(tmp_path / "none", ByteTokenizer(), max_length=100, flag="--eval_data_path")
    assert renderings == [] and not cache.exists()


def test_a_second_start_neither_parses_nor_renders(tmp_path, cache, renderings, monkeypatch):
    first = load(write(tmp_path, [talk(" ", "b" * 50)]), ByteTokenizer(), max_length=100)
    assert len(first.notes) == 2 and renderings == [1]
    monkeypatch.setattr(rendered_samples, "read", None)
    moved = write(tmp_path, [talk(" ", "b" * 50)], "moved.json")
    second = load(moved, ByteTokenizer(), max_length=100)
    assert renderings == [1]
    assert second.fingerprint == first.fingerprint
    assert [note.removeprefix(f"{moved}: ") for note in second.notes] == [
        "1 sample with an empty user turn (first: 1)",
        first.notes[1].split(": ", 1)[1],
    ]
    assert second[0][1].tolist() == first[0][1].tolist() and second.supervised.tolist() == first.supervised.tolist()


def test_what_the_cache_depends_on(tmp_path, cache, renderings):
    def load_with(samples=SAMPLES, tokenizer=None, **settings):
        tokenizer = tokenizer or ByteTokenizer()
        return load(write(tmp_path, samples), tokenizer, **{"max_length": 200} | settings).fingerprint

    class Other(ByteTokenizer):
        def encode_ordinary(self, text: str) -> list[int]:
            return [id + 1 for id in super().encode_ordinary(text)]

        def decode(self, ids: list[int], **settings) -> str:
            return super().decode([id - 1 for id in ids])

    fingerprints = [load_with(), load_with(max_length=180), load_with(supervise="chatml"), load_with(SAMPLES[1:])]
    fingerprints += [load_with(tokenizer=Other()), load_with(long_samples="drop")]
    assert len(renderings) == len(set(fingerprints)) == 6
    assert load_with(tokenizer=ByteTokenizer({"other": 0})) == fingerprints[0] and len(renderings) == 7
    assert load_with() == fingerprints[0] and len(renderings) == 7
    assert load_with(max_length=1000) == load_with(max_length=1001), "the same samples, the same fingerprint"
    assert len(renderings) == 9


def test_allow_special_and_tokenizers_files_are_part_of_the_key(tmp_path, tokenizer):
    """Of the real tokenizer, ranks and special tokens count, and of the settings allow_special."""
    path = write(tmp_path, SAMPLES)

    class Copy:
        def __init__(self, **changes):
            self.__dict__ = {name: getattr(tokenizer, name) for name in names} | changes

    names = ["mergeable_ranks", "special_tokens", "im_start_id", "im_end_id", "encode_ordinary"]
    ranks, special = dict(tokenizer.mergeable_ranks), dict(tokenizer.special_tokens)
    key = rendered_samples.key_of
    same = {key(SampleFile(path), Copy(), {}), key(SampleFile(path), tokenizer, {}), key(SampleFile(path), Copy(mergeable_ranks=ranks), {})}
    others = {
        key(SampleFile(path), Copy(mergeable_ranks=ranks | {b"new token": 151851}), {}),
        key(SampleFile(path), Copy(special_tokens=special | {"<|new|>": 151851}), {}),
        key(SampleFile(path), Copy(im_end_id=151643), {}),
        key(SampleFile(path), tokenizer, {"allow_special": True}),
    }
    assert len(same) == 1 and len(same | others) == 5


def test_a_damaged_cache_folder_is_made_again(tmp_path, cache, renderings):
    path = write(tmp_path, SAMPLES)
    samples = load(path, ByteTokenizer(), max_length=200)
    expected = [ids.tolist() for ids, _ in samples]
    [folder] = cache.iterdir()
    for name in ("ids", "labels", "offsets", "supervised", "meta.json"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(data[:-4])
        assert [ids.tolist() for ids, _ in load(path, ByteTokenizer(), max_length=200)] == expected
        assert (folder / name).read_bytes() == data
    assert len(renderings) == 6 and list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["ids", "labels", "offsets", "supervised", "weight_sums", "weights", "conversations", "prompts", "meta.json"])
def test_a_flipped_bit_in_the_cache_is_not_trained_on(tmp_path, cache, renderings, capsys, name):
    talks = [talk("a", "b"), talk("c", "defg")]
    talks[1]["messages"][-1]["weight"] = 0.5
    path = write(tmp_path, talks)
    first = load(path, ByteTokenizer(), max_length=100)
    expected = [[array.tolist() for array in sample] for sample in first]
    [folder] = cache.iterdir()
    content = bytearray((folder / name).read_bytes())
    at = content.index(b'"fingerprint": "') + 17 if name == "meta.json" else len(content) // 2
    content[at] ^= 1
    (folder / name).write_bytes(content)
    capsys.readouterr()
    again = load(path, ByteTokenizer(), max_length=100)
    assert "rendered again" in capsys.readouterr().err and len(renderings) == 2
    assert again.fingerprint == first.fingerprint and [[array.tolist() for array in sample] for sample in again] == expected
    load(path, ByteTokenizer(), max_length=100)
    assert len(renderings) == 2 and not capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_run_leaves_nothing(tmp_path, cache, monkeypatch, error):
    path, render_batch = write(tmp_path, SAMPLES), chatml.render_batch
    calls = []

    def interrupted(*args, **settings):
        calls.append(args)
        if len(calls) == 2:
            assert [child.name[:11] for child in cache.iterdir()] == [".unfinished"]
            raise error
        return render_batch(*args, **settings)

    monkeypatch.setattr(chatml, "render_batch", interrupted)
    monkeypatch.setattr(laying_out, "BATCH_SAMPLES", 1)
    with pytest.raises(error):
        load(path, ByteTokenizer(), max_length=200)
    assert list(cache.iterdir()) == []
    assert len(load(path, ByteTokenizer(), max_length=200)) == 3


def test_what_a_killed_run_left_is_swept_away_later(tmp_path, cache):
    for name, age_seconds in (("old", 7200), ("new", 60)):
        folder = cache / f".unfinished-{name}"
        folder.mkdir(parents=True)
        (folder / "ids").write_bytes(b"1234")
        for part in (folder / "ids", folder):
            os.utime(part, (time.time() - age_seconds,) * 2)
    load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=200)
    assert [child.name for child in cache.glob(".unfinished-*")] == [".unfinished-new"]


def test_a_run_killed_outright_does_no_harm(tmp_path, cache, monkeypatch):
    path, batches = write(tmp_path, SAMPLES), laying_out.batches

    def then_killed(conversations):
        yield from batches(conversations)
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            laying_out.batches = then_killed
            load(path, ByteTokenizer(), max_length=200)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    [left] = cache.iterdir()
    assert left.name.startswith(".unfinished-") and (left / "ids").exists()
    assert len(load(path, ByteTokenizer(), max_length=200)) == 3


def test_of_several_processes_one_renders(tmp_path, cache, renderings):
    """As the ranks of a machine do: all load the same file at the same time."""
    path, results = write(tmp_path, SAMPLES), []

    def one():
        results.append(load(path, ByteTokenizer(), max_length=200))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(renderings) == 1 and len({samples.fingerprint for samples in results}) == 1 and len(results) == 4


def test_several_machines_at_once(tmp_path, cache, monkeypatch):
    """Four loads that all render, as on machines that share the cache: one of them publishes, all give the same samples."""
    monkeypatch.setattr(rendered_samples, "one_at_a_time", lambda name: contextlib.nullcontext())
    path, together = write(tmp_path, SAMPLES), threading.Barrier(4, timeout=60)
    publish = rendered_samples.publish

    def publish_together(*folders):
        together.wait()
        publish(*folders)

    monkeypatch.setattr(rendered_samples, "publish", publish_together)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(load(path, ByteTokenizer(), max_length=200))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [samples[2][0].tolist() for samples in results] == [laid_out(messages_of(SAMPLES[2]), 200)[0]] * 4
    assert len(list(cache.iterdir())) == 1


def test_the_file_may_not_change_while_it_is_rendered(tmp_path, cache, monkeypatch):
    path, key = write(tmp_path, SAMPLES), rendered_samples.key_of

    def key_then_change(*args):
        result = key(*args)
        write(tmp_path, SAMPLES[:1])
        return result

    monkeypatch.setattr(rendered_samples, "key_of", key_then_change)
    with pytest.raises(UserError, match="changed while it was read"):
        load(path, ByteTokenizer(), max_length=200)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    blocked, spare = tmp_path / "blocked", tmp_path / "spare"
    blocked.write_text("a file, not a folder")
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    samples = load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=200, cache_dir=blocked / "cache")
    printed = capsys.readouterr().err
    assert printed.startswith(f"note: the cache folder {blocked / 'cache'} cannot be written (")
    assert printed.endswith("): the data will be rendered again next time\n")
    assert [ids.tolist() for ids, _ in samples] == [laid_out(messages_of(sample), 200)[0] for sample in SAMPLES]
    assert list(spare.iterdir()) == []
    spare.rmdir()
    with pytest.raises(UserError, match="cannot be written .*; give FINETUNE_CACHE a folder that has room"):
        load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=200, cache_dir=blocked / "cache")


@pytest.mark.parametrize(
    "variables", [{"XDG_CACHE_HOME": "xdg"}, {"HOME": "home"}, {"FINETUNE_CACHE": "own", "XDG_CACHE_HOME": "xdg"}]
)
def test_where_the_cache_is(tmp_path, monkeypatch, variables):
    for name in ("FINETUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=200)
    expected = {"HOME": "home/.cache/finetune", "XDG_CACHE_HOME": "xdg/finetune", "FINETUNE_CACHE": "own"}[
        next(iter(variables))
    ]
    assert len(list((tmp_path / expected).iterdir())) == 1
    load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=200, cache_dir=tmp_path / "given")
    assert len(list((tmp_path / "given").iterdir())) == 1
