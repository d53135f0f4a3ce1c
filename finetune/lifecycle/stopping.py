"""A run that is asked to stop, by a signal or a deadline: all ranks end behind the same step, save, and exit with errors.STOPPED.

Only while it trains: before and after, signals do what they always do, at once.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

from transformers import TrainerCallback

from ..distributed import ranks
from ..distributed.ranks import meeting
from ..errors import SAME_SECONDS, STOP_SIGNALS, on_first_rank
from ..folders import checkpoints


class Stopping(TrainerCallback):
    """Ends training behind a step, with a checkpoint.

    seconds: from the start of the process, after which the run stops (--stop_after); is_late: ranks may be two steps apart, since
    nobody waits for the GPU's present step.
    """

    def __init__(self, seconds: float | None = None, words: str = "", is_late: bool = False):
        self.deadline = time.monotonic() - age_of_process() + seconds if seconds is not None else None
        self.words, self.why, self.asked_at = words, None, 0.0
        # A rank that leads has begun at most so many steps more than one that asks: the gradient's norm of a step needs all ranks.
        self.lead = 0 if ranks.count() == 1 else 1 + is_late
        self.stop: dict | None = None  # {"step", "why"}, the same on all ranks
        self.stopped_at: int | None = None
        self.begins_anew = False  # the same command would remove the checkpoint: --overwrite_output_dir

    @classmethod
    def of(cls, training) -> "Stopping":
        """As the flags say."""
        return cls(training.seconds_to_stop(), f"--stop_after {training.stop_after}", is_late=training.device.type == "cuda")

    @contextlib.contextmanager
    def listening(self):
        """A context in which signals are such wishes."""
        before = {number: signal.signal(number, self.hear) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number, frame) -> None:
        """The second Ctrl-C ends at once. Written with os.write: a signal may come in the midst of a print."""
        if number == signal.SIGINT and self.why and time.monotonic() > self.asked_at + SAME_SECONDS:
            raise KeyboardInterrupt
        if self.why is None:
            self.why, self.asked_at = signal.Signals(number).name, time.monotonic()
            if on_first_rank():
                again = "; Ctrl-C once more ends at once, without it" if number == signal.SIGINT else ""
                os.write(2, f"\nnote: {self.why}: stopping behind this step, with a checkpoint{again}\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        if self.why is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.why = self.words
        if self.stop is None:
            wish = {"step": state.global_step + self.lead, "why": self.why} if self.why else None
            self.stop = meeting.first_wish("stop", wish)
        if self.stop is not None and self.stop["step"] <= state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step
            self.begins_anew = getattr(args, "overwrite_output_dir", False) and args.resume_from_checkpoint is None

    def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs):
        """Called in the midst of an epoch too, where a run stops: then it is no end of one."""
        if self.stopped_at is not None and self.stopped_at % len(train_dataloader):
            control.should_save = control.should_evaluate = False

    def describe(self, out: Path) -> str | None:
        """The line for a run that was stopped; None for one that came to its end."""
        if self.stopped_at is None:
            return None
        saved = out / f"checkpoint-{self.stopped_at}"
        how = f"the same command{' without --overwrite_output_dir' * self.begins_anew} goes on from it"
        if not checkpoints.is_complete(saved):
            how = "it holds no state of the optimizer (--save_only_model), so no run can go on from it"
        return f"{self.stop['why']}: stopped behind step {self.stopped_at}, with {saved}; {how}"


def age_of_process() -> float:
    """Seconds since this process was started. Linux tells it; elsewhere 0, as if it were now."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", encoding="ascii") as stat, open("/proc/uptime", encoding="ascii") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return 0.0
