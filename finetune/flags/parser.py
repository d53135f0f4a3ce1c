"""Dataclasses as flags: what transformers' HfArgumentParser makes of them, without the seconds that its import takes.

Errors are one line, and the help can be read. tests/flags/test_parser.py compares it with transformers' own, flag by flag.
"""

import argparse
import dataclasses
import inspect
import re
import types
from enum import Enum
from typing import Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError, shortened

USAGE = "python finetune.py -m MODEL -d DATA.json -o FOLDER [--use_lora] [--bf16] [other flags]"
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class Parser(argparse.ArgumentParser):
    """A flag for each field of the dataclasses, and a group for each of these."""

    def __init__(self, kinds):
        super().__init__(usage=USAGE, formatter_class=HelpFormatter, add_help=False, allow_abbrev=False)
        for kind in kinds:
            title = getattr(kind, "_argument_group_name", None)
            place, hints = self.add_argument_group(title) if title else self, get_type_hints(kind)
            for field in dataclasses.fields(kind):
                if field.init:
                    add_flag(place, field, hints[field.name])

    def error(self, message):
        what = re.sub(r"^argument .*?(--\w+)\S*:", r"\1:", message)
        raise UserError(f"{shortened(what, 400)} - python finetune.py --help explains the flag")

    def spellings(self) -> set[str]:
        """All flags, with underscores."""
        return {name for action in self._actions for name in action.option_strings if "-" not in name[2:]}


def add_flag(place, field, hint) -> None:
    """One field. The metadata are settings of add_argument(); `aliases` among them are more names."""
    settings, kind = dict(field.metadata), one_type(hint)
    names = [*spelt(f"--{field.name}"), *settings.pop("aliases", [])]
    may_be_off = kind is bool or kind == bool | None
    more = {"default": field.default}
    if field.default is dataclasses.MISSING:
        given = field.default_factory is not dataclasses.MISSING
        more = {"default": field.default_factory()} if given else {"required": True}
    if get_origin(kind) is Literal or inspect.isclass(kind) and issubclass(kind, Enum):
        choices = get_args(kind) or [choice.value for choice in kind]
        by_text = {str(choice): choice for choice in choices}
        more |= {"choices": choices, "type": lambda text: by_text.get(text, text)}
    elif may_be_off:
        more["type"] = truth
        if kind is bool or field.default is not None:
            more |= {"nargs": "?", "const": True}
    elif get_origin(kind) is list:
        more |= {"type": get_args(kind)[0], "nargs": "+"}
        if field.default is not dataclasses.MISSING:
            del more["default"]  # as transformers does; it has one such flag, --debug
    else:
        more["type"] = kind
    place.add_argument(*names, **(settings | more))
    if may_be_off and field.default is True:
        off = spelt(f"--no_{field.name}")
        place.add_argument(*off, action="store_false", dest=field.name, **(settings | {"default": False}))


def spelt(name: str) -> list[str]:
    """The flag's spellings, with underscores and with dashes."""
    return list(dict.fromkeys((name, "--" + name[2:].replace("_", "-"))))


def one_type(hint):
    """What a text is made into: of str | None and dict | str | None, str; of SchedulerType | str, SchedulerType."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    parts = get_args(hint)
    if type(None) not in parts:
        return parts[0] if parts[1] is str else parts[1]
    if bool in parts:
        return hint
    return parts[0] if parts[1] is type(None) else parts[1]


def truth(text) -> bool:
    """True or False for the words that transformers accepts."""
    if isinstance(text, bool):
        return text
    if text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    raise argparse.ArgumentTypeError(
        f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, and only defaults that say something."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action):
        short = [name for name in action.option_strings if not name.startswith("--")]
        long = next(name for name in action.option_strings if name.startswith("--"))
        names = ", ".join([*short, long])
        if action.nargs == "?" and action.const is True:  # a switch: --bf16 and --bf16 True are the same
            return names
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}".rstrip()

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        value = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help or ''} (default: {str(value).replace('%', '%%')})"
