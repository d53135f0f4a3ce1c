"""First-generation Qwen for today's transformers. `register()` makes the Auto classes know model_type "qwen"."""

from .configuration_qwen import QWenConfig
from .modeling_qwen import QWenLMHeadModel, QWenModel
from .tokenization_qwen import QWenTokenizer

__all__ = ["QWenConfig", "QWenLMHeadModel", "QWenModel", "QWenTokenizer", "register"]


def register() -> None:
    """Lets AutoConfig, AutoTokenizer, AutoModel and AutoModelForCausalLM open first-generation Qwen folders with this code.

    No remote code runs then, also where a folder's auto_map names some, and trust_remote_code is not needed. What the classes
    save carries its own code, for a Python without this toolkit. Calling it again does nothing.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    AutoConfig.register("qwen", QWenConfig, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
    AutoTokenizer.register(QWenConfig, QWenTokenizer, exist_ok=True)
    QWenConfig.register_for_auto_class()
    QWenLMHeadModel.register_for_auto_class("AutoModelForCausalLM")
    QWenTokenizer.register_for_auto_class("AutoTokenizer")
