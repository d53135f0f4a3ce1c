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
        found = [path for path in beside if path.name in near] or [
            path / named.name for path in inside(parent) if is_wanted(path / named.name, wanted)
        ]
    return f"; did you mean {' or '.join(map(shown, found[:2]))}?" if found else ""


def shown(path: Path) -> str:
    """A path as short as it can be written here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and here.name else str(path)


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
