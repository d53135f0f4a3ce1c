"""What python -m finetune.data does with the files that it is given: looks at them as a run would, also where a run would end."""

from pathlib import Path

from ..conversations import reading
from ..data_files.sources import sources_of
from ..errors import UserError, each_line_once, note
from ..flags import args as arguments
from ..flags import first_look
from ..memory import memory_plan
from ..steps import preparation
from . import present, run_rows
from .fixing import write_fixed
from .look import Look, data_look


def look_at_files(argv: list[str], with_model: bool) -> tuple[Look, str | None]:
    """(the look, where its page goes). argv: flags of finetune.py. What is wrong with the data is among the look's findings.

    Raises UserError for what is wrong with flags or model, and where the data leave nothing to look at.
    """
    with each_line_once():
        args = parsed(argv, with_model)
        try:
            return look_at(args, with_model), args.look.html
        except UserError as error:
            if args.data.bad_samples == "drop":
                raise
            findings = error.findings
        args = parsed([*argv, "--bad_samples", "drop"], with_model)
        try:
            look = look_at(args, with_model)
        except UserError:
            raise UserError(*findings) from None
    look.findings.extend(findings)
    return look, args.look.html


def look_at(args, with_model: bool) -> Look:
    return look_with_model(args) if with_model else look_without_model(args)


def parsed(argv: list[str], with_model: bool):
    """The flags; without a model, without the seconds that torch's import takes."""
    args = None if with_model else first_look.read(argv)
    return args or arguments.parse(argv)


def write_mended(words: list[str], out: Path) -> int:
    """--write_fixed: what can be read of the files, in one form. Says of the rest why; returns how many were written."""
    sources = sources_of(words, "FILE")
    read = [reading.read(source.path, flag="FILE", bad_samples="drop") for source in sources]
    for conversations in read:
        for line in conversations.notes:
            if "left out" in line:
                note(f"{conversations.path}: {line}")
    every = (conversation for conversations in read for conversation in conversations)
    return write_fixed(every, [source.path for source in sources], out)


def look_with_model(args) -> Look:
    """As finetune.py --dry_run."""
    free = memory_plan.free_bytes(args)
    job = preparation.prepare(args, Path(args.training.output_dir), free=free)
    return present.look_at_run(args, job, free)


def look_without_model(args) -> Look:
    """Counted with first-generation Qwen's tokenizer."""
    from qwen_model.tokenization_qwen import QWenTokenizer
    from qwen_model.vocabulary import find_vocabulary

    if args.findings:
        raise UserError(*args.findings)
    tokenizer = QWenTokenizer(find_vocabulary())
    samples, _ = preparation.load_data(args, tokenizer)
    args.training.world_size = 1
    if args.data.max_tokens_per_pass == memory_plan.AUTO:
        args.data.max_tokens_per_pass = memory_plan.LARGEST
    plan = preparation.plan_of(args, samples, args.data.max_tokens_per_pass)
    title = f"{args.data.title()}, counted with first-generation Qwen's tokenizer (-m MODEL: with the model's)"
    return data_look(samples, tokenizer, title, run_rows.step_rows(plan, args.training))
