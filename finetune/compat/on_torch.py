"""torch, beyond its public API. (Its elastic agent, all of it unstable, is used in distributed/agent.py alone.)"""


def ignore_in_ddp(model, names: list[str]) -> None:
    """DistributedDataParallel neither broadcasts nor reduces these parameters and buffers. model: as it will be wrapped."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def has_forward_hooks(module) -> bool:
    """Whether calling the module runs more than its forward: hooks of ZeRO-3 or of a user, a forward that accelerate has put there."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def leave_inputs(model) -> None:
    """FSDP2's outermost module takes what it is given as it is, in place of rounding it to the precision of the passes. Those within still round."""
    import dataclasses

    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._mp_policy = dataclasses.replace(state._mp_policy, cast_forward_inputs=False)
            return


def is_view(tensor) -> bool:
    return tensor._is_view()
