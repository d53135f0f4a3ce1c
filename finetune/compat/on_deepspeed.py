"""DeepSpeed, beyond its public API."""

from . import patches


def leave_out_shm_operator() -> None:
    """On the CPU DeepSpeed would compile an operator for inference, a minute long."""
    import deepspeed

    patches.put(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
