"""What a look holds, and the text that shows it."""

import json

import numpy as np
import pytest
from talks import talk, write

from finetune.data import look, terminal
from finetune.data.look import Bar, Look, Shown, Span
from finetune.samples.rendered_samples import load


@pytest.fixture
def samples(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    weighed = talk("2 + 2?", "5", "Sure?", "Sorry, 4.")
    weighed["messages"][1]["train"] = False
    data = [talk("hi", "yo"), weighed, talk("tell me", "a story " * 40)]
    return load(write(tmp_path, data), tokenizer, max_length=512)


# ---- what it holds


def test_stretches_are_what_is_learned_and_what_is_not(samples, tokenizer):
    shown = look.show(samples, tokenizer, 1, "a name")
    context = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    context += "5<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    assert [(span.text, span.learned) for span in shown.spans] == [(context, False), ("Sorry, 4.<|im_end|>", True), ("\n", False)]
    ids, labels = samples[1]
    assert sum(span.tokens for span in shown.spans) == shown.tokens == len(ids)
    assert shown.learned == (labels >= 0).sum() == shown.spans[1].tokens and (shown.number, shown.name) == (2, "a name")


def test_numbers_of_the_data(samples, tokenizer):
    found = look.data_look(samples, tokenizer, "talk.json", rows=[("steps", "7")], findings=["bad"])
    assert found.rows[0] == ("samples", "3") and found.rows[-1] == ("steps", "7") and found.findings == ["bad"]
    low, high = samples.lengths.min(), samples.lengths.max()
    assert found.rows[2][1] == f"{low} to {high} tokens, half of the samples at most {sorted(samples.lengths)[1]} (limit 512)"
    assert [(shown.number, shown.name) for shown in found.shown] == [(1, "the first"), (2, "of median length"), (3, "the longest")]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_few_samples_are_all_shown_and_many_are_spread(count):
    lengths = np.arange(1, 1001)
    chosen = [number for number, _ in look.choose(lengths, count)]
    assert len(chosen) == len(set(chosen)) == count and chosen[0] == 0
    assert [number for number, _ in look.choose(lengths[:1], count)] == [0]


@pytest.mark.parametrize(
    "lengths",
    [[1], [7] * 30, list(range(1, 500)), [40, 41, 42] * 400 + [100_000], [512] * 10 + [3], np.random.default_rng(0).integers(1, 9000, 5000).tolist()],
)
def test_every_sample_is_in_the_one_bar_of_its_length(lengths):
    bars = look.histogram(np.array(lengths))
    assert sum(bar.count for bar in bars) == len(lengths) and len(bars) <= look.BARS + 1
    for bar in bars:
        assert bar.count == sum(bar.low <= length <= bar.high for length in lengths)
    assert all(before.high + 1 == after.low for before, after in zip(bars, bars[1:])) and bars[0].count and bars[-1].count


# ---- as text

LOOK = Look(
    "data.json",
    [("samples", "2"), ("memory", "about 9.1 GB " * 9)],
    [Bar(1, 10, 1), Bar(11, 20, 0), Bar(21, 1000, 80)],
    512,
    [
        Shown(1, "the first", 9, 3, [Span("<|im_start|>user\nhi\x1b[31m<|im_end|>\n", False, 6), Span("yo\n\nyes<|im_end|>", True, 3)]),
        Shown(7, "", 900, 1, [Span("\nline\n" * 50, False, 899), Span("好" * 100, True, 1)]),
    ],
    notes=["data.json: 1 sample with something odd"],
    findings=["data.json: sample 3: " + "wrong " * 20],
)


def columns(line: str) -> int:
    return sum(2 if char >= "一" else 1 for char in line)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_and_hold_no_control_character(width):
    lines = terminal.text_of(LOOK, width).splitlines()
    assert max(map(columns, lines)) <= width
    assert all(char.isprintable() for line in lines for char in line)
    text = "\n".join(lines)
    unwrapped = " ".join(text.split())
    for part in ("data.json", "\\x1b[31m", "Sample 7: 900 tokens, 1 of them learned", "lines more", "Worth knowing", "A run would end here, for what is wrong"):
        assert part in unwrapped
    assert "  learned  ┃ yo\n           ┃\n           ┃ yes<|im_end|>" in text


def test_a_bar_for_each_count():
    lines = terminal.bars(LOOK.bars, 80)
    assert lines[0] == "      1 -    10  " + "▊ 1" and lines[1] == "     11 -    20   0" and lines[2].endswith("█ 80")
    full = max(len(line) for line in lines)
    assert full <= 80 and lines[2].count("█") > 50
    assert terminal.column(0) == "" and terminal.column(0.01) == "▏" and terminal.column(2.5) == "██▌"


def test_colours_only_for_a_terminal_that_wants_them(monkeypatch):
    class Stream:
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.has_colours(Stream())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.has_colours(Stream()) and not terminal.has_colours(open("/dev/null"))
    painted = terminal.text_of(LOOK, 80, colours=True)
    plain = terminal.text_of(LOOK, 80)
    for code in (*terminal.COLOURS.values(), terminal.PLAIN):
        painted = painted.replace(code, "")
    assert painted == plain


def test_long_lines_are_cut_at_blanks_and_nothing_is_lost():
    line = "some words and a verylongwordwithoutanyblank" + "好" * 30 + " end"
    for width in (8, 20, 50):
        parts = terminal.pieces(line, width)
        assert "".join(parts) == line and all(columns(part) <= width for part in parts)
    assert terminal.pieces("aaa bbb ccc", 7) == ["aaa ", "bbb ccc"]
    json.dumps(LOOK.rows)
