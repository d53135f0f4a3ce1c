"""Packages that a run does not use: transformers and peft import what is installed, which takes seconds and prints lines."""

import sys


def leave_out(names) -> None:
    """Makes imports of these packages fail in this process, as if they were not installed.

    Call it before transformers is imported, which checks once what is installed. Where it is imported already (in tests, in a
    notebook), nothing changes.
    """
    if "transformers" not in sys.modules:
        for name in names:
            sys.modules.setdefault(name, None)  # to import it raises ModuleNotFoundError
