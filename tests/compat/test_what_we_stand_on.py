"""CONTRIBUTING.md's table names all that we use of other packages beyond what they promise, with the file that does."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"transformers", "peft", "accelerate", "torch", "deepspeed", "gptqmodel", "optimum", "bitsandbytes"}
# documented modules
PUBLIC = {
    "torch.nn.functional", "torch.nn.parallel", "torch.utils.data", "torch.utils.checkpoint", "torch.autograd.function",
    "torch.distributed", "torch.distributed.fsdp", "torch.optim.lr_scheduler", "transformers.utils.logging",
}  # fmt: skip
OURS = {"_replace", "_asdict", "_exit"}  # of a namedtuple, of os
FILES = sorted([*(ROOT / "finetune").rglob("*.py"), *(ROOT / "qwen_model").glob("*.py"), ROOT / "run_gptq.py", ROOT / "finetune.py"])


def table() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [line for line in text.split("## What we stand on")[1].splitlines() if line.startswith("| ")][1:]


def private_uses(path: Path) -> set[str]:
    """Names from modules below a package's top, and attributes of others that begin with an underscore."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in PACKAGES:
            for name in [alias.name for alias in node.names]:
                if "." in node.module and not {node.module, f"{node.module}.{name}"} & PUBLIC:
                    found.add("distributed.elastic" if "elastic" in node.module else name)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of = node.value
            own = isinstance(of, ast.Name) and of.id in ("self", "cls") or isinstance(of, ast.Call) and ast.unparse(of) == "super()"
            if not own and node.attr not in OURS:
                found.add(node.attr)
    return found


def test_the_table_has_every_use():
    rows, missing = table(), []
    for path in FILES:
        name = str(path.relative_to(ROOT)).removeprefix("finetune/")
        for use in private_uses(path):
            if not any(use in row.split("|")[2] and (name in row or f"`{path.name}`" in row) for row in rows):
                if use.endswith("Output") or "OutputWithPast" in use:
                    use = "modeling_outputs"  # by their module
                    if any(use in row and name in row for row in rows):
                        continue
                missing.append(f"{name}: {use}")
    assert not missing, "not in CONTRIBUTING.md's table: " + ", ".join(sorted(missing))


def test_the_table_names_files_that_are_there():
    names = {word for row in table() for word in row.split("|")[3].split("`") if word.endswith(".py")}
    there = {str(path.relative_to(ROOT)).removeprefix("finetune/") for path in FILES}
    assert names <= there | {path.name for path in FILES}, names - there


def test_private_uses_are_seen(tmp_path):
    file = tmp_path / "new.py"
    file.write_text("from transformers.trainer_pt_utils import X\nmodel._hooks\nself._own\nimport torch.nn.functional as F\n")
    assert private_uses(file) == {"X", "_hooks"}
