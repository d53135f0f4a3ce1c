"""python -m finetune.compare: what it prints and writes, and what it refuses."""

import json
import math

import pytest
import torch
from tiny import small_checkpoint, tiny_gptq, tiny_later_qwen
from transformers import AutoModelForCausalLM

import qwen_model
from finetune.compare import __main__ as compare
from finetune.compare import agreement, side_by_side
from finetune.model import loading
from finetune.samples import rendered_samples

TALKS = [
    {"conversations": [
        {"from": "user", "value": f"How much is {i}?"}, {"from": "assistant", "value": f"It is {i}, 就是{i}。"},
    ]}
    for i in range(9)
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """one, other: two models; Int4 and its plain twin; later: of another tokenizer; talks.json"""
    qwen_model.register()
    folder = tmp_path_factory.mktemp("compare")
    small_checkpoint(folder / "one")
    small_checkpoint(folder / "other", seed=1)
    tiny_gptq(folder / "Int4", 4, twin=folder / "twin")
    tiny_later_qwen(folder / "later")
    (folder / "talks.json").write_text(json.dumps(TALKS))
    return folder


def run(place, capsys, *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error); paths in words are in `place`."""
    named = [str(place / word) if (place / word).exists() else word for word in words]
    code = 0
    try:
        compare.main([*named, "--max_new_tokens", "4"])
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def test_figures_and_answers(place, capsys, tmp_path):
    """The printed ones are those of the file; perplexity once more from the model's own loss."""
    words = [
        "one",
        "other",
        "one",
        "--data_path",
        "talks.json",
        "--answers",
        "2",
        "--json",
        str(tmp_path / "found.json"),
    ]
    code, out, _ = run(place, capsys, *words)
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    first, second, third = found["models"]
    rows = [line.split() for line in out.splitlines() if line[:3] in ("  A", "  B", "  C")][:3]
    assert [row[0] for row in rows] == ["A", "B", "C"] and rows[0][-1] == str(place / "one")
    for row, entry in zip(rows, found["models"]):
        assert float(row[1]) == pytest.approx(entry["perplexity"], abs=1e-3)
    assert rows[1][-2].endswith("%") and float(rows[1][-2][:-1]) / 100 == pytest.approx(second["same_greedy"], abs=1e-4)
    assert first["kl_max"] == third["kl_max"] == 0 and third["same_greedy"] == 1 and second["kl_mean"] > 0

    tokenizer = loading.load_tokenizer(place / "one")
    loaded = AutoModelForCausalLM.from_pretrained(place / "one", dtype=torch.float32)
    samples, losses = rendered_samples.load(place / "talks.json", tokenizer, max_length=2048), []
    for ids, labels in (samples[i] for i in range(len(samples))):
        with torch.no_grad():
            logits = loaded(torch.tensor([ids.tolist()])).logits[0, :-1].double()
        wanted = torch.tensor(labels[1:].tolist())
        losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="none")[wanted != -100].tolist()
    assert first["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert first["tokens"] == len(losses)
    assert [answer["question"] for answer in found["answers"]] == ["How much is 0?", "How much is 1?"]
    assert all(
        len(answer["answers"]) == 3 and answer["answers"][0] == answer["answers"][2] for answer in found["answers"]
    )
    assert "Q: How much is 1?" in out and found["settings"]["samples"] == 64 and "torch" in found["versions"]


def test_a_quantized_folder_agrees_with_its_dequantized_twin(place, capsys, tmp_path):
    code, out, _ = run(place, capsys, "twin", "Int4", "--json", str(tmp_path / "found.json"))
    assert code == 0 and "tokens of A's own answers scored" in out
    twin, quantized = json.loads((tmp_path / "found.json").read_text())["models"]
    assert quantized["kl_max"] < 1e-6 and quantized["logits_difference"] < 1e-4
    assert quantized["tokens"] == 4 * len(agreement.QUESTIONS)


def test_fewer_samples_are_drawn_with_the_seed(place):
    from types import SimpleNamespace

    tokenizer = loading.load_tokenizer(place / "one")

    def drawn(samples, seed):
        options = SimpleNamespace(
            data_path=str(place / "talks.json"), samples=samples, seed=seed, model_max_length=2048, long_samples="cut"
        )
        return [ids.tolist() for ids, _ in compare.drawn(options, tokenizer)[0]]

    every = drawn(0, 0)
    assert len(every) == 9 and drawn(64, 0) == every
    assert len(drawn(4, 0)) == 4 and drawn(4, 0) == drawn(4, 0) != drawn(4, 1)
    assert all(sample in every for sample in drawn(4, 0))


@pytest.mark.parametrize(
    "words,line",
    [
        (["one"], "error: 1 model given - give the reference and at least one to compare with it"),
        (["one", "later"], "later: makes other tokens of the conversations than {place}/one - compare models with one"),
        (["one", "later", "--data_path", "talks.json"], "later: makes other tokens of the conversations than"),
        (["one", "other", "--data_path", "nowhere.json"], "error: --data_path nowhere.json: no such file"),
        (["one"] * 27, "error: 27 models given - give 26 at most"),
        (["one", "other", "--data_path", "talks.json", "--samples", "-1"], "error: --samples -1: below 0 - give a larger number"),
        (["one", "other", "--samples", "3"], "error: --samples 3: nothing to draw from without --data_path - add it, or"),
        (["one", "other", "--base", "x"], "error: --base x: none of the models is an adapter, which has a base - leave it out"),
        (["one", "other", "--answers", "-1"], "error: --answers -1: below 0 - give a larger number"),
        (["one", "other", "--data_path", "talks.json", "--model_max_length", "12", "--long_samples", "drop"],
         "leaves none; raise --model_max_length"),
        (
            ["one", "other", "--json", "/no/where/x.json"],
            "error: --json /no/where/x.json: no folder /no/where - make it",
        ),
    ],
)
def test_refusals(place, capsys, words, line):
    code, out, told = run(place, capsys, *words)
    assert code == 2 and out == "" and line.format(place=place) in told and "Traceback" not in told


def test_answers_of_no_token_are_refused_before_anything_is_scored(place, capsys):
    with pytest.raises(SystemExit):
        compare.main([str(place / "one"), str(place / "other"), "--max_new_tokens", "0"])
    assert "error: --max_new_tokens 0: below 1 - give a larger number" in capsys.readouterr().err


# ---- side by side


def test_columns():
    shown = side_by_side.answers(["你好？"], [["one two three"], ["一二三四五六七八九十" * 2]], "AB", width=66)
    assert (
        shown.splitlines()
        == [
            "",
            "Q: 你好？",
            "  A  one two three                 B  一二三四五六七八九十一二三四",  # columns of 31, a character is two of them
            "                                      五六七八九十",
        ]
    )


def test_one_below_another_where_the_terminal_is_narrow():
    shown = side_by_side.answers(["Q"], [["aa bb cc"], ["dd"]], "AB", width=10)
    assert shown.splitlines() == ["", "Q: Q", "  A  aa bb", "     cc", "  B  dd"]


def test_a_word_longer_than_the_column_is_broken():
    assert side_by_side.wrapped("abcdefgh ij", 5) == ["abcde", "fgh", "ij"]
    assert side_by_side.wrapped("two\nlines", 9) == ["two", "lines"]
