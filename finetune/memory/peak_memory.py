"""The most memory that this process has used so far, in GB (10^9 bytes)."""

import resource
import sys


def memory_gb() -> float:
    """What torch has allocated on the GPU if there is one, else what was resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resident_gb()


def resident_gb() -> float:
    """What was resident in main memory.

    Linux says it in VmHWM (proc_pid_status(5)). getrusage's figure is the fallback: on Linux a process inherits it from the one that started it.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024 / 1e9
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
