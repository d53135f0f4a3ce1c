"""torch, beyond its public API. (Its elastic agent, all of it unstable, is used in distributed/agent.py alone.)"""


def ignore_in_ddp(model, names: list[str]) -> None:
    """DistributedDataParallel neither broadcasts nor reduces these parameters and buffers. model: as it will be wrapped."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def has_forward_hooks(module) -> bool:
    """Whether calling the module runs more than its forward: hooks of ZeRO-3 or of a user, a forward that accelerate has put there."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_view(tensor) -> bool:
    return tensor._is_view()
