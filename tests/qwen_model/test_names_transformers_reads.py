"""transformers still reads each name that a class of ours only sets: one that it renamed would be without effect, in silence."""

import ast
from functools import cache
from pathlib import Path

import pytest
import transformers

import qwen_model

OURS = {"attention_reason"}  # read by our own code
# Modules that read nothing for a model of ours: other models, and documentation of them.
ELSEWHERE = ("models/", "utils/auto_docstring.py", "cli/", "testing_utils.py")


def names_set() -> dict[str, str]:
    """{name: class} of what the bodies of our classes assign, and of the switch that transformers looks for in a module."""
    found = {"gradient_checkpointing": "QWenModel"}
    for path in Path(qwen_model.__file__).parent.glob("*_qwen.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for statement in node.body if isinstance(node, ast.ClassDef) else ():
                targets = statement.targets if isinstance(statement, ast.Assign) else ()
                found |= {target.id: node.name for target in targets if isinstance(target, ast.Name)}
    return {name: kind for name, kind in found.items() if name not in OURS and not name.startswith("__")}


@cache
def sources() -> dict[str, str]:
    root = Path(transformers.__file__).parent
    paths = {str(path.relative_to(root)): path for path in root.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if not name.startswith(ELSEWHERE)}


def reads(text: str, name: str) -> bool:
    """Whether an attribute of this name is read, be it by getattr or hasattr; to set it is not to read it."""
    if name not in text:
        return False
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            if any(isinstance(word, ast.Constant) and word.value == name for word in node.args):
                return True
    return False


@pytest.mark.parametrize("name", sorted(names_set()))
def test_it_is_read(name):
    assert any(reads(text, name) for text in sources().values()), f"transformers {transformers.__version__} never reads {name}"


def test_a_name_that_is_only_set_or_mentioned_is_not_read():
    assert not reads("class A:\n    '''_supports_x'''\n    _supports_x = False\nA._supports_x = True\n", "_supports_x")
    assert reads("a._supports_x", "_supports_x") and reads("getattr(a, '_supports_x', None)", "_supports_x")
    assert {"_no_split_modules", "_supports_sdpa", "accepts_loss_kwargs", "model_input_names"} <= names_set().keys()
