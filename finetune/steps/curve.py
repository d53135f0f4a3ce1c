"""The picture of a run over its steps: the loss, how many tokens it gets right, the learning rate and the norm of the gradient."""

from pathlib import Path

NAME = "loss.png"
BLUE, DARK, RED = "#7aa6c2", "#1f4e6b", "#d1603d"


def draw(lines: list[dict], path: Path, title: str) -> None:
    """Writes a PNG; nothing without a loss. lines: of progress.read_log()."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    if not points(lines, "loss"):
        return
    figure, (axes, right, below) = plt.subplots(3, sharex=True, figsize=(8, 7.5), height_ratios=(3, 1.5, 1), layout="constrained")
    draw_both(axes, lines, "loss")
    axes.set(ylabel="loss per supervised token (nats)", title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    draw_both(right, lines, "token_accuracy")
    right.set(ylabel="token accuracy", ylim=(0, 1))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    rates, norms = points(lines, "learning_rate"), points(lines, "grad_norm")
    below.set(xlabel="optimizer step")
    below.grid(alpha=0.3)
    for at, name, some, color in ((below, "learning rate", rates, DARK), (below.twinx(), "gradient norm", norms, RED)):
        if some:
            at.plot(*zip(*some), color=color, linewidth=1)
        at.set_ylabel(name, color=color)
        at.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_both(axes, lines: list[dict], name: str) -> None:
    """A figure of training, with its running mean, and of evaluations."""
    train, evaluation = points(lines, name), points(lines, f"eval_{name}")
    if train:
        axes.plot(*zip(*train), color=BLUE, linewidth=1, label="training")
    if len(train) >= 20:
        axes.plot(*zip(*smoothed(train)), color=DARK, linewidth=2, label="training, smoothed")
    if evaluation:
        axes.plot(*zip(*evaluation), color=RED, marker="o", label="evaluation")
    axes.grid(alpha=0.3)


def points(lines: list[dict], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def smoothed(points, weight: float = 0.9):
    """Exponential moving average, corrected for its start (Kingma and Ba, 2015)."""
    average, result = 0.0, []
    for number, (step, value) in enumerate(points, start=1):
        average = weight * average + (1 - weight) * value
        result.append((step, average / (1 - weight**number)))
    return result
