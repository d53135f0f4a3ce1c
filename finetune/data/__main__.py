"""Looks at a data file before a run: python -m finetune.data FILE [-m MODEL]

What is wrong or odd about it, how long the samples are, three of them with what is learned, steps and passes; with a model also
memory, disk and time, for the flags of finetune.py that are given. Without -m, first-generation Qwen's tokenizer counts.
"""

import argparse
from pathlib import Path

from ..data_files.sources import not_there
from ..errors import UserError, note, run
from ..quiet import quiet

USAGE = "python -m finetune.data FILE [FILE ...] [-m MODEL] [--model_max_length N] [any flag of finetune.py]"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.data", usage=USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations (data/README.md); FILE:0.3 takes a share")
    parser.add_argument("-m", "--model_name_or_path", metavar="MODEL", help="a checkpoint's folder, or its Hugging Face id")
    parser.add_argument("--model_max_length", type=int, metavar="N", help="longest sample, in tokens (default: 8192)")
    parser.add_argument("--html", metavar="OUT.html", help="write the same as one page for a browser")
    parser.add_argument(
        "--write_fixed", type=Path, metavar="OUT.jsonl", help="write the conversations that can be read, in one form, without the others"
    )
    parser.add_argument("--gpu_memory", type=float, metavar="GB", help="with -m: plan for a GPU of so many GB that is not here")
    options, rest = parser.parse_known_args(argv)
    quiet()
    run(lambda: look(options, rest))


def look(options, rest: list[str]) -> None:
    """Shows what there is to show, then ends with exit code 2 if something is wrong and was not mended. rest: flags of finetune.py."""
    if missing := not_there(options.files):  # said at once: what follows imports transformers
        raise UserError(*(f"{path}: no such file - give the path of one that exists" for path in missing))
    from . import files, present

    given = {name: getattr(options, name) for name in ("model_name_or_path", "model_max_length", "html", "gpu_memory")}
    flags = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    argv = ["--data_path", *options.files, "--dry_run", *flags, *rest]
    shown, html = files.look_at_files(argv, with_model=options.model_name_or_path is not None)
    present.show(shown, html)
    if options.write_fixed:
        count = files.write_mended(options.files, options.write_fixed.expanduser())
        note(f"wrote {options.write_fixed}: {count:,} conversations")
    elif shown.findings:
        raise UserError(*shown.findings)


if __name__ == "__main__":
    main()
