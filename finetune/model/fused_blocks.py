"""The norms and the gate of transformers' Qwen2 and Qwen3 blocks, computed as the bundled model's are (qwen_model/fused.py).

Each keeps for the backward pass only what it cannot do without, and is one kernel of ours on a GPU. Names, weights and roundings
stay transformers' own: only the modules' classes change, under their own names.
"""

import functools

from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from qwen_model.fused import gated, rms_norm

NORMS = (modeling_qwen2.Qwen2RMSNorm, modeling_qwen3.Qwen3RMSNorm)
MLPS = (modeling_qwen2.Qwen2MLP, modeling_qwen3.Qwen3MLP)


class FusedNorm:
    """Mixin that overrides a norm's forward."""

    def forward(self, hidden_states):
        if hidden_states.dtype != self.weight.dtype:  # transformers returns the wider of the two
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedGate:
    """Mixin that overrides an MLP's forward: down(silu(gate(x)) * up(x))."""

    def forward(self, x):
        return self.down_proj(gated(self.up_proj(x), self.gate_proj(x)))


def install(model) -> None:
    """Changes the classes of the model's norms and MLPs, in place; of those alone that are transformers' own as they come."""
    for module in model.modules():
        if type(module) in NORMS:
            module.__class__ = fused(FusedNorm, type(module))
        elif type(module) in MLPS and module.config.hidden_act == "silu":
            module.__class__ = fused(FusedGate, type(module))


@functools.cache
def fused(mixin, cls):
    """The class under its own name, with the mixin in front."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
