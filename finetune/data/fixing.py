"""--write_fixed: the conversations of a file that can be read, in one form, in a new file."""

import os
from collections.abc import Iterable
from pathlib import Path

from .. import json_text
from ..conversations.messages import Conversation
from ..errors import UserError


def write_fixed(conversations: Iterable[Conversation], sources: list[str], out: Path) -> int:
    """Writes JSON lines of OpenAI's messages, UTF-8; returns how many. sources: the data files.

    The file appears once it is whole. Raises UserError where it is there already, or cannot be written.
    """
    if os.path.lexists(out):
        own = any(os.path.exists(source) and out.exists() and os.path.samefile(source, out) for source in sources)
        what = "is the data file itself, which is kept as it is" if own else "is there already, and is kept as it is"
        raise UserError(f"--write_fixed {out}: {what} - give another name")
    written, count = out.with_name(f"{out.name}.unfinished"), 0
    try:
        with written.open("w", encoding="utf-8") as file:
            for conversation in conversations:
                file.write(json_text.dumps(sample_of(conversation)) + "\n")
                count += 1
        os.replace(written, out)
    except OSError as error:
        remedy = "give a file in a folder that exists and has room"
        raise UserError(f"--write_fixed {out}: cannot be written ({error.strerror}) - {remedy}") from error
    finally:
        written.unlink(missing_ok=True)
    return count


def sample_of(conversation: Conversation) -> dict:
    """The inner form (conversations/messages.py) is OpenAI's, so it is written as it is."""
    return {"messages": conversation.messages} | ({"tools": conversation.tools} if conversation.tools else {})
