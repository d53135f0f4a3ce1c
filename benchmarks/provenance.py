"""Where a figure comes from: machine, versions, commit. Without them it is worth nothing."""

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.quiet import quiet  # noqa: E402

quiet()  # before anything imports transformers: every benchmark comes here first


def about(packages: tuple[str, ...] = ("torch", "transformers", "triton")) -> dict:
    """{date, machine, dtype, versions, commit}"""
    import torch

    on_gpu = torch.cuda.is_available()
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if on_gpu else cpu,
        "dtype": "bfloat16" if on_gpu else "float32",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version(name) for name in packages},
        "commit": commit(),
    }


def file_name(machine: str) -> str:
    """Of a machine: "NVIDIA_H200", "CPU"."""
    return "".join(c if c.isalnum() else "_" for c in machine.split(" (")[0])


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The code's commit, with "+" if files differ from it. Of a copy outside git what the variable COMMIT says, else None."""

    def git(*words):
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:
            return os.environ.get("COMMIT")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")
