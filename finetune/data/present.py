"""Shows a look: as text on standard output, and as a page where --html asks for one. And one sample, as a run begins."""

import shutil
import sys
from pathlib import Path

from ..errors import UserError, note
from ..steps.preparation import Job
from . import look as looking
from . import page, run_rows, terminal
from .look import Look, data_look


def look_at_run(args, job: Job, free: float) -> Look:
    """What a prepared run would do. free: bytes of memory for each process."""
    title = f"{args.data.title()} for {args.model.model_name_or_path}"
    return data_look(job.samples, job.tokenizer, title, run_rows.run_rows(args, job, free))


def first_sample(job: Job) -> str:
    """The first sample as text, for standard error: what is learned of it, and what is not."""
    shown = looking.show(job.samples, job.tokenizer, 0, "the first")
    return terminal.text_of_sample(shown, wide(), terminal.has_colours(sys.stderr))


def wide() -> int:
    """Columns to write in."""
    return max(40, min(shutil.get_terminal_size().columns, 120))


def show(look: Look, html: str | None) -> None:
    """On standard output, as wide as the terminal is."""
    print(terminal.text_of(look, wide(), terminal.has_colours()), end="", flush=True)
    if html:
        write_page(look, Path(html).expanduser())


def write_page(look: Look, path: Path) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.write_text(page.html_of(look), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}) - give a file in a folder that exists") from error
    note(f"the same as a page: {path}")
