"""GPTQ: a 16-bit model's folder becomes one of few bits, in the format of the published Int4 and Int8 folders.

The folder is whole: weights, config, code, tokenizer, chat settings, and the record of its making. What was written is
read again and compared, and the quantized model is loaded and asked, before the folder is put into its place.
"""

import importlib.metadata
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from .. import json_text
from ..compare.agreement import Agreement
from ..compat.on_gptqmodel import contained
from ..errors import note, on_first_rank, warn
from ..folders import fingerprints, model_writer, output_folder, shards
from ..memory.peak_memory import memory_gb
from ..model import loading
from ..quiet import errors_only
from . import gptq_tensors
from .calibration import Calibration
from .gptq_proof import WORSE, lines, proof
from .settings import Settings
from .streamed import release_memory

VERSIONS = ("gptqmodel", "torch", "transformers", "optimum")


def quantize(
    folder: Path, staging: Path, calibration: Calibration, settings: Settings, made_from: dict | None = None
) -> tuple[Agreement, Agreement]:
    """Writes the quantized model of `folder` into `staging`, a folder of new_folder.new_folder(), and proves it.

    Check first: gptq_checks.check_quantizing(). folder may lie in staging. made_from: for the record, instead of `folder` and
    its fingerprint. Returns how the plain and the quantized model do on answers. Raises RuntimeError where what was
    written is not what was made, or gives no numbers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pass_dtype(folder, settings, device)
    skeleton = gptq_tensors.skeleton(folder)
    plain, layers = model_writer.tensor_shapes(skeleton), list(gptq_tensors.quantized_layers(skeleton))
    gptq_tensors.check_half(folder, plain, layers)
    write_frame(folder, staging, skeleton, settings, record(folder, calibration, settings, dtype, made_from))

    made = staging / "layers"  # as gptqmodel leaves them
    run(folder, staging / "source", made, plain, calibration, settings, dtype, device, skeleton.config.num_hidden_layers)
    expected = gptq_tensors.expected_shapes(plain, layers, settings.bits, settings.group_size)
    tensors = gptq_tensors.tensors(folder, made, plain, layers, settings.bits)
    model_writer.write_weights(staging, tensors, settings.max_shard_bytes, expected)
    check_written(staging, gptq_tensors.tensors(folder, made, plain, layers, settings.bits))
    shutil.rmtree(made)

    before, after = proof(folder, staging, calibration.samples, device, dtype)
    for line in lines(before, after):
        note(line)
    if after.perplexity > WORSE * before.perplexity:
        warn("that is much worse than before - more samples, more bits or a smaller --group-size may help")
    return before, after


def pass_dtype(folder: Path, settings: Settings, device) -> torch.dtype:
    """--dtype; auto: as stored, but float32 on CPUs, which are slow at anything else, and for 8 bits.

    The quantized weights are handed on in this type, and half precision would round those of 8 bits once more.
    """
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.float32 if device.type == "cpu" or settings.bits == 8 else shards.stored_dtype(folder)


def run(folder: Path, source: Path, made: Path, names, calibration, settings, dtype, device, blocks: int) -> None:
    """gptqmodel's work, behind one progress bar. names: of the model's tensors."""
    with contained():
        from . import gptq_run  # and with it gptqmodel
    gptq_run.stripped(folder, source, names)
    bar = {"desc": "quantizing", "unit": " blocks", "total": blocks, "disable": not on_first_rank()}
    with tqdm(**bar) as progress, contained(), errors_only():

        def block_done() -> None:
            progress.set_postfix_str(f"{memory_gb():.1f} GB", refresh=False)
            progress.update()

        gptq_run.run(source, made, calibration.samples, settings, dtype, device, block_done)
    shutil.rmtree(source)
    release_memory()


# ---- the folder


def write_frame(folder: Path, staging: Path, skeleton, settings: Settings, record: dict) -> None:
    """All but the weights. From here on `staging` loads only as long as this process lives."""
    config, tokenizer = skeleton.config, loading.load_tokenizer(folder)
    config.quantization_config = settings.config()
    chat = skeleton.generation_config
    if (folder / "generation_config.json").is_file():
        chat = GenerationConfig.from_pretrained(folder)
    json_text.write(staging / "quantize_config.json", settings.config())
    model_writer.write_frame(staging, skeleton, tokenizer, chat, torch.float16, record, model_card(record["quantized"]))


def record(folder: Path, calibration: Calibration, settings: Settings, dtype, made_from: dict | None) -> dict:
    """training.json: the source's, with how it was quantized."""
    source = {"folder": str(folder.resolve()), "fingerprint": fingerprints.of_model(folder)}
    made = {
        "from": made_from or source,
        "settings": asdict(settings) | {"dtype": str(dtype).removeprefix("torch.")},
        "calibration": calibration.record(),
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
    }
    return output_folder.read_record(folder) | {"quantized": made}


def model_card(made: dict) -> str:
    """README.md."""
    name, settings, data = Path(made["from"].get("folder", "")).name, made["settings"], made["calibration"]
    bits = settings["bits"]
    return (
        f"---\nlibrary_name: transformers\n---\n\n# {name}, GPTQ Int{bits}\n\n"
        f"{name} in {bits} bits (GPTQ, group size {settings['group_size']}), calibrated on {data['taken']:,}\n"
        f"conversations, {data['tokens']:,} tokens. training.json says how it was made: from what, on which data,\n"
        "settings, versions. It loads with transformers where gptqmodel and optimum are installed; first-generation\n"
        "Qwen brings its own code (trust_remote_code=True), which is not needed where the toolkit is installed:\n"
        "`python -m finetune.ask THIS_FOLDER`. To train over it:\n"
        "`bash finetune/finetune_qlora_single_gpu.sh -m THIS_FOLDER`.\n"
    )


def check_written(folder: Path, made) -> None:
    """Reads the folder again: RuntimeError unless each tensor is, bit by bit, the one that was made."""
    with shards.Shards(folder) as written:
        for name, tensor in made:
            if not torch.equal(written[name], tensor):
                fault = "the disk or its quota may be at fault"
                raise RuntimeError(f"{folder}: {name} was not written as it was made; {fault}")
