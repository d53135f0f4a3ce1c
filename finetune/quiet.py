"""Keeps other packages' noise and side effects out of a run that does not use them."""

import contextlib
import logging
import os
import warnings
from pathlib import Path

from .errors import on_first_rank

ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # read by torch as it is loaded; the second: before 2.9


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
    nvidia = any(Path("/dev").glob("nvidia[0-9]*"))
    if not nvidia and not Path("/dev/kfd").exists():  # no GPU; torch would take seconds to ask
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed guesses, and warns of its guess
    if nvidia:
        os.environ.update(for_allocator(os.environ))


def for_allocator(environment) -> dict[str, str]:
    """What torch's allocator of GPU memory is told, where the user says nothing: passes differ in length, and what one leaves free is to
    serve the next, whatever its size."""
    return {} if any(name in environment for name in ALLOCATOR) else {ALLOCATOR[0]: "expandable_segments:True"}


def first_rank_only() -> None:
    """Shows transformers' progress bars (loading weights, writing shards) on the first process only."""
    if not on_first_rank():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def errors_only():
    """A context in which transformers logs errors only, not warnings such as its table of unexpected tensors."""
    from transformers.utils import logging as log

    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)
