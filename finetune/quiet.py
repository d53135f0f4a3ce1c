"""Keeps other packages' noise and side effects out of a run that does not use them."""

import contextlib
import io
import logging
import os
import sys
import warnings
from pathlib import Path

from .errors import on_first_rank


def quiet() -> None:
    """To be called before transformers is imported: it looks at every package that is installed, and they speak up."""
    import qwen_model  # noqa: F401 (silences what other packages say of kernels for other machines)

    # that FSDP has a checkpointing of its own, which costs more memory
    logging.getLogger("transformers.training_args").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DELAY", "2")  # transformers' bars over what is done in a moment; seconds
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # connections that end with the process at their other end
    # deprecations between transformers and peft, which a user of this toolkit cannot mend
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch|deepspeed)\."
    )
    if (
        not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists()
    ):  # no GPU; torch would take seconds to ask
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed guesses, and warns of its guess


def first_rank_only() -> None:
    """transformers' bars (loading weights, writing shards) on one of several processes."""
    if not on_first_rank():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def unquantized():
    """While peft puts adapters on a model none of whose layers is quantized.

    peft asks of every layer whether it is one of gptqmodel's, and imports that package to know: eight seconds of CPU, a banner, and
    environment variables that change how CUDA numbers its devices. Here the answer is no, without asking. Where the package
    is loaded already (a model with its layers was), peft may ask.
    """
    if "gptqmodel" in sys.modules:
        yield
        return
    from peft.tuners.lora import awq, gptq

    before = {module: module.is_gptqmodel_available for module in (awq, gptq)}
    for module in before:
        module.is_gptqmodel_available = lambda: False
    try:
        yield
    finally:
        for module, function in before.items():
            module.is_gptqmodel_available = function


@contextlib.contextmanager
def contained():
    """While gptqmodel is imported or at work: it prints nothing, and leaves the environment and the log as they were.

    It would print a banner and its steps, move Hugging Face's folders under /tmp for child processes, and renumber GPUs.
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


@contextlib.contextmanager
def errors_only():
    """transformers' log without its warnings, such as its table of tensors that a model did not expect."""
    from transformers.utils import logging as log

    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)
