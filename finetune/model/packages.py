"""Which of the packages that transformers and peft would import a program does without."""

from pathlib import Path

from ..folders import quant_settings
from ..quantized import quantized_model
from . import optimizers

NEVER = ("datasets", "deepspeed", "torchao")  # of programs that do not train


def unused_in_run(args) -> set[str]:
    """Of a training run. args: of the command line, its training flags as a plain object; quantized weights need what they need."""
    lora, training = args.lora, args.training
    optim, base = str(training.optim), Path(args.model.model_name_or_path or "")
    elsewhere = set(training.report_to or ()) - {"none"}  # services bring what they like
    needed = {
        "datasets": bool(elsewhere),
        "deepspeed": bool(training.deepspeed),
        "torchao": optim in optimizers.ROUNDING or "torchao" in optim,
        "bitsandbytes": lora.q_lora or optimizers.is_of_bitsandbytes(optim),
        "peft": lora.use_lora or (base / "adapter_config.json").is_file(),
        "gptqmodel": lora.q_lora,
    }
    return {name for name, is_needed in needed.items() if not is_needed}


def unused_with(folders) -> set[str]:
    """Of a program that loads these folders, models or adapters, and computes with them."""
    adapters = [folder for folder in map(Path, folders) if (folder / "adapter_config.json").is_file()]
    if any(map(quantized, map(Path, folders))):
        return set(NEVER) - {"datasets"}  # gptqmodel imports it
    return {*NEVER, "gptqmodel", "bitsandbytes"} | ({"peft"} if not adapters else set())


def quantized(folder: Path) -> bool:
    """Are there few bits in it, or under it? An adapter's record names its base's quantization."""
    from ..folders import checkpoint

    record = checkpoint.read_record(folder).get("method", {}).get("quantization")
    return bool(record or quantized_model.of_adapter(folder) or quant_settings.of_folder(folder))
