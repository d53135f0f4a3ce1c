"""What a person sees while a run trains: a bar in a terminal, lines elsewhere, and for programs a log of JSON lines."""

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from .. import json_text
from ..errors import on_first_rank, put

LOG = "training_log.jsonl"
LINES = 20  # of a whole run that stay above the bar
EVERY_SECONDS = 20  # between lines where there is no terminal
WIDE = 110  # columns: with fewer, the figures take the bar's place
NARROW_BAR = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress(TrainerCallback):
    """The progress bar or its lines, and the log. On the first rank only.

    A resumed run goes on with the log that is there: the steps after the checkpoint are dropped, they come again.
    """

    def __init__(self, output_dir: str):
        self.folder, self.bar, self.pace = Path(output_dir), None, None
        self.losses: list[float] = []  # since the last line above the bar

    def on_train_begin(self, args, state, control, **kwargs):
        if not on_first_rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self.folder) if line["step"] <= state.global_step] if state.global_step else []
        written = self.folder / f"{LOG}.new"
        written.write_text("".join(json_text.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(written, self.folder / LOG)
        self.pace = Pace(state.global_step, state.max_steps)
        if sys.stderr.isatty():
            # delay: unlike all others, at once
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc="training", dynamic_ncols=True, mininterval=0.5, delay=0
            )
            self.fit()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.pace is None or not logs:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json_text.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" in logs:
            self.show(state.global_step, logs)
        elif "eval_loss" in logs:
            self.write(
                f"step {state.global_step}: evaluation loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:.2f}, "
                f"accuracy {logs['eval_token_accuracy']:.1%}"
            )

    def show(self, step: int, logs: dict) -> None:
        """A line of the log, in the bar and now and then above it; without a terminal as a line, at most every EVERY_SECONDS."""
        if self.bar is None:
            if self.pace.is_due(step):
                put(f"step {step:,} of {self.pace.total:,}: {', '.join(figures(logs))}, {self.pace.in_words(step)}")
            return
        self.losses.append(logs["loss"])
        self.fit()
        self.bar.set_postfix_str(", ".join(figures(logs)), refresh=True)
        if step % max(1, self.pace.total // LINES) == 0 and step < self.pace.total:
            self.bar.write(f"step {step:,}: loss {sum(self.losses) / len(self.losses):.4f}", file=sys.stderr)
            self.losses.clear()

    def fit(self) -> None:
        """A terminal may be made wider or narrower while a run trains."""
        self.bar.bar_format = None if shutil.get_terminal_size().columns >= WIDE else NARROW_BAR

    def write(self, line: str) -> None:
        if self.bar is None:
            put(line)
        else:
            self.bar.write(line, file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        self.close_bar()

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Pace:
    """How fast steps come, from the first one on: what comes before it (kernels that are built, self-tests) is not repeated."""

    def __init__(self, done: int, total: int):
        self.total, self.begin, self.first = total, time.monotonic(), None
        self.told_at = -float("inf")

    def is_due(self, step: int) -> bool:
        """Whether a line is to be written now: of the first step, the last one, and some between."""
        now = time.monotonic()
        if self.first is None:
            self.first = step, now
        if now < self.told_at + EVERY_SECONDS and step < self.total:
            return False
        self.told_at = now
        return True

    def in_words(self, step: int) -> str:
        """"0.51 s a step, 4 min 10 s passed, 1 min 2 s left"."""
        now, (first, since) = time.monotonic(), self.first
        passed = f"{in_time(now - self.begin)} passed"
        if step == first:
            return passed
        each = (now - since) / (step - first)
        left = f", {in_time(each * (self.total - step))} left" if step < self.total else ""
        return f"{each:.3g} s a step, {passed}{left}"


def in_time(seconds: float) -> str:
    """"33 s", "2 min 33 s", "3 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def figures(logs: dict) -> list[str]:
    """A line of the log in words, the most telling first: a narrow terminal cuts the end."""
    shown = [f"loss {logs['loss']:.4f}", f"{logs['memory_gb']:.1f} GB", f"lr {logs['learning_rate']:.2g}"]
    if "tokens_per_second" in logs:
        shown[1:1] = [f"accuracy {logs['token_accuracy']:.1%}", f"{logs['tokens_per_second']:,.0f} tok/s"]
        shown += [f"{logs['supervised_tokens_per_second']:,.0f} learned/s", f"MFU {logs['flop_utilization']:.0%}"]
    return shown


def read_log(folder: Path) -> list[dict]:
    """The lines of the log, without a last one that a kill left unfinished, and without numbers that are none, of an older version."""
    path, lines = folder / LOG, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found = json.loads(line, parse_constant=lambda name: None)
            lines.append({key: value for key, value in found.items() if value is not None})
    return lines
