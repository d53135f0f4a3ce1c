"""Which of the packages that transformers and peft would import a program does not need."""

from pathlib import Path

from ..compat import unused
from ..folders import config_files, output_folder, quant_settings
from . import optimizers


def unused_in_run(args) -> set[str]:
    """The packages that a training run does not need. args: of the command line, its training flags as a plain object."""
    lora, training = args.lora, args.training
    if lora.q_lora and lora.quant == "none":
        return set()  # gptqmodel imports half of them itself
    optim, base = str(training.optim), Path(args.model.model_name_or_path or "")
    elsewhere = set(training.report_to or ()) - {"none"}  # services bring what they like
    needed = {
        "datasets": bool(elsewhere),
        "deepspeed": bool(training.deepspeed),
        "torchao": optim in optimizers.ROUNDING or "torchao" in optim,
        "bitsandbytes": lora.quant == "nf4" or optimizers.is_of_bitsandbytes(optim),
        "peft": lora.use_lora or (base / "adapter_config.json").is_file(),
        "gptqmodel": False,
    }
    return {name for name, is_needed in needed.items() if not is_needed}


def leave_out_with(folders, base: str | None = None) -> None:
    """For a program that loads these folders, models or adapters, and nothing else: before it imports transformers."""
    unused.leave_out(unused_with([Path(folder) for folder in folders], Path(base) if base else None))


def unused_with(folders: list[Path], base: Path | None = None) -> set[str]:
    """The packages that a program does not need for these folders. base: of the adapters among them, where it has moved."""
    adapters = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
    bases = [base or base_of(folder) for folder in adapters]
    if None in bases or any(map(may_be_quantized, [*folders, *bases])):
        return set()
    return {"datasets", "deepspeed", "torchao", "gptqmodel", "bitsandbytes"} | ({"peft"} if not adapters else set())


def base_of(adapter: Path) -> Path | None:
    """The base that an adapter names, if it does."""
    name = config_files.read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    return Path(name) if name and isinstance(name, str) else None


def may_be_quantized(folder: Path) -> bool:
    """Whether a model, or an adapter's base, may be quantized. True for a model on a hub, of which nothing is known yet."""
    if not folder.is_dir():
        return True
    over = (output_folder.read_record(folder).get("method") or {}).get("quantization")
    return bool(over or quant_settings.of_folder(folder))
