"""How far models agree: python -m finetune.compare A B [C ...] --data_path HELD_OUT

A is the reference, for example the adapter or the 16-bit model; the others what was made of it. Each is a model's folder, plain
or quantized, or an adapter's. Prints perplexity on the answers, KL divergence of the next-token distributions from A's, the
share of equal greedy tokens, and a few answers side by side. One model at a time is in memory.
"""

import importlib.metadata
import os
import random
from pathlib import Path

from .. import json_text
from ..errors import Options, UserError, is_full, note, run, visible
from ..model import packages
from ..quiet import quiet
from . import opened, side_by_side

SAMPLES, SEED = 64, 42
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def main(argv: list[str] | None = None) -> None:
    parser = Options(prog="python -m finetune.compare", description=__doc__.split("\n\n")[1])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub ids, the reference first")
    parser.add_argument(
        "--data_path",
        help="held-out conversations; without them, the reference's own answers to a few questions are scored",
    )
    parser.add_argument("--samples", type=int, help=f"conversations to draw; 0: all (default: {SAMPLES})")
    parser.add_argument("--seed", type=int, help=f"of the draw (default: {SEED})")
    parser.add_argument("--model_max_length", type=int, default=2048, help="tokens of a conversation that are read")
    parser.add_argument("--long_samples", choices=["cut", "drop"], default="cut", help="longer ones (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=5, help="answers to show side by side (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of a shown answer (default: %(default)s)")
    parser.add_argument("--base", help="base of the adapters among the models, if it has moved")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="to compute in; auto: as stored on a GPU, float32 on a CPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all figures and answers there, too")
    options = parser.parse_args(argv)
    quiet()

    def job():
        if argv is None:  # a process of its own
            packages.leave_out_with(options.models, options.base)
        compare(options)

    run(job)


def compare(options) -> None:
    """Checks, measures, prints."""
    from ..conversations import reading  # and with it tqdm, which reads quiet()'s settings then

    check_options(options)
    adapters = [name for name in options.models if opened.is_adapter(name)]
    if options.base and not adapters:
        raise UserError(f"--base {options.base}: none of the models is an adapter, which has a base - leave it out")
    models = [opened.open_named(name, options.base if name in adapters else None) for name in options.models]
    if options.data_path and not reading.begins_well(options.data_path):
        reading.read(options.data_path)  # which says what is wrong, before seconds of imports
    from . import agreement  # with torch

    samples, prompts = scored_samples(options, models)
    prompts, dtype = prompts[: options.answers], dtype_of(options.dtype)

    def answers(model) -> list[str]:
        whole = [agreement.continued(model, prompt, options.max_new_tokens) for prompt in prompts]
        return [text(models[0].tokenizer, ids[len(prompt) :]) for prompt, ids in zip(prompts, whole)]

    loaders = [lambda model=model: model.load(dtype) for model in models]
    results = agreement.measure(loaders, samples, answers)
    print(table(options.models, results, own=not options.data_path))
    questions = [question_in(models[0].tokenizer, prompt) for prompt in prompts]
    print(visible(side_by_side.answers(questions, [result.answers for result in results], LABELS)))
    if options.json:
        write_json(options, results, questions, dtype)
        note(f"all figures: {options.json}")


def check_options(options) -> None:
    """UserError for options that cannot work, before anything is opened; sets those of the draw, if there is one."""
    if not 2 <= len(options.models) <= len(LABELS):
        count = len(options.models)
        remedy = "the reference and at least one to compare with it" if count < 2 else f"{len(LABELS)} at most"
        raise UserError(f"{count} model{'s' * (count > 1)} given - give {remedy}")
    for name, usual in (("samples", SAMPLES), ("seed", SEED)):
        given = getattr(options, name)
        if given is not None and not options.data_path:
            raise UserError(f"--{name} {given}: nothing to draw from without --data_path - add it, or leave this out")
        if given is None and options.data_path:
            setattr(options, name, usual)
    for name, least in (("samples", 0), ("answers", 0), ("max_new_tokens", 1), ("model_max_length", 2)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: below {least} - give a larger number")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: no folder {options.json.parent} - make it first")


def dtype_of(name: str):
    """What to compute in; None: as stored."""
    import torch

    if name == "auto":
        return None if torch.cuda.is_available() else torch.float32
    return getattr(torch, name)


# ---- what is scored


def scored_samples(options, models: list):
    """(samples for agreement.measure, prompts to answer), both of token ids; the same ones for all models."""
    from .agreement import own_answers, question_prompts

    if not options.data_path:
        prompts = [question_prompts(model.tokenizer) for model in models]
        check_same(options.models, prompts)
        return lambda model: own_answers(model, prompts[0], options.max_new_tokens), prompts[0]
    rendered = [drawn(options, model.tokenizer) for model in models]
    check_same(options.models, [fingerprint for _, fingerprint in rendered])
    samples = rendered[0][0]
    return samples, [prompt_of(*sample) for sample in samples]


def drawn(options, tokenizer) -> tuple[list, str]:
    """(the drawn samples, what tells whether another tokenizer makes the same ones)."""
    from ..samples import rendered_samples

    length, long_samples = options.model_max_length, options.long_samples
    every = rendered_samples.load(options.data_path, tokenizer, max_length=length, long_samples=long_samples)
    numbers = range(len(every))
    if 0 < options.samples < len(every):
        numbers = sorted(random.Random(options.seed).sample(numbers, options.samples))
    return [every[i] for i in numbers], every.fingerprint


def check_same(names: list[str], tokens: list) -> None:
    """Models that do not share their tokens cannot be compared token by token."""
    for name, found in zip(names[1:], tokens[1:]):
        if found != tokens[0]:
            what = f"{name}: makes other tokens of the conversations than {names[0]}"
            raise UserError(f"{what} - compare models with one tokenizer and one chat template")


def prompt_of(ids, labels) -> list[int]:
    """A sample up to its first answer."""
    from qwen_model.chatml import IGNORE

    begin = next(i for i, label in enumerate(labels) if label != IGNORE)
    return [int(token) for token in ids[:begin]]


# ---- what is shown


def text(tokenizer, ids: list[int]) -> str:
    """An answer without the tokens that end it."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def question_in(tokenizer, prompt: list[int]) -> str:
    """The user's last message in a prompt."""
    whole = tokenizer.decode(prompt)
    return whole.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0].strip()


def table(names: list[str], results: list, own: bool) -> str:
    """A row for each model. own: the reference's own answers were scored, on which its perplexity says nothing."""
    scored = "of A's own answers" if own else "of answers"
    lines = [
        f"{results[0].tokens:,} tokens {scored} scored",
        "",
        f"    {'perplexity':>10}  {'to A':>8}  {'KL mean':>9}  {'KL largest':>10}  {'same greedy':>11}  model",
    ]
    for label, name, found in zip(LABELS, names, results):
        change = f"{found.perplexity / results[0].perplexity - 1:+.2%}" if label != "A" else ""
        lines.append(
            f"  {label} {found.perplexity:>10.4f}  {change:>8}  {found.kl_mean:>9.2e}  {found.kl_max:>10.2e}  "
            f"{found.same_greedy:>11.2%}  {name}"
        )
    return "\n".join(lines)


def write_json(options, results: list, questions: list[str], dtype) -> None:
    models = [{"model": name} | found.figures() for name, found in zip(options.models, results)]
    for entry, found in zip(models, results):
        entry["kl_max_at"] = dict(zip(("sample", "position"), found.kl_max_at))
    answers = [
        {"question": question, "answers": [found.answers[i] for found in results]}
        for i, question in enumerate(questions)
    ]
    settings = {name: value for name, value in vars(options).items() if name not in ("models", "json")}
    settings["dtype"] = str(dtype or "as stored").removeprefix("torch.")
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")}
    whole = {"models": models, "answers": answers, "settings": settings, "versions": versions}
    written = options.json.with_name(f"{options.json.name}.unfinished")
    try:
        json_text.write(written, whole)
        os.replace(written, options.json)
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"--json {options.json}: cannot be written ({error.strerror}) - give a file that you may write") from error
    finally:
        written.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
