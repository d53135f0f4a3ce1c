"""Values as tables hold them: what is a list elsewhere is JSON in a text there."""

import json

from ..data_files.window import DECODER


def listed(value: object) -> object:
    """The list that a text holds as JSON; every other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = DECODER.decode(value.strip())
    except (json.JSONDecodeError, RecursionError):
        return value
    return found if isinstance(found, list) else value
