"""First-generation Qwen for today's transformers. `register()` makes the Auto classes know model_type "qwen"."""

import importlib
import logging

_HOME = {
    "QWenConfig": "configuration_qwen",
    "QWenLMHeadModel": "modeling_qwen",
    "QWenModel": "modeling_qwen",
    "QWenTokenizer": "tokenization_qwen",
}
__all__ = [*_HOME, "register"]

# What they say when transformers or peft imports them, whether they are used or not: kernels that are not for this machine.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str):
    """The classes, when they are asked for: they take seconds to import."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Lets AutoConfig, AutoTokenizer, AutoModel and AutoModelForCausalLM open first-generation Qwen folders with this code.

    No remote code runs then, also where a folder's auto_map names some, and trust_remote_code is not needed. What the classes
    save carries its own code, for a Python without this toolkit. Calling it again does nothing.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from .configuration_qwen import QWenConfig
    from .modeling_qwen import QWenLMHeadModel, QWenModel
    from .tokenization_qwen import QWenTokenizer

    AutoConfig.register("qwen", QWenConfig, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
    AutoTokenizer.register(QWenConfig, QWenTokenizer, exist_ok=True)
    QWenConfig.register_for_auto_class()
    QWenLMHeadModel.register_for_auto_class("AutoModelForCausalLM")
    QWenTokenizer.register_for_auto_class("AutoTokenizer")
