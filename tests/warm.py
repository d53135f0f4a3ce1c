"""A Python that starts at once: warm.python() is a program like sys.executable, for tests that launch many.

Most of what a launch takes is the import of torch, transformers and peft. One process (warm_server.py) has done that and
nothing else, and forks for each launch; the program in front (warm_client.py) hands its words, environment, folder and
standard streams to the fork, passes signals on, and ends as the fork ends. What the fork starts with its own
sys.executable is warm as well, so a script that is given this Python as FINETUNE_PYTHON has warm workers, too.

What warm launches cannot show is whether a program imports what it uses: of each there is a cold one
(test_cold_launches.py). Sets of strings have the same order in all forks of one process.

A launch is cold by itself where a fork would not be the same: other values of the variables that packages read when they
are imported (READ_AT_IMPORT), flags of Python other than -u, open files beyond the standard ones. Where there
is a GPU all are, because CUDA does not live through a fork.
"""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = dict(os.environ)  # before a test changes it
# so that no library starts a thread; and what quiet() sets before these imports
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DELAY": "2",
    "DS_ACCELERATOR": "cpu",
}
# The imports read these: a launch with other values is cold.
READ_AT_IMPORT = (
    "HOME", "XDG_CACHE_HOME", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TRITON_", "MPL", "TIKTOKEN_", "BNB_",
    "LANG", "LC_", "PYTHON", "LD_", "MKL_", "KMP_", "GOMP_",
)  # fmt: skip
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


@functools.cache
def python() -> str:
    """The path of the warm Python. The first call starts it, which takes as long as a cold launch."""
    if HAS_GPU:
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, HERE / "warm_server.py", folder], env=ENVIRONMENT | SETTINGS,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    atexit.register(stop, server, folder)
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the warm process did not start:\n{(folder / 'log').read_text()}")
    return str(folder / "python")


def restore_settings() -> None:
    """Takes back what a test or an import has made of the variables above."""
    for name in [name for name in {*ENVIRONMENT, *os.environ} if name.startswith(READ_AT_IMPORT)]:
        if name in ENVIRONMENT:
            os.environ[name] = ENVIRONMENT[name]
        else:
            del os.environ[name]


def stop(server: subprocess.Popen, folder: Path) -> None:
    """The server ends when its standard input does, also where this process was killed."""
    try:
        server.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
    shutil.rmtree(folder, ignore_errors=True)
