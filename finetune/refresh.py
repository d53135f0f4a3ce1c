"""Replaces the code in a model's folder by this toolkit's: python -m finetune.refresh FOLDER

A folder of first-generation Qwen carries the code that loads it without this toolkit (trust_remote_code). Code that was saved long
ago, or published with the checkpoint, does not work on newer versions of transformers. Weights and settings are not touched.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import json_text
from .errors import Findings, Options, UserError, note, run
from .folders import meant
from .folders.config_files import read_json
from .folders.model_folder import LATER_TYPES
from .quiet import quiet

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
HIDDEN = ".refreshing"  # behind the name of the settings, while the code changes
# opens the folder as somebody without this toolkit would, but for the weights
PROOF = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
if (Path(folder) / "tokenizer_config.json").is_file():
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("hello")
if (Path(folder) / "config.json").is_file():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)
"""


def main(argv: list[str] | None = None) -> None:
    parser = Options(
        prog="python -m finetune.refresh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path, help="a model, or the output of a LoRA run")
    parser.add_argument("--dry_run", action="store_true", help="say what would change, and change nothing")
    options = parser.parse_args(argv)
    quiet()
    run(lambda: refresh_all(options.folders, options.dry_run))


def refresh_all(folders: list[Path], dry_run: bool = False) -> None:
    """Looks at all of them before the first is changed."""
    findings = Findings()
    for folder in folders:
        with findings:
            check(folder)
    findings.raise_if_any()
    for folder in folders:
        refresh(folder, dry_run)


def refresh(folder: Path, dry_run: bool = False) -> list[str]:
    """Brings the folder's code up to date, and returns the names of the files that changed."""
    check(folder)
    files = wanted(folder)
    interrupted = settings_file(folder).name.endswith(HIDDEN)
    changed = sorted(name for name, content in files.items() if content_of(there(folder, name)) != content)
    if dry_run and (changed or interrupted):
        note(f"{folder}: would be replaced or added: {', '.join(changed) or 'what an interrupted refresh has left'}")
    elif changed or interrupted:
        with only_one(folder), tempfile.TemporaryDirectory() as place:
            prove(folder, files, Path(place))
            replace(folder, {name: files[name] for name in changed})
        note(f"{folder}: replaced or added {', '.join(changed) or 'nothing'}; the weights are as they were")
        for line in left_over(folder, files):
            note(line)
    else:
        note(f"{folder}: its code is this toolkit's already")
    return changed


def there(folder: Path, name: str) -> Path:
    """A file of the folder, under the name that it has while a refresh is at work or was interrupted."""
    hidden = folder / f"{name}{HIDDEN}"
    return hidden if hidden.is_file() else folder / name


def settings_file(folder: Path) -> Path:
    """What opens the folder: a model's config.json, an adapter's tokenizer_config.json, under the name that it has."""
    model = there(folder, CONFIG)
    return model if model.is_file() else there(folder, TOKENIZER_CONFIG)


def check(folder: Path) -> None:
    """Raises UserError for what has no code of first-generation Qwen in it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder - give the folder of a model, or of an adapter{meant.folder(folder, meant.EITHER)}")
    for name in (CONFIG, TOKENIZER_CONFIG):
        if there(folder, CONFIG).is_file() and (folder / name).is_file() and (folder / f"{name}{HIDDEN}").is_file():
            raise UserError(f"{folder}: has both {name} and {name}{HIDDEN}, of an interrupted refresh - delete the one that is wrong")
    if there(folder, CONFIG).is_file():
        kind = read_json(there(folder, CONFIG)).get("model_type")
        if kind in LATER_TYPES:
            raise UserError(f"{folder}: a {kind} model, whose code is part of transformers - there is nothing to refresh")
        if kind != "qwen":
            raise UserError(f"{folder}: not a first-generation Qwen (model_type {kind!r}) - only those carry this toolkit's code")
    elif not (folder / "adapter_config.json").is_file():
        what = f"{folder}: neither config.json nor adapter_config.json there - give the folder of a model"
        raise UserError(what + meant.folder(folder, meant.EITHER))
    elif not ((folder / "qwen.tiktoken").is_file() and there(folder, TOKENIZER_CONFIG).is_file()):
        raise UserError(f"{folder}: an adapter without first-generation Qwen's tokenizer carries no code - there is nothing to refresh")


@contextlib.contextmanager
def only_one(folder: Path):
    """While this process changes the folder no other may; UserError if one does now."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another refresh is changing it now - wait for it") from None
        yield
    finally:
        os.close(descriptor)


def wanted(folder: Path) -> dict[str, bytes]:
    """{name: content} of the code as it would be saved today, and of the settings that name it."""
    from transformers.dynamic_module_utils import get_relative_import_files

    from qwen_model import modeling_qwen, new_checkpoint, tokenization_qwen

    modules, files = [], {}
    if there(folder, CONFIG).is_file():
        modules.append(modeling_qwen)
        files[CONFIG] = with_auto_map(there(folder, CONFIG), new_checkpoint.AUTO_MAP)
    if there(folder, TOKENIZER_CONFIG).is_file():
        modules.append(tokenization_qwen)
        files[TOKENIZER_CONFIG] = with_auto_map(there(folder, TOKENIZER_CONFIG), new_checkpoint.TOKENIZER["auto_map"])
    for module in modules:
        for path in map(Path, (module.__file__, *get_relative_import_files(module.__file__))):
            files[path.name] = path.read_bytes()
    return files


def with_auto_map(path: Path, auto_map: dict) -> bytes:
    """The settings with this auto_map; byte for byte as they are where they have it."""
    settings = read_json(path)
    stored = settings.get("auto_map") or {}
    if {name: stored.get(name) for name in auto_map} == auto_map:
        return path.read_bytes()
    settings["auto_map"] = stored | auto_map
    return (json_text.dumps(settings, indent=2) + "\n").encode()


def content_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def prove(folder: Path, files: dict[str, bytes], place: Path) -> None:
    """The new code opens the folder's settings and tokenizer in a Python of its own; UserError if it does not."""
    copy = place / "model"
    shutil.copytree(folder, copy, ignore=lambda _, names: [name for name in names if not is_small(folder / name)])
    for hidden in copy.glob(f"*{HIDDEN}"):
        hidden.rename(copy / hidden.name.removesuffix(HIDDEN))
    for name, content in files.items():
        (copy / name).write_bytes(content)
    environment = os.environ | {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", PROOF, str(copy)]
    done = subprocess.run(command, check=False, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{folder}: this toolkit's code does not open it ({last}) - nothing was changed")


def is_small(path: Path) -> bool:
    """Settings and vocabularies, not weights, and no folders."""
    return path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth") and path.stat().st_size < 50e6


def replace(folder: Path, files: dict[str, bytes]) -> None:
    """Writes the files beside their places, then renames them. The settings are hidden until the last one is there.

    Killed in between, it leaves a folder whose model (or, of an adapter, tokenizer) nobody opens; the same command goes on.
    """
    config = folder / settings_file(folder).name.removesuffix(HIDDEN)
    hidden = folder / f"{config.name}{HIDDEN}"
    try:
        for name, content in files.items():
            (folder / f".{name}.new").write_bytes(content)
        if not hidden.is_file():
            os.replace(config, hidden)
        for name in files:
            os.replace(folder / f".{name}.new", hidden if name == config.name else folder / name)
        os.replace(hidden, config)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}) - make it writable, then the same command again") from error


def left_over(folder: Path, files: dict[str, bytes]) -> list[str]:
    """A line for code that nobody imports any more."""
    others = sorted(path.name for path in folder.glob("*.py") if path.name not in files)
    return [f"{folder}: not used by the new code, and left: {', '.join(others)}"] if others else []


if __name__ == "__main__":
    main()
