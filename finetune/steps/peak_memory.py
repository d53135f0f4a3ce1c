"""The most memory that this process has used so far."""

import resource

import torch


def memory_gb() -> float:
    """In GB (10^9 bytes): what torch has allocated on the GPU if there is one, else what was resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
