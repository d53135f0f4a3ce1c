"""Which checkpoint is the best, when to stop because none gets better, and what of all is delivered at the end."""

from transformers import TrainerCallback

from ..errors import note
from ..flags.training_values import METRICS


class StopEarly(TrainerCallback):
    """--early_stopping_patience: stops when so many evaluations in a row were no better than the best. `metric`: eval_NAME. It keeps no state: the log, which a checkpoint holds, says it all."""

    def __init__(self, metric: str, patience: int):
        self.metric, self.patience = metric, patience

    @classmethod
    def of(cls, training) -> list["StopEarly"]:
        """As the flags say: one, or none."""
        patience = training.early_stopping_patience
        return [cls(metric_of(training), patience)] if patience else []

    def on_evaluate(self, args, state, control, **kwargs):
        since, best = since_best(state.log_history, self.metric)
        if since >= self.patience:
            control.should_training_stop = True
            note(
                f"stopping early behind step {state.global_step}: the last {since} evaluations were no better than that of step "
                f"{best['step']} ({in_words(self.metric, best[self.metric])})"
            )


def since_best(log: list[dict], metric: str) -> tuple[int, dict]:
    """(how many evaluations came after the best one, the line of that one). log: lines with "step", some of them with the metric."""
    lines = [line for line in log if metric in line]
    if not lines:
        return 0, {}
    sign = -1 if METRICS[metric.removeprefix("eval_")] else 1
    best = min(range(len(lines)), key=lambda i: sign * lines[i][metric])
    return len(lines) - 1 - best, lines[best]


def stopped_early(log: list[dict], training) -> bool:
    """Whether a run with these evaluations is over by --early_stopping_patience."""
    patience = training.early_stopping_patience
    return bool(patience) and since_best(log, metric_of(training))[0] >= patience


def metric_of(training) -> str:
    """The metric of --metric_for_best_model as evaluations call it."""
    return f"eval_{(training.metric_for_best_model or 'loss').removeprefix('eval_')}"


def in_words(metric: str, value: float) -> str:
    return f"{metric.removeprefix('eval_').replace('loss', 'evaluation loss').replace('_', ' ')} {value:.4f}"


def delivered(state, training) -> dict:
    """What the output folder holds: {"which": "last" or "best", "step": N, the evaluation of that step where there was one}.

    state: transformers' TrainerState at the end of the run.
    """
    best = training.load_best_model_at_end and state.best_model_checkpoint is not None
    step = state.best_global_step if best else state.global_step
    found = next((line for line in reversed(state.log_history) if line["step"] == step and "eval_loss" in line), {})
    evaluation = {name: found[name] for name in map("eval_{}".format, METRICS) if name in found}
    return {"which": "best" if best else "last", "step": step, **evaluation}


def describe_delivered(state, training) -> str:
    """The same for people, and whether an earlier step was better."""
    found, metric = delivered(state, training), metric_of(training)
    said = f"delivered: the {found['which']} step, {found['step']} of {state.global_step}"
    said += f" ({in_words(metric, found[metric])})" if metric in found else ""
    since, line = since_best(state.log_history, metric)
    if found["which"] == "last" and since and line[metric] != found.get(metric):
        hint = "--load_best_model_at_end delivers the best"
        said += f"; step {line['step']} was better ({in_words(metric, line[metric])}): {hint}"
    return said
