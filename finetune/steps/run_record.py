"""What a run writes about itself into training.json of its output folder and of each checkpoint."""

import importlib.metadata
from pathlib import Path

from ..folders import checkpoint, quant_settings
from ..model import loading, optimizers
from ..quantized import quantized_model


def of_run(name: str, folder: Path, args, samples, samples_per_step: int) -> dict:
    """training.json: base, method, data, versions and more. name: of the base, as the user gave it; folder: the base's."""
    training, quantization = args.training, quantized_model.of_run(folder, args.lora)
    return {
        "base": {"name": name, "folder": str(folder.resolve()), "fingerprint": checkpoint.fingerprint(folder)},
        # without the path of the adapter, which may move
        "method": vars(args.lora)
        | {"lora_weight_path": None, "quantization": quant_settings.as_record(quantization)},
        "data": {
            "paths": list(args.data.data_path),
            "eval_split": args.data.eval_split,
            "bad_samples": args.data.bad_samples,
            "long_samples": args.data.long_samples,
            "system": samples.system,
            "fingerprint": samples.fingerprint,
            "without_thoughts": samples.without_thoughts,
            **args.data.rendering(),
        },
        "samples_per_step": samples_per_step,
        "engine": training.engine,
        "ranks": training.world_size,
        "precision": str(loading.compute_dtype(training)).removeprefix("torch."),
        "bf16_weights": training.bf16_weights,
        "optim": optim_of(training),
        "seed": training.seed,
        "versions": versions(training, quantization),
    }


def optim_of(training) -> str:
    """--optim, as the user writes it."""
    return str(getattr(training.optim, "value", training.optim))


def versions(training, quantization) -> dict[str, str]:
    """{package: version} of the packages that this run computes with."""
    packages = ["torch", "transformers", "peft", "accelerate", "tiktoken"]
    packages += ["deepspeed"] if training.deepspeed else []
    packages += quantized_model.PACKAGES.get(quantization.method, ()) if quantization else ()
    optim = optim_of(training)
    packages += ["torchao"] if optim in optimizers.ROUNDING else []
    packages += ["bitsandbytes"] if optimizers.is_of_bitsandbytes(optim) else []
    installed = filter(quantized_model.installed, dict.fromkeys(packages))
    return {package: importlib.metadata.version(package) for package in installed}
