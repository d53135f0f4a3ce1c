"""The versions of transformers that this code is made for. Imports nothing but the standard library; is saved with every model."""

import importlib.metadata
import re

# tests/versions.sh runs both ends
OLDEST, NEWEST = "5.17.0", "5.24.0"

TOO_OLD = (
    "first-generation Qwen's code needs transformers {oldest} to {newest}, and {installed} is installed - "
    'pip install "transformers=={newest}"'
)
NOT_TESTED = (
    "transformers {installed} is newer than {newest}, the last one that this code of first-generation Qwen was tested with. If "
    'something fails: pip install "transformers=={newest}". A newer fine-tuning toolkit brings newer code: '
    "python -m finetune.refresh FOLDER replaces what lies in a model's folder"
)
CHANGED = (
    "transformers {installed} has changed what first-generation Qwen's code builds on ({what}). This code is for {oldest} to "
    '{newest} - pip install "transformers=={newest}", or newer code by python -m finetune.refresh FOLDER'
)


def installed() -> str:
    return importlib.metadata.version("transformers")


def words(text: str, **more) -> str:
    """A message, with the versions in it."""
    return text.format(installed=installed(), oldest=OLDEST, newest=NEWEST, **more)


def numbers(version: str) -> tuple[int, ...]:
    """ "5.24.0.dev0" -> (5, 24, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def too_old() -> str:
    """What to tell the user of a transformers that this code cannot run on; "" where it can."""
    return words(TOO_OLD) if numbers(installed()) < numbers(OLDEST) else ""


def not_tested() -> str:
    """What to tell the user of a transformers that is newer than any that was tried; "" for one that was."""
    return words(NOT_TESTED) if numbers(installed()) > numbers(NEWEST) else ""
