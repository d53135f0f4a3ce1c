"""Errors of the programs speak of their own options, in one line with exit code 2, and suggest the folder that was meant."""

import re

import pytest
from command_lines import write_adapter

import run_gptq
from finetune import errors, refresh
from finetune.ask import __main__ as ask
from finetune.compare import __main__ as compare
from finetune.export import __main__ as export
from finetune.merge import __main__ as merge

PROGRAMS = {"ask": ask, "compare": compare, "export": export, "merge": merge, "run_gptq": run_gptq, "refresh": refresh}


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """told("ask quickstart hello") -> the one line; in a folder with quickstart/model and quickstart/adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart" / "model").mkdir(parents=True)
    (tmp_path / "quickstart" / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    write_adapter(tmp_path / "quickstart" / "adapter", base_model_name_or_path="gone", peft_type="LORA")

    def run(line: str) -> str:
        program, *words = line.split()
        with pytest.raises(SystemExit) as ended:
            PROGRAMS[program].main(words)
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert not re.search(r"--model_name_or_path|with -[md]\b", lines[0]), lines  # those are finetune.py's
        return lines[0].removeprefix("error: ")

    return run


@pytest.mark.parametrize("line, start, end", [
    ("ask quickstart hello", "quickstart: neither config.json nor adapter_config.json there - ", "; did you mean quickstart/adapter or quickstart/model?"),
    ("ask quickstart/adaptor hello", "quickstart/adaptor: no such folder, and it could not be fetched", "; did you mean quickstart/adapter?"),
    ("ask quickstart/adapter --base quickstart hello", "--base quickstart: no model was found there - ", "; did you mean quickstart/model?"),
    ("ask quickstart/adapter hello", "quickstart/adapter: its base gone was not found - give it with --base", ""),
    ("merge quickstart out", "quickstart: no adapter_config.json there - ", "; did you mean quickstart/adapter?"),
    ("merge quickstart/adaptr out", "quickstart/adaptr: no adapter_config.json there - ", "; did you mean quickstart/adapter?"),
    ("compare quickstart/modle quickstart/model", "quickstart/modle: no such folder", "; did you mean quickstart/model?"),
    ("export quickstart out --to qwen2", "", "; did you mean quickstart/adapter or quickstart/model?"),
    ("export quickstart/adapter out --to qwen2 --base quickstart", "--base quickstart: no config.json there - ", "; did you mean quickstart/model?"),
    ("run_gptq -m quickstart -d nowhere.json -o out", "", "; did you mean quickstart/model?"),
    ("refresh quickstart", "quickstart: neither config.json nor ", "; did you mean quickstart/adapter or quickstart/model?"),
    ("ask", "the following arguments are required: FOLDER - ", "python -m finetune.ask --help lists the options"),
    ("merge a b --bse c", "unrecognized arguments: --bse c - did you mean --base?", ""),
    ("merge a b --bas c", "unrecognized arguments: --bas c - did you mean --base?", ""),
    ("compare a b --seed many", "argument --seed: invalid int value: 'many' - python -m finetune.compare --help", ""),
    ("ask a --sampel hello", "unrecognized arguments: --sampel", "did you mean --sample?"),
], ids=lambda words: words if words[:3] in ("ask", "mer", "com", "exp", "run", "ref") else "")  # fmt: skip
def test_one_line(told, line, start, end):
    if line.startswith("run_gptq"):
        with pytest.raises(AssertionError, match="nowhere.json: no such file"):  # two findings, the other is of the data
            told(line)
        line = line.replace("nowhere.json", "quickstart/data.json")
        open("quickstart/data.json", "w").write(
            '[{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}]'
        )
    found = told(line)
    assert found.startswith(start) and found.endswith(end), found


def test_endless_values_are_cut():
    assert errors.shortened("a\x1b[31m\n  b") == "a\\x1b[31m b" and errors.shortened("x" * 101) == "x" * 97 + "..."
    line = errors.barred("begins " + "x" * 10_000 + "\x07 - the remedy")
    assert len(line) <= errors.LONGEST and line.startswith("begins x") and line.endswith("x\\x07 - the remedy")
    assert errors.barred("short") == "short"
