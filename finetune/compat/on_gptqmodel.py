"""gptqmodel, beyond its public API. It is imported with care: it prints, and changes the environment and the log."""

import contextlib
import io
import logging
import os
from pathlib import Path

from . import patches


@contextlib.contextmanager
def contained():
    """A context for importing and using gptqmodel: prints nothing, and restores the log and the environment afterwards.

    Only GPTQMODEL_CPU_WORKERS stays set, since gptqmodel reads it later, too. Without this it prints a banner and its steps, moves
    Hugging Face's folders under /tmp for child processes, and renumbers GPUs.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its thread pool refuses to start with fewer, as on two cores
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    os.environ.setdefault("CUDA_DEVICE_ORDER", "FASTEST_FIRST")  # CUDA's own default; set, it is left alone
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)


def keep_to(folder: Path) -> None:
    """Its logs go into `folder` instead of the working directory, and its progress bars are off."""
    from gptqmodel.looper import loop_processor
    from gptqmodel.utils import logger

    patches.replace(loop_processor, "_PROJECT_LOG_DIR", folder)
    patches.replace(logger, "_suppress_live_renderables", lambda: True)


def failures_of_threads() -> list[BaseException]:
    """What its threads fail of from here on, in a list that grows: by itself it prints a traceback and ends the process without cleaning up."""
    from gptqmodel.utils import threadx

    failures: list[BaseException] = []
    patches.replace(threadx._DeviceWorker, "_abort_process", lambda self, error: failures.append(error))
    return failures
