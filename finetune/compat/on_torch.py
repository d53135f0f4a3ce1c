"""torch, beyond its public API. (Its elastic agent, all of it unstable, is used in distributed/agent.py alone.)"""


def ignore_in_ddp(model, names: list[str]) -> None:
    """DistributedDataParallel neither broadcasts nor reduces these parameters and buffers. model: as it will be wrapped."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def has_forward_hooks(module) -> bool:
    """Whether somebody listens to a module's forward, or gathers its weights for it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_view(tensor) -> bool:
    return tensor._is_view()
