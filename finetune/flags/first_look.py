"""The first look at a command line, within a second: what can be told without torch and transformers, whose import takes seven.

What it finds ends the program, all findings together. Else everything is read and checked anew by args.parse() and
preparation.prepare(), which find the rest; of the conversations, which may be large, this reads the beginning.
"""

import dataclasses
import sys
from types import SimpleNamespace

from ..compat import on_transformers, unused
from ..conversations import reading
from ..errors import Findings, first_of_two
from ..model import packages
from . import args as arguments
from . import checks, training_values
from .definitions import Args, TrainingFlags


def take(argv: list[str] | None = None, alone: bool = True) -> None:
    """Prints the help and ends, where that is asked for; raises UserError with all that is found.

    alone: no other process takes part in this run. Several check together, after they have met (preparation.prepare()).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments.help_asked_for(argv)
    with first_of_two():
        args = read(argv)
        if args is None:  # another transformers, whose flags its source does not tell
            return
        if alone:
            check(args)
    unused.leave_out(packages.unused_in_run(args))


def read(argv: list[str]) -> Args | None:
    """The flags, those for training as a plain object; None where transformers' are not known. UserError for a wrong value."""
    kind = on_transformers.training_flags(TrainingFlags)
    if kind is None:
        return None
    args = arguments.parse_as(kind, argv)
    usual = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    values, findings = training_values.checked(args.training, usual)
    return dataclasses.replace(args, training=SimpleNamespace(**values), findings=args.findings + findings)


def check(args: Args) -> None:
    """Raises UserError with what is wrong with flags, folders, and what the conversations begin with."""
    findings, sources = Findings(), []
    with findings:
        checks.check_first(args)
    with findings:
        sources = args.data.sources()
    bad = args.data.bad_samples
    if findings.findings or not (bad == "drop" or all(reading.begins_well(source.path, source.flag) for source in sources)):
        for source in sources:  # the program ends here: whole, so that all findings stand together
            with findings:
                reading.read(source.path, flag=source.flag, bad_samples=bad)
    findings.raise_if_any()
