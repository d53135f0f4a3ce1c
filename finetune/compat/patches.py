"""Asks for, or replaces, something of another package, and fails loudly where it is gone."""

import contextlib


def require(owner, name: str) -> None:
    """RuntimeError unless a module or a class of another package has this name."""
    if not hasattr(owner, name):
        where = getattr(owner, "__qualname__", getattr(owner, "__name__", type(owner).__name__))
        raise RuntimeError(f"{where}.{name} is gone: another version of its package than requirements.txt has?")


def replace(owner, name: str, value):
    """owner.name = value; returns what was there. RuntimeError where there is nothing to replace."""
    require(owner, name)
    before = getattr(owner, name)
    setattr(owner, name, value)
    return before


def put(entries: dict, key: str, value) -> None:
    """entries[key] = value. RuntimeError where there is no such entry."""
    if key not in entries:
        raise RuntimeError(f"there is no entry {key} any more: another version of its package than requirements.txt has?")
    entries[key] = value


@contextlib.contextmanager
def replaced(owner, name: str, value):
    """replace(), undone at the end of the context."""
    before = replace(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
