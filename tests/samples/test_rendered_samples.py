"""Rendered samples against samples laid out by hand (one byte is one token), and against the golden labels."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from talks import SAMPLES, START, ByteTokenizer, laid_out, messages_of, talk, write

from finetune.conversations import reading
from finetune.errors import UserError
from finetune.samples import laying_out
from finetune.samples.rendered_samples import load

ROOT = Path(__file__).parent.parent.parent
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "labels.json").read_text(encoding="utf-8"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FINETUNE_CACHE", str(folder))
    return folder


# ---- samples


@pytest.mark.parametrize("batch_samples", [1, 2, 2048])
@pytest.mark.parametrize("max_length", [1000, 180])
def test_samples_equal_the_ones_laid_out_by_hand(tmp_path, cache, monkeypatch, batch_samples, max_length):
    monkeypatch.setattr(laying_out, "BATCH_SAMPLES", batch_samples)
    samples = load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=max_length)
    expected = [laid_out(messages_of(sample), max_length) for sample in SAMPLES]
    assert len(samples) == 3
    assert [(ids.tolist(), labels.tolist()) for ids, labels in samples] == expected
    assert samples.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert samples.supervised.tolist() == [sum(label != -100 for label in labels[1:]) for _, labels in expected]
    assert samples.lengths.dtype == samples.supervised.dtype == np.int64
    assert samples[-1][0].dtype == samples[-1][1].dtype == np.int32
    assert samples.total_tokens == samples.lengths.sum() and samples.total_supervised == samples.supervised.sum()
    with pytest.raises(IndexError):
        samples[3]


def test_the_label_of_position_0_is_not_counted(tmp_path, cache):
    """In the published mask the first token has a label, which no position predicts."""
    samples = load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=1000, supervise="chatml")
    for i in range(3):
        labels = samples[i][1]
        assert labels[0] == START
        assert samples.supervised[i] == sum(label != -100 for label in labels.tolist()) - 1


def test_golden_samples_through_a_file(tmp_path, cache, tokenizer):
    """All golden conversations that the validator accepts, in one file per length; own_15 holds special-token text."""
    refused = {"own_2", "own_3", "own_7", "own_8"}
    rows = [row for row in GOLDEN if row["id"] not in refused and row["max_len"] == 2048]
    path = write(tmp_path, [{"id": row["id"], "conversations": row["conversations"]} for row in rows])
    samples = load(path, tokenizer, max_length=2048, supervise="chatml", allow_special=True)
    assert len(samples) == len(rows) == 12
    for row, (ids, labels) in zip(rows, samples):
        assert ids.tolist() == row["input_ids"] and labels.tolist() == row["labels"]
    assert samples.notes == [
        f"{path}: 1 sample with text outside Unicode's normal form C (first: 4); the tokenizer normalizes it",
        f"{path}: 1 sample contains special-token text (first: 12); it becomes control tokens",
    ]
    plain = load(path, tokenizer, max_length=2048, supervise="chatml")
    for row, (ids, labels) in zip(rows[:-1], plain):
        assert ids.tolist() == row["input_ids"] and labels.tolist() == row["labels"]
    assert plain[11][0].tolist() != rows[11]["input_ids"]


def test_describe(tmp_path, cache):
    path = write(tmp_path, SAMPLES)
    samples = load(path, ByteTokenizer(), max_length=1000)
    expected = [laid_out(messages_of(sample)) for sample in SAMPLES]
    tokens = sum(len(ids) for ids, _ in expected)
    learned = sum(label != -100 for _, labels in expected for label in labels)
    longest = max(len(ids) for ids, _ in expected)
    share = f"{learned} of them supervised ({100 * learned / tokens:.0f}%)"
    assert samples.describe() == f"{path}: 3 samples, {tokens} tokens, {share}, longest {longest} (limit 1,000)"


# ---- too long


def sizes(samples: list[dict]) -> list[int]:
    return [len(laid_out(messages_of(sample))[0]) for sample in samples]


def test_cut_samples_are_counted(tmp_path, cache):
    samples = [talk(f"{n:4}", "b" * n) for n in (1, 2, 100, 3, 1000)]
    *_, fourth, fifth = sizes(samples)
    third = sizes(samples)[2]
    path, limit = write(tmp_path, samples), fourth
    loaded = load(path, ByteTokenizer(), max_length=limit)
    lost = third - limit + fifth - limit
    times = f"{fifth:,} tokens = {fifth / limit:.0f} × max length"
    assert loaded.notes == [
        f"{path}: 2 samples cut to {limit} tokens (40 %), longest {fifth:,}; {lost:,} tokens lost, "
        f"{lost - 2:,} of them learned",  # all but the line end behind each
        f"{path}: sample 5 has {times}; one sample should be one conversation",
    ]
    assert loaded.lengths.max() == limit


@pytest.mark.parametrize("supervise", ["assistant", "chatml"])
@pytest.mark.parametrize("reach", [0, 1])
def test_answers_beyond_the_limit(tmp_path, cache, supervise, reach):
    """The limit lies just before, or just behind, the first token of the long samples' answers."""
    samples = [talk("why", "so")] + [talk("w" * 50, "s" * 50, "w", "s")] * 7
    path = write(tmp_path, samples)
    before_answer = [label != -100 for label in laid_out(messages_of(samples[1]))[1]].index(True)
    settings = {"max_length": before_answer + reach, "supervise": supervise}
    if reach:
        assert len(load(path, ByteTokenizer(), **settings)) == 8
        return
    with pytest.raises(UserError) as caught:
        load(path, ByteTokenizer(), **settings)
    what = f"7 of 8 samples have no answer token within {before_answer}: sample 2, 3, 4, 5, 6, …"
    assert caught.value.findings == [f"{path}: {what}; raise --model_max_length or --long_samples drop"]
    assert list(cache.iterdir()) == []
    dropped = load(path, ByteTokenizer(), **settings, long_samples="drop")
    assert len(dropped) == 1 and dropped[0][0].tolist() == laid_out(messages_of(samples[0]))[0]
    longest, lost = sizes(samples)[1], sum(sizes(samples)[1:])
    learned = 7 * sum(np.count_nonzero(sample_labels[1:] >= 0) for _, sample_labels in [load(path, ByteTokenizer(), max_length=999, supervise=supervise)[1]])
    gone = (
        f"7 samples dropped, being longer than {before_answer} tokens (88 %), longest {longest}; {lost:,} tokens lost, "
        f"{learned:,} of them learned"
    )
    assert dropped.notes == [
        f"{path}: duplicates: 6 samples equal to an earlier one (first: 2 and 3)",
        f"{path}: {gone}",
    ]


def test_a_sample_of_just_the_limit_is_kept(tmp_path, cache):
    path = write(tmp_path, [talk("a", "b" * n) for n in (1, 2, 3)])
    limit = sizes([talk("a", "bb")])[0]
    assert load(path, ByteTokenizer(), max_length=limit, long_samples="drop").lengths.tolist() == [limit - 1, limit]


def test_an_answer_that_is_not_trained_does_not_count(tmp_path, cache):
    sample = talk("a", "b", "c" * 100, "d")
    sample["messages"][1]["train"] = False
    with pytest.raises(UserError, match="1 of 1 samples have no answer token within 100: sample 1; raise"):
        load(write(tmp_path, [sample]), ByteTokenizer(), max_length=100)


def test_nothing_left(tmp_path, cache):
    path = write(tmp_path, [talk("a", "b" * 100), talk("a", "c" * 99)])
    with pytest.raises(UserError) as caught:
        load(path, ByteTokenizer(), max_length=50, long_samples="drop")
    shortest = min(sizes([talk("a", "c" * 99)]))
    what = f"all samples are longer than 50 tokens (shortest {shortest}), so --long_samples drop leaves none"
    assert caught.value.findings == [f"{path}: {what}; raise --model_max_length"]


# ---- what a person sees


def test_progress_only_where_it_takes_long(tmp_path, cache, capfd, monkeypatch):
    bars = []
    monkeypatch.setattr(
        laying_out, "tqdm", lambda **settings: bars.append(settings) or reading.tqdm(**settings)
    )
    load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=200)
    assert capfd.readouterr().err == ""
    assert bars[0]["delay"] == 2 and bars[0]["total"] == 3 and not bars[0]["disable"]
    monkeypatch.setenv("RANK", "1")
    load(write(tmp_path, SAMPLES), ByteTokenizer(), max_length=199)
    assert bars[1]["disable"]


def test_nothing_heavy_is_imported():
    """Data is checked before anything large is loaded."""
    code = "import sys, finetune.samples.rendered_samples; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(result.stdout.split())
    assert "numpy" in imported and not imported & {"torch", "transformers", "peft", "deepspeed", "pyarrow"}
