"""peft, beyond its public API: its layers' classes, and functions that it calls."""

import contextlib
import sys
from types import SimpleNamespace

from . import patches

# Its LoRA layers over 16 bit, NF4 and GPTQ. By name, since to import them takes seconds where they are not used.
LINEARS = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.gptq.GPTQLoraLinear")


def check_names() -> None:
    """RuntimeError where peft has moved a class of LINEARS: without ours, its layers would silently be slow and large."""
    for module, _, name in (path.rpartition(".") for path in LINEARS):
        needed = module == LINEARS[0].rpartition(".")[0]  # where there are adapters it is imported
        if (needed or module in sys.modules) and not hasattr(sys.modules.get(module), name):
            raise RuntimeError(f"{module}.{name} is gone: another version of peft than requirements.txt has?")


def is_lora_linear(layer) -> bool:
    """A LoRA layer of a kind in LINEARS; not of a subclass."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}" in LINEARS


@contextlib.contextmanager
def unquantized():
    """A context in which peft adds adapters to a model without quantized layers.

    peft asks of every layer whether it is one of gptqmodel's, and imports that package to know: eight seconds of CPU, a banner, and
    environment variables that change how CUDA numbers its devices. Here the answer is no, without the import. Where the package
    is loaded already, since a model had its layers, peft's own check runs.
    """
    if "gptqmodel" in sys.modules:
        yield
        return
    from peft.tuners.lora import awq, gptq

    with contextlib.ExitStack() as stack:
        for module in (awq, gptq):
            stack.enter_context(patches.replaced(module, "is_gptqmodel_available", lambda: False))
        yield


def token_classes() -> SimpleNamespace:
    """peft's classes of trained rows, by their names; ImportError where one is gone."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    return SimpleNamespace(TrainableTokensLayer=TrainableTokensLayer, TrainableTokensWrapper=TrainableTokensWrapper)


def lora_layers(model) -> dict:
    """{name: layer} of the model's LoRA layers, of whatever kind."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def gathered(weights, changes: bool = False):
    """A context in which weights (one or a list) that ZeRO-3 holds in shards are whole. changes: they are written there, too."""
    from peft.utils.integrations import gather_params_ctx

    return gather_params_ctx(weights, modifier_rank=0 if changes else None)


@contextlib.contextmanager
def first_values_of_rows():
    """A context in which peft reads the initial rows of a matrix that ZeRO-3 holds in shards. peft's own code needs CUDA."""

    def collect(self, weight, rows, embed_dim):
        with gathered([weight]):
            return weight.detach()[rows].clone()

    with patches.replaced(token_classes().TrainableTokensLayer, "_collect_token_weights", collect):
        yield
