"""Shows a look: as text on standard output, and as a page where --html asks for one."""

import shutil
from pathlib import Path

from ..errors import UserError, note
from ..steps.preparation import Job
from . import page, run_rows, terminal
from .look import Look, data_look


def look_at_run(args, job: Job, free: float) -> Look:
    """What a prepared run would do. free: bytes of memory for each process."""
    title = f"{args.data.title()} for {args.model.model_name_or_path}"
    return data_look(job.samples, job.tokenizer, title, run_rows.run_rows(args, job, free))


def show(look: Look, html: str | None) -> None:
    """On standard output, as wide as the terminal is."""
    width = min(shutil.get_terminal_size().columns, 120)
    print(terminal.text_of(look, max(40, width), terminal.has_colours()), end="", flush=True)
    if html:
        write_page(look, Path(html).expanduser())


def write_page(look: Look, path: Path) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.write_text(page.html_of(look), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}) - give a file in a folder that exists") from error
    note(f"the same as a page: {path}")
