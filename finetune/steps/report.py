"""What a person sees: a summary before training, a progress bar while it runs, a loss curve and a log after it."""

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from qwen_model import fused
from qwen_model.attention import is_ampere, torch_has_varlen

from .. import json_text
from ..distributed import engines, ranks
from ..distributed.engines import size_of
from ..errors import listed, note, on_first_rank, put, warn
from ..folders import adapter_folder
from ..lora import pissa
from ..model import later_qwen
from ..model.loading import compute_dtype
from ..quantized import quantized_model

LOG = "training_log.jsonl"
CURVE = "loss.png"


def summary(args, job, model) -> str:
    """Method, data, steps, memory and trainable parameters, before the first step. job: of preparation.prepare()."""
    samples, eval_samples, plan = job.samples, job.eval_samples, job.plan
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = sum(map(size_of, trained.values()))
    every = quantized_model.packed_away(model) + sum(size_of(p) for name, p in model.named_parameters() if is_base(name))
    training, ratio = args.training, args.lora.loraplus_lr_ratio if args.lora.use_lora else None
    precision = str(compute_dtype(training)).removeprefix("torch.")
    steps = plan.total_steps(training.num_train_epochs, training.max_steps)
    rows = [
        ("model", f"{args.model.model_name_or_path} ({model.config.model_type}, {every:,} parameters)"),
        ("method", f"{method(model, ratio)}, {precision} on {training.device.type}"),
        ("engine", engine(training)),
        ("trains", f"{count:,} parameters ({100 * count / every:.2f} %): {kinds(trained)}"),
        ("attention", attention(model, training)),
        ("kernels", kernels(model, training.device)),
        ("data", samples.describe()),
        *([("evaluation", eval_samples.describe())] if eval_samples is not None else []),
        ("steps", plan.in_words(steps)),
        ("memory", job.memory.describe()),
        ("output", training.output_dir),
    ]
    if steps < 10:
        warn(
            f"{len(samples)} samples, {plan.samples_per_step} per step (ranks x batch x accumulation): only {steps} "
            "optimizer steps in all - lower --gradient_accumulation_steps, or train more epochs"
        )
    return "\n".join(f"  {name:<11}{value}" for name, value in rows)


def is_base(name: str) -> bool:
    """A parameter of the model itself, not one that an adapter adds."""
    return not any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_delta"))


def show(text: str) -> None:
    """Prints on the first rank."""
    if on_first_rank():
        put(text)


def engine(training) -> str:
    """Engine, ranks and machines as text."""
    name, machines = engines.name_of(vars(training)), ranks.machines()
    over = f", {ranks.count()} ranks" if ranks.count() > 1 else ""
    return f"{name}{over}" + (f" on {machines} machines" if machines > 1 else "")


def method(model, loraplus_lr_ratio: float | None = None) -> str:
    """What trains, as the model says it: an adapter that is gone on with brings its own settings. But LoRA+ is a flag's."""
    if not hasattr(model, "peft_config"):
        return "full-parameter"
    config = model.peft_config["default"]
    kinds = {"DoRA": config.use_dora, "rsLoRA": config.use_rslora, "PiSSA": pissa.is_asked_for(config.init_lora_weights)}
    kinds[f"LoRA+ ({loraplus_lr_ratio})"] = loraplus_lr_ratio
    kind = ", ".join(name for name, asked in kinds.items() if asked) or "LoRA"
    said = f"{kind} {adapter_folder.describe_adapter(vars(config))}{beside(config)}"
    over = getattr(model.config, "quantization_config", None)
    return f"Q-{said}" if over else said


def beside(config) -> str:
    """What else trains beside the adapters of a LoraConfig."""
    rows = config.trainable_token_indices
    if rows:
        found = len(next(iter(rows.values())) if isinstance(rows, dict) else rows)
        return f", and {found} tokens' rows of {' and '.join(rows) if isinstance(rows, dict) else 'the embedding'}"
    return f", and {' and '.join(sorted(config.modules_to_save))}" if config.modules_to_save else ""


def attention(model, training) -> str:
    """Which attention the passes use, and why."""
    name, base = model.config._attn_implementation, model.get_base_model() if hasattr(model, "peft_config") else model
    if name == "flash_attention_2":
        return f"flash-attn 2 over packed samples ({base.attention_reason})"
    if base.attention_reason == later_qwen.SLIDING:
        return f"{name} ({later_qwen.SLIDING})"
    if training.device.type == "cuda" and compute_dtype(training) != torch.float32:
        if torch_has_varlen() and is_ampere(training.device):
            return f"torch's variable-length attention over packed samples ({base.attention_reason})"
    why = "float32, or no CUDA device" if base.attention_reason == "as asked for" else base.attention_reason
    return f"sdpa, sample by sample ({why})"


def kernels(model, device) -> str:
    """What computes norms, rotary embedding and gate of the blocks, and the softmax of the loss."""
    own = fused.describe_kernels(device)
    return own if model.config.model_type == "qwen" else f"{own} for the loss, norms and gates; the rest of the blocks is transformers' own"


def kinds(trained) -> str:
    """The trained parameters by kind, without layer numbers and adapter names: "h.*.attn.c_attn.lora_A, ..."."""
    found: dict[str, None] = {}
    for name in trained:
        parts = [
            part for part in name.split(".") if part not in ("base_model", "model", "transformer", "default", "weight")
        ]
        found[".".join("*" if part.isdigit() else part for part in parts)] = None
    return listed(list(found), 6, "more kinds")


class Report(TrainerCallback):
    """The progress bar, the log as JSON lines, and the loss curve. On the first rank only.

    A resumed run goes on with the log that is there: the steps after the checkpoint are dropped, they come again.
    """

    def __init__(self, output_dir: str):
        self.folder, self.bar, self.live, self.figures = Path(output_dir), None, True, {}

    def on_train_begin(self, args, state, control, **kwargs):
        if not on_first_rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = (
            [line for line in read_log(self.folder) if line["step"] <= state.global_step] if state.global_step else []
        )
        written = self.folder / f"{LOG}.new"
        written.write_text("".join(json_text.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(written, self.folder / LOG)
        self.live = sys.stderr.isatty()  # a file keeps every line that a terminal draws over
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            mininterval=0.5 if self.live else 20,
            delay=0,  # unlike all others: at once
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json_text.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" in logs:
            self.figures.update(figures(logs))
            self.bar.set_postfix(self.figures, refresh=self.live)
        elif "eval_loss" in logs:
            loss, perplexity = logs["eval_loss"], logs["eval_perplexity"]
            self.bar.write(f"step {state.global_step}: evaluation loss {loss:.4f}, perplexity {perplexity:.2f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.close_bar()

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def read_log(folder: Path) -> list[dict]:
    """The lines of the log, without a last one that a kill left unfinished, and without numbers that are none, of an older version."""
    path, lines = folder / LOG, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found = json.loads(line, parse_constant=lambda name: None)
            lines.append({key: value for key, value in found.items() if value is not None})
    return lines


def figures(logs: dict) -> dict[str, str]:
    """A line of the log as it stands behind the bar."""
    shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.2e}"}
    if "tokens_per_second" in logs:
        shown["tok/s"] = f"{logs['tokens_per_second']:,.0f}"
        shown["supervised/s"] = f"{logs['supervised_tokens_per_second']:,.0f}"
    return shown | {"mem": f"{logs['memory_gb']:.1f}GB"}


def draw(folder: Path) -> None:
    """The loss curve (training, and evaluation if there was one) over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(folder)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluation = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if not train:
        return
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*train), color="#7aa6c2", linewidth=1, label="training")
    if len(train) >= 20:
        axes.plot(*zip(*smoothed(train)), color="#1f4e6b", linewidth=2, label="training, smoothed")
    if evaluation:
        axes.plot(*zip(*evaluation), color="#d1603d", marker="o", label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", title=folder.resolve().name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / CURVE, dpi=130)
    plt.close(figure)


def smoothed(points, weight: float = 0.9):
    """Exponential moving average, corrected for its start (Kingma and Ba, 2015)."""
    average, result = 0.0, []
    for number, (step, value) in enumerate(points, start=1):
        average = weight * average + (1 - weight) * value
        result.append((step, average / (1 - weight**number)))
    return result


def replace_progress_callbacks(trainer) -> None:
    """Replaces transformers' progress bar and printed dictionaries by the Report."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Report(trainer.args.output_dir))


def print_next_steps(out: Path, is_adapter: bool, delivered: str) -> None:
    """Prints where the result is, what it is of, and which commands come next."""
    try:
        draw(out)
        note(f"done: {out} (loss curve in {out / CURVE}, log in {out / LOG})")
    except Exception as error:  # the model is saved: a picture must not make a failure of it
        warn(f"the loss curve could not be drawn ({type(error).__name__}: {error}); its numbers are in {out / LOG}")
        note(f"done: {out}")
    note(delivered)
    note(f"try it:    {command('finetune.ask', out)}")
    if is_adapter:
        note(f"merge it:  {command('finetune.merge', out, f'{out}_merged')}")
    if (out / "runs").is_dir():
        note(f"its curves: tensorboard --logdir {shlex.quote(str(out / 'runs'))}")


def command(module: str, *paths) -> str:
    """The line that runs a program of this package, as it can be pasted where the user is."""
    root, paths = Path(__file__).resolve().parents[2], [Path(path) for path in paths]
    here = Path.cwd() == root
    words = [sys.executable, "-m", module, *(path if here else path.absolute() for path in paths)]
    line = shlex.join(map(str, words))
    return line if here else f"cd {shlex.quote(str(root))} && {line}"
