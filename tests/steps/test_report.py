"""What a person sees: the summary, the bar's figures, the log, the curve, and errors of one line."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from finetune import errors
from finetune.memory.memory_model import Estimate
from finetune.steps import curve, progress, report
from finetune.steps.plan import Plan

LINE = {
    "loss": 1.25,
    "learning_rate": 3e-4,
    "token_accuracy": 0.75,
    "flop_utilization": 0.583,
    "tokens_per_second": 1234.5,
    "supervised_tokens_per_second": 99.0,
    "memory_gb": 2.04,
}


def test_summary_counts_what_trains(capsys):
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln_f" in name or "c_attn" in name)
    lora = SimpleNamespace(use_lora=False, lora_r=1, lora_alpha=1, lora_target_modules=[])
    training = SimpleNamespace(
        bf16=True, fp16=False, num_train_epochs=2, max_steps=-1, device=torch.device("cpu"), output_dir="out"
    )
    args = SimpleNamespace(model=SimpleNamespace(model_name_or_path="M"), lora=lora, training=training)

    class Samples:
        def __len__(self):
            return 20

        def describe(self):
            return "20 samples"

    plan = Plan(np.full(20, 5), np.full(20, 2), samples_per_step=8, max_tokens_per_pass=100)
    memory = Estimate(15e9, 0.6e9, 1.1e9, 4e9, tokens=4096, recomputed=3, layers=32)
    job = SimpleNamespace(samples=Samples(), eval_samples=None, plan=plan, memory=memory)
    text = report.summary(args, job, model)
    trained = 32 + 2 * (96 * 32 + 96)  # the final norm, and query, key and value of both layers with their bias
    assert f"{trained:,} parameters" in text
    assert "h.*.attn.c_attn, h.*.attn.c_attn.bias, ln_f" in text
    assert "6 (3 an epoch, 8 samples each)" in text and "full-parameter, bfloat16 on cpu" in text
    said = "about 20.7 GB (weights 15.0, gradients 0.6, optimizer 1.1, a pass of 4,096 tokens 4.0; 3 of 32 blocks computed again)"
    assert said in text
    assert "only 6 optimizer steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings,ratio,said",
    [
        ({}, None, "LoRA r=2 alpha=16 on c_attn, w1"),
        ({"target_modules": r".*\.mlp\.w1"}, None, r"LoRA r=2 alpha=16 on .*\.mlp\.w1"),
        ({"use_rslora": True}, None, "rsLoRA r=2 alpha=16 on c_attn, w1"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, 16.0, "DoRA, PiSSA, LoRA+ (16.0) r=2 alpha=16 on c_attn, w1"),
        ({}, 4.0, "LoRA+ (4.0) r=2 alpha=16 on c_attn, w1"),
    ],
)  # fmt: skip
def test_the_method_in_words(settings, ratio, said):
    config = LoraConfig(**{"r": 2, "lora_alpha": 16, "target_modules": ["w1", "c_attn"]} | settings)
    assert report.method(get_peft_model(tiny_model(), config), ratio) == f"{said}, bias none"


def test_a_curve_that_cannot_be_drawn_is_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curve, "draw", lambda *words: (_ for _ in ()).throw(ImportError("no matplotlib")))
    report.print_next_steps(tmp_path, is_adapter=True, delivered="delivered: the last step, 3 of 3")
    told = capsys.readouterr().err
    assert "could not be drawn (ImportError: no matplotlib)" in told and "merge it:" in told


def test_figures_behind_the_bar():
    assert progress.figures(LINE) == ["loss 1.2500", "accuracy 75.0%", "1,234 tok/s", "2.0 GB", "lr 0.0003", "99 learned/s", "MFU 58%"]


def test_the_summary_at_80_columns(monkeypatch):
    """In a terminal broken between words; in a log one line each, which can be searched."""
    text = "282,624 parameters (1.44 %): " + ", ".join(f"h.*.attn.c_attn.lora_{x}" for x in "ABCDEF")
    assert report.laid_out("  trains     ", text) == f"  trains     {text}"
    monkeypatch.setattr(report.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    lines = report.laid_out("  trains     ", text).split("\n")
    assert len(lines) > 1 and all(len(line) < 80 for line in lines) and all(line.startswith(" " * 13) for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == f"trains     {text}"
    assert "/a" * 60 in report.laid_out("  output     ", "/a" * 60)  # what can be copied stays whole


@pytest.mark.parametrize("columns", [80, 200])
def test_the_bar_at_any_width(tmp_path, monkeypatch, capsys, columns):
    """At 80 columns the figures are there, and the bar is not; lines stay above it."""
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    told, state = progress.Progress(str(tmp_path)), SimpleNamespace(global_step=0, max_steps=4000)
    told.on_train_begin(None, state, None)
    told.bar.dynamic_ncols = lambda stream: (columns, 40)
    for state.global_step in (199, 200):
        told.on_step_end(None, state, None)
        told.on_log(None, state, None, logs=LINE | {"loss": 3.0 if state.global_step == 200 else 1.0})
    told.on_train_end(None, state, None)
    shown = re.split("[\r\n]", capsys.readouterr().err)
    assert "step 200: loss 2.0000" in [line.strip() for line in shown]
    last = [line for line in shown if "200/4000" in line][-1]
    assert "loss 3.0000, accuracy 75.0%, 1,234 tok/s, 2.0 GB" in last and len(last) <= columns and ("%|" in last) == (columns > 80)


def test_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    told, state = progress.Progress(str(tmp_path)), SimpleNamespace(global_step=0, max_steps=100)
    told.on_train_begin(None, state, None)
    for state.global_step in range(1, 101):
        now[0] += 4.0 if state.global_step == 1 else 1.5
        told.on_log(None, state, None, logs=LINE)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1 of 100: loss 1.2500, accuracy 75.0%, 1,234 tok/s, 2.0 GB, lr 0.0003, 99 learned/s, MFU 58%, 4 s passed"
    assert lines[1].startswith("step 15 of 100: ") and lines[1].endswith(", 1.5 s a step, 25 s passed, 2 min 8 s left")
    assert lines[-1].endswith(", 1.5 s a step, 2 min 32 s passed") and len(lines) == 9


def test_the_run_in_a_line(capsys):
    log = [{"step": i, "loss": 4.0 - i / 10} for i in range(20)] + [{"step": 7, "eval_loss": 3.5}, {"step": 9, "eval_loss": 3.25}]
    assert report.outcome([*log, {"step": 20, "train_runtime": 153.2}]) == "loss 3.95 -> 2.15, best evaluation 3.25 at step 9, 2 min 33 s"
    assert report.outcome([]) == "" and capsys.readouterr().err == ""
    assert report.outcome([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3000.0}]) == "loss 2 -> 3000"
    assert "the loss rose from 2 to 3000" in capsys.readouterr().err


def test_log_and_curve(tmp_path):
    """A resumed run keeps the lines up to its checkpoint, and only those."""
    (tmp_path / progress.LOG).write_text("".join(json.dumps({"step": i, **LINE}) + "\n" for i in range(1, 6)))
    told, state = progress.Progress(str(tmp_path)), SimpleNamespace(global_step=3, max_steps=30)
    told.on_train_begin(None, state, None)
    for step in range(4, 31):
        state.global_step = step
        told.on_step_end(None, state, None)
        told.on_log(None, state, None, logs=dict(LINE, loss=5 / step))
    told.on_log(None, state, None, logs={"eval_loss": 1.0, "eval_perplexity": 2.7, "eval_token_accuracy": 0.6})
    told.on_train_end(None, state, None)
    with (tmp_path / progress.LOG).open("a") as file:
        file.write('{"step": 31, "lo')  # as a kill leaves it
    report.print_next_steps(tmp_path, is_adapter=False, delivered="delivered: the last step, 3 of 3")
    lines = progress.read_log(tmp_path)
    assert [line["step"] for line in lines] == [*range(1, 31), 30]
    assert lines[3]["loss"] == 1.25
    assert (tmp_path / curve.NAME).read_bytes().startswith(b"\x89PNG")


def test_numbers_that_are_none_are_left_out_of_an_older_log(tmp_path):
    (tmp_path / progress.LOG).write_text('{"step": 1, "loss": 2.0, "grad_norm": NaN}\n{"step": 2, "loss": Infinity}\n')
    assert progress.read_log(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2}]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_file_is_not_filled_with_bars(tmp_path, monkeypatch, capsys, terminal):
    """nohup ... > log: the first line, one now and then, and the last one."""
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    told, state = progress.Progress(str(tmp_path)), SimpleNamespace(global_step=0, max_steps=30)
    told.on_train_begin(None, state, None)
    for state.global_step in range(1, 31):
        told.on_step_end(None, state, None)
        told.on_log(None, state, None, logs=LINE)
    told.on_train_end(None, state, None)
    printed = capsys.readouterr().err
    assert ("30/30" in printed and printed.count("loss") > 30) if terminal else printed.count("\n") == 2


def test_smoothing_starts_at_the_first_value():
    points = curve.smoothed([(1, 4.0), (2, 4.0), (3, 4.0)])
    assert [value for _, value in points] == pytest.approx([4.0, 4.0, 4.0])
    assert curve.smoothed([(1, 0.0), (2, 1.0)])[1][1] == pytest.approx(0.1 / (1 - 0.81))


def test_the_next_command_works_where_the_user_is(monkeypatch, tmp_path):
    root = Path(report.__file__).parents[2]
    monkeypatch.chdir(root)
    assert shlex.split(report.command("finetune.ask", "my out")) == [sys.executable, "-m", "finetune.ask", "my out"]
    monkeypatch.chdir(tmp_path)
    words = shlex.split(report.command("finetune.ask", "my out"))
    assert words == ["cd", str(root), "&&", sys.executable, "-m", "finetune.ask", str(tmp_path / "my out")]


def test_all_findings_of_several_checks_come_together_once():
    findings = errors.Findings()
    with findings:
        raise errors.UserError("a - b - c", "d")
    with findings:
        raise errors.UserError("a - b - c", "e")
    with pytest.raises(errors.UserError) as raised:
        findings.raise_if_any()
    assert raised.value.findings == ["a - b - c", "d", "e"]
    with pytest.raises(KeyError), findings:
        raise KeyError("a defect is not a finding")


def test_ctrl_c_says_how_to_go_on(capsys):
    def job():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        errors.run(job, when_stopped="stopped; go on so")
    assert stopped.value.code == 130 and capsys.readouterr().err == "note: stopped; go on so\n"


def test_other_ends_of_a_run_are_told_in_a_line(capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    for error, expected in [
        (FloatingPointError("the loss became nan"), "error: the loss became nan\n"),
        (OutOfMemoryError("tried 2 GB"), "error: out of GPU memory (tried 2 GB) - lower --max_tokens_per_pass, "),
    ]:
        with pytest.raises(SystemExit) as stopped:
            errors.run(lambda error=error: (_ for _ in ()).throw(error))
        assert stopped.value.code == 1 and capsys.readouterr().err.startswith(expected)
    with pytest.raises(SystemExit) as stopped:
        errors.run(lambda: (_ for _ in ()).throw(RuntimeError("a defect")))
    printed = capsys.readouterr().err
    assert stopped.value.code == 1 and printed.startswith("Traceback") and "RuntimeError: a defect" in printed


@pytest.mark.parametrize("may_speak,printed", [(True, "error: a\nerror: b\n"), (False, "")])
def test_run_prints_findings_once_and_exits_with_2(may_speak, printed, capsys):
    def job():
        raise errors.UserError("a", "b")

    with pytest.raises(SystemExit) as stopped:
        errors.run(job, speak=lambda line, say: say() if may_speak else None)
    assert stopped.value.code == 2 and capsys.readouterr().err == printed


def test_a_rank_that_misses_another_says_so_in_a_line(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    gone = RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.2]:4711")
    with pytest.raises(SystemExit):
        errors.run(lambda: (_ for _ in ()).throw(gone))
    printed = capsys.readouterr().err
    assert printed.startswith("error: the connection to another process is lost (") and printed.count("\n") == 1


def test_what_was_told_is_handed_to_the_agent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    errors.tell("a  b", "c")
    assert json.loads((tmp_path / "error.json").read_text()) == {"message": "a b; c"}
    assert capsys.readouterr().err == "error: a b\nerror: c\n"
