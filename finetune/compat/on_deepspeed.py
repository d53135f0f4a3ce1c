"""DeepSpeed, beyond its public API."""

from . import patches


def leave_out_shm_operator() -> None:
    """Keeps DeepSpeed on CPUs from compiling an operator for inference, which takes a minute."""
    import deepspeed

    patches.put(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
