"""transformers, beyond its public API: where its Trainer writes, and what can be read in its sources without importing it."""

import ast
import builtins
import contextlib
import importlib.util
import typing
from dataclasses import field, make_dataclass
from pathlib import Path

from . import patches


@contextlib.contextmanager
def checkpoints_into(trainer, folder: Path):
    """A context in which transformers writes checkpoints into `folder`."""
    patches.replace(trainer, "_get_output_dir", lambda trial: str(folder))
    try:
        yield
    finally:
        del trainer._get_output_dir  # the method of the class is there again


def word(choice) -> str:
    """The text of a flag's value that transformers keeps as an enum; of a plain text, itself."""
    return str(getattr(choice, "value", choice))


def training_flags(base: type) -> type | None:
    """A dataclass with the fields of TrainingArguments over those of `base`, read from the source, since its import takes seconds.

    A type that needs an import becomes str, and such a default None. Returns None where the class is not found.
    """
    fields = {}
    for node in class_body("training_args.py", "TrainingArguments"):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            fields[node.target.id] = (node.target.id, kind_of(node.annotation), field_of(node.value))
    found = make_dataclass("TransformersFlags", fields.values()) if fields else None
    return found and make_dataclass("TrainingFlags", [], bases=(base, found))


def knows_model_type(kind: str) -> bool:
    """Whether transformers knows this model_type, judged by the names in its two auto-mapping files."""
    trees = [source(f"models/auto/{name}.py") for name in ("auto_mappings", "configuration_auto")]
    if all(trees):
        return any(isinstance(node, ast.Constant) and node.value == kind for tree in trees for node in ast.walk(tree))
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return kind in CONFIG_MAPPING_NAMES


def class_body(file: str, name: str) -> list:
    """The statements of a class. [] where it is not in the file, has a base class, or defines fields under a condition."""
    tree = source(file)
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None) if tree else None
    if found is None or found.bases:
        return []
    inner = [node for part in found.body if isinstance(part, ast.If) for node in ast.walk(part)]
    return [] if any(isinstance(node, ast.AnnAssign) for node in inner) else found.body


def source(file: str) -> ast.Module | None:
    """A file of the package, parsed."""
    spec = importlib.util.find_spec("transformers")  # finds it, and imports nothing
    with contextlib.suppress(OSError, SyntaxError, AttributeError, TypeError):
        return ast.parse(Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8"))
    return None


class Known(dict):
    """Names of an annotation: Python's own and typing's as they are; a class of transformers is given as text."""

    def __missing__(self, name: str):
        return getattr(typing, name, str)


def kind_of(annotation: ast.expr):
    """The type that an annotation means."""
    try:
        return eval(ast.unparse(annotation), {"__builtins__": {}}, Known(vars(builtins)))
    except (TypeError, AttributeError, SyntaxError):
        return str


def field_of(value: ast.expr | None):
    """A field with its literal default, and its metadata `nargs` and `const`."""
    given = {word.arg: word.value for word in getattr(value, "keywords", ())}
    metadata, written = {}, given.get("metadata")
    for key, setting in zip(getattr(written, "keys", ()), getattr(written, "values", ())):
        if literal(key) in ("nargs", "const"):
            metadata[literal(key)] = literal(setting)
    factory = {"list": list, "dict": dict}.get(getattr(given.get("default_factory"), "id", ""))
    if factory:
        return field(default_factory=factory, metadata=metadata)
    return field(default=literal(given.get("default", value)), metadata=metadata)


def literal(node: ast.expr | None):
    """The value of an expression, or None where it has to be computed."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None
