"""Shares, what is held out, several files: the same samples whenever, wherever and in whatever order."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from talks import ByteTokenizer, talk, write

from finetune.data_files.sources import Source
from finetune.errors import UserError
from finetune.samples.rendered_samples import load
from finetune.samples.selection import HELD_OUT, SHARES, Selection, drawn, mixed, select


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


TALKS = [talk(f"question {i}", f"answer {i}") for i in range(200)] + [talk("asked often", f"answer {i}") for i in range(20)]


def samples_of(tmp_path, talks, name="talk.json", limit=999):
    return load(write(tmp_path, talks, name), ByteTokenizer(), max_length=limit)


def texts(samples) -> list[bytes]:
    return [bytes(np.minimum(samples[i][0], 255).astype(np.uint8)) for i in range(len(samples))]


def source(path="a.json", share=1.0, flag="--data_path") -> Source:
    return Source(path, share, flag)


def test_a_share_is_the_same_in_any_order_and_at_any_length(tmp_path):
    shuffled = random.Random(0).sample(TALKS, len(TALKS))
    whole = samples_of(tmp_path, TALKS)
    taken = drawn(whole, 0.3, SHARES)
    assert 46 <= taken.sum() <= 66
    other = samples_of(tmp_path, shuffled, "b.json")
    chosen = drawn(other, 0.3, SHARES)
    assert sorted(np.array(texts(whole), object)[taken]) == sorted(np.array(texts(other), object)[chosen])
    short = samples_of(tmp_path, TALKS, "talk.json", limit=90)
    assert (drawn(short, 0.3, SHARES) == taken).all()
    often = np.array([b"asked often" in text for text in texts(whole)])
    assert taken[often].all() or not taken[often].any()
    larger = drawn(whole, 0.6, SHARES)
    assert (larger | taken == larger).all() and larger.sum() > taken.sum()


def test_two_draws_are_independent():
    hashes = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 20_000)
    one, two = (mixed(hashes, draw) < np.uint64(2**62) for draw in (SHARES, HELD_OUT))
    assert abs(one.mean() - 0.25) < 0.01 and abs((one & two).mean() - 1 / 16) < 0.01
    assert len(np.unique(mixed(np.arange(10_000), SHARES))) == 10_000


def test_what_is_held_out_is_in_no_other_part(tmp_path):
    whole = samples_of(tmp_path, TALKS)
    training, held_out = select([(source(), whole)], 0.1)
    assert set(texts(training)).isdisjoint(texts(held_out)) and len(training) + len(held_out) == len(whole)
    assert 12 <= len(held_out) <= 32 and training.fingerprint != held_out.fingerprint != whole.fingerprint
    assert held_out.path == "0.1 of a.json" and training.path == "a.json"
    again, same = select([(source(), whole)], 0.1)
    assert (again.fingerprint, same.fingerprint) == (training.fingerprint, held_out.fingerprint)
    assert select([(source(), whole)], None) == (whole, None)
    unrolled = [talk(*(f"{i} {j}" for j in range(6))) for i in range(30)]
    parts = load(write(tmp_path, unrolled), ByteTokenizer(), max_length=70, long_samples="split")
    training, held_out = select([(source(), parts)], 0.2)
    assert len(parts) > 30 and not set(training.conversations) & set(held_out.conversations)


@pytest.mark.parametrize("talks, share", [([talk("q", "a")], 0.5), ([talk("q", "a"), talk("q", "b")], 0.5), ([talk("q", "a"), talk("r", "a")], 0.99)])
def test_both_sides_need_something(tmp_path, talks, share):
    with pytest.raises(UserError, match="leaves nothing to train on, or nothing to evaluate on"):
        select([(source(), samples_of(tmp_path, talks))], share)


def test_several_files_are_one_behind_the_other(tmp_path):
    weighed = [talk("w", "x"), talk("v", "y")]
    weighed[0]["messages"][1]["weight"] = 0.5
    first, second, other = samples_of(tmp_path, TALKS[:5]), samples_of(tmp_path, weighed, "b.json"), samples_of(tmp_path, TALKS[9:11], "c.json")
    loaded = [(source(), first), (source("b.json"), second), (source("c.json", flag="--eval_data_path"), other)]
    samples, evaluation = select(loaded, None)
    assert isinstance(samples, Selection) and evaluation is other and len(samples) == 7
    assert texts(samples) == texts(first) + texts(second)
    assert samples.lengths.tolist() == [*first.lengths, *second.lengths] and samples.weight_sums.tolist() == [*first.weight_sums, *second.weight_sums]
    assert samples.token_weights(0) is None and samples.token_weights(5).tolist() == second.token_weights(0).tolist()
    assert [values.tolist() for values in samples[-1]] == [values.tolist() for values in second[1]]
    with pytest.raises(IndexError):
        samples[7]
    assert samples.describe().startswith(f"a.json, b.json: 7 samples, {samples.lengths.sum():,} tokens, ")
    shared, _ = select([(source(share=0.4), first), (source("b.json"), second)], None)
    assert len(shared) == 2 + 2 and shared.path == "a.json:0.4, b.json"


def test_the_same_in_every_process(tmp_path):
    """Python's own hashes differ from one process to the next."""
    path = write(tmp_path, TALKS)
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parents[1])!r}]
from talks import ByteTokenizer
from finetune.samples.rendered_samples import load
from finetune.samples.selection import HELD_OUT, drawn
print(drawn(load({str(path)!r}, ByteTokenizer(), max_length=999, cache_dir=sys.argv[1]), 0.1, HELD_OUT).nonzero()[0].tolist())
"""
    runs = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code, tmp_path / seed], env=environment, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert runs[0] == runs[1] == drawn(samples_of(tmp_path, TALKS), 0.1, HELD_OUT).nonzero()[0].tolist()
