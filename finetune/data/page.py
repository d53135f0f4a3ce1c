"""A look as one self-contained page: no file beside it, no network. What it shows lies in it as JSON; page.html draws it."""

from pathlib import Path

from .. import json_text
from .look import Look

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "/*LOOK*/"


def html_of(look: Look) -> str:
    """The page. Texts of the data are JSON in a script element, in which nothing can end that element."""
    values = {
        "title": look.title,
        "rows": look.rows,
        "bars": look.bars,
        "limit": look.limit,
        "notes": look.notes,
        "findings": look.findings,
        "shown": [
            {"number": shown.number, "name": shown.name, "tokens": shown.tokens, "learned": shown.learned, "spans": list(shown.spans)}
            for shown in look.shown
        ],
    }
    text = json_text.dumps(values).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    return f"{before}{text}{after}"
