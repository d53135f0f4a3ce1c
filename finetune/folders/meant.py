"""Which folder was meant, where the one that was named is not there or holds nothing: by names nearby and by what lies one level below."""

import difflib
import os
from pathlib import Path

MODEL, ADAPTER = ("config.json",), ("adapter_config.json",)
EITHER = (*MODEL, *ADAPTER)
MANY = 1000  # entries of a folder that are looked at


def folder(named: str | Path, wanted: tuple[str, ...] = MODEL) -> str:
    """"; did you mean FOLDER?", to put behind an error; "" where nothing nearby would do. wanted: one of its files.

    Below a folder that is there; else beside it, by close names, and one level below these, as adapter for quickstart/adapter.
    """
    named = Path(named)
    parent = named.parent
    if os.path.isdir(named):
        found = below(named, wanted)
    else:
        beside = [path for path in inside(parent) if is_wanted(path, wanted)]
        near = set(difflib.get_close_matches(named.name, [path.name for path in beside], 3, 0.6))
        found = [path for path in beside if path.name in near] or [path for path in below(parent, wanted) if path.name == named.name]
    return f"; did you mean {' or '.join(map(str, found[:2]))}?" if found else ""


def file(named: str | Path) -> str:
    """" Did you mean FILE?" for a file that is not there, by close names beside it."""
    named = Path(named)
    near = difflib.get_close_matches(named.name, [path.name for path in entries(named.parent) if os.path.isfile(path)], 1, 0.7)
    return f" Did you mean {named.with_name(near[0])}?" if near else ""


def below(parent: Path, wanted: tuple[str, ...]) -> list[Path]:
    """Folders in `parent` that hold a wanted file, by name; those of the Hub's cache lie one deeper. A checkpoint comes last."""
    inner = [*inside(parent), *inside(parent / "snapshots")]
    return sorted(filter(lambda path: is_wanted(path, wanted), inner), key=lambda path: (path.name.startswith("checkpoint-"), path))


def is_wanted(path: Path, wanted: tuple[str, ...]) -> bool:
    return any(os.path.isfile(path / name) for name in wanted)


def inside(parent: Path) -> list[Path]:
    """The folders in a folder, without hidden ones."""
    return [path for path in entries(parent) if os.path.isdir(path)]


def entries(parent: Path) -> list[Path]:
    """What is in a folder, by name, without what is hidden; [] where it cannot be looked into."""
    try:
        names = sorted(os.listdir(parent))
    except (OSError, ValueError):
        return []
    return [parent / name for name in names[:MANY] if not name.startswith(".")]
