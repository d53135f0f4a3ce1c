"""LoRA on a loaded model: new adapters, or those of an earlier run."""

from . import model_folder
from .quiet import unquantized


def add(model, lora):
    """Adapters on the target modules; or those of --lora_weight_path, trained on."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if lora.lora_weight_path:
        with unquantized():
            return PeftModel.from_pretrained(model, lora.lora_weight_path, is_trainable=True)
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=target_modules(model, lora),
        bias=lora.lora_bias,
        task_type="CAUSAL_LM",
    )
    with unquantized():
        return get_peft_model(model, config)


def target_modules(model, lora) -> list[str]:
    """The layers of --lora_target_modules; auto: every linear layer of the model's blocks."""
    if list(lora.lora_target_modules) != ["auto"]:
        return list(lora.lora_target_modules)
    return model_folder.block_layers(model.config.model_type)
