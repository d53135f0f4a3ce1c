"""accelerate, beyond its public API: its states, which all of a process share."""

from . import patches


def forget_state() -> None:
    """Resets accelerate's state, so that the next use chooses device and process group anew."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def pretend_multi_gpu() -> None:
    """For FSDP on CPUs, which accelerate does not know and torch can do."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    patches.put(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)


def set_last_pass(accelerator, last: bool) -> None:
    """Whether the pass that begins is the last of its step: DeepSpeed's engine asks for it."""
    accelerator.gradient_state._set_sync_gradients(last)
