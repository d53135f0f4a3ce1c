"""torch, beyond its public API."""

from types import SimpleNamespace

from . import patches


def elastic() -> SimpleNamespace:
    """The classes of torch's elastic agent, all of them unstable, that distributed/agent.py builds on, by their names.

    ImportError where one is gone, RuntimeError where a method is that agent.py overrides: torch would go on without ours.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous.api import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousInfo,
        RendezvousStoreInfo,
        RendezvousTimeoutError,
    )
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    for name in ("_initialize_workers", "_monitor_workers", "_exit_barrier"):
        patches.require(LocalElasticAgent, name)
    for name in ("next_rendezvous", "use_agent_store"):
        patches.require(DynamicRendezvousHandler, name)
    classes = (
        RunResult, WorkerSpec, WorkerState, LocalElasticAgent, DefaultLogsSpecs, SignalException, RendezvousClosedError,
        RendezvousConnectionError, RendezvousInfo, RendezvousStoreInfo, RendezvousTimeoutError, C10dRendezvousBackend,
        DynamicRendezvousHandler, RendezvousTimeout,
    )  # fmt: skip
    return SimpleNamespace(**{kind.__name__: kind for kind in classes})


def ignore_in_ddp(model, names: list[str]) -> None:
    """Makes DistributedDataParallel ignore these parameters and buffers. model: the module that it will wrap."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def has_forward_hooks(module) -> bool:
    """Whether calling the module runs more than its forward: hooks of ZeRO-3 or of a user, or accelerate's wrapped forward."""
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
