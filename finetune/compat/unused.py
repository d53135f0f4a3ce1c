"""Packages that a run does not use: transformers and peft import what is installed, which takes seconds and prints lines."""

import sys


def leave_out(names) -> None:
    """Makes this process find none of these packages, as if they were not installed.

    For a program that knows from its command line what it will do, and before transformers is imported: it asks once which
    packages are there. Where it is imported already (in tests, in a notebook), nothing changes.
    """
    if "transformers" not in sys.modules:
        for name in names:
            sys.modules.setdefault(name, None)  # to import it raises ModuleNotFoundError
