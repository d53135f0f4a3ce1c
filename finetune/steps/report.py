"""What a person sees before training, a summary, and after it: what came of it, and the commands that come next."""

import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback

from qwen_model import fused
from qwen_model.attention import is_ampere, torch_has_varlen

from ..distributed import engines, ranks
from ..distributed.engines import size_of
from ..errors import listed, note, on_first_rank, put, warn
from ..folders import adapter_folder
from ..lora import pissa
from ..model import later_qwen
from ..model.loading import compute_dtype
from ..quantized import quantized_model
from . import curve, progress


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
    return "\n".join(laid_out(f"  {name:<11}", value) for name, value in rows)


def laid_out(head: str, text: str) -> str:
    """A line of the summary; in a terminal broken between words, as wide as that is."""
    if not sys.stderr.isatty():
        return f"{head}{text}"
    room = max(20, shutil.get_terminal_size().columns - 1)
    return textwrap.fill(text, room, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False)


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


RISEN = 1.05  # times the loss that a run began with: more than noise


def replace_progress_callbacks(trainer) -> None:
    """Replaces transformers' progress bar and printed dictionaries by ours."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress.Progress(trainer.args.output_dir))


def print_next_steps(out: Path, is_adapter: bool, delivered: str) -> None:
    """Prints where the result is, what it is of, and which commands come next."""
    log, lines = out / progress.LOG, progress.read_log(out)
    try:
        curve.draw(lines, out / curve.NAME, out.resolve().name)
        note(f"done: {out} (loss curve in {out / curve.NAME}, log in {log})")
    except Exception as error:  # the model is saved: a picture must not make a failure of it
        warn(f"the loss curve could not be drawn ({type(error).__name__}: {error}); its numbers are in {log}")
        note(f"done: {out}")
    if line := outcome(lines):
        note(line)
    note(delivered)
    note(f"try it:    {command('finetune.ask', out)}")
    if is_adapter:
        note(f"merge it:  {command('finetune.merge', out, f'{out}_merged')}")
    if (out / "runs").is_dir():
        note(f"its curves: tensorboard --logdir {shlex.quote(str(out / 'runs'))}")


def outcome(lines: list[dict]) -> str:
    """What the log says in a line: "loss 4.28 -> 0.61, best evaluation 3.89 at step 28, 2 min 33 s". Warns where the loss rose.

    The loss at each end is the mean of a tenth of the logged ones there.
    """
    losses = [line["loss"] for line in lines if "loss" in line]
    if not losses:
        return ""
    each = max(1, len(losses) // 10)
    first, last = (sum(some) / each for some in (losses[:each], losses[-each:]))
    if last > RISEN * first:
        warn(f"the loss rose from {first:.4g} to {last:.4g}: what came out is worse than what went in - start again with a lower --learning_rate")
    said = f"loss {first:.4g} -> {last:.4g}"
    evaluations = [(line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line]
    if evaluations:
        said += ", best evaluation {:.4g} at step {}".format(*min(evaluations))
    seconds = next((line["train_runtime"] for line in reversed(lines) if "train_runtime" in line), None)
    return f"{said}, {progress.in_time(seconds)}" if seconds is not None else said


def command(module: str, *paths) -> str:
    """The line that runs a program of this package, as it can be pasted where the user is."""
    root, paths = Path(__file__).resolve().parents[2], [Path(path) for path in paths]
    here = Path.cwd() == root
    words = [sys.executable, "-m", module, *(path if here else path.absolute() for path in paths)]
    line = shlex.join(map(str, words))
    return line if here else f"cd {shlex.quote(str(root))} && {line}"
