"""Quantizes a Qwen model with GPTQ, on conversations like those that it is to answer:

    python run_gptq.py --model_name_or_path MODEL --data_path DATA.json --out_path OUT --bits 4

OUT has the format of the published Int4 and Int8 folders: it loads as it lies there, and Q-LoRA trains over it.
The job from top to bottom; its parts are in finetune/.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from finetune.errors import Findings, Options, note, run
from finetune.folders import hub
from finetune.folders.tensor_files import MAX_SHARD_SIZE, max_shard_bytes
from finetune.gptq import gptq_checks
from finetune.gptq.settings import FEW, MANY, MAX_LENGTH, SAMPLES, SEED, Settings
from finetune.quiet import quiet
from finetune.writing.new_folder import new_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    quiet()
    run(lambda: job(options))


def job(options) -> None:
    """Everything a user gave is checked before a weight is read."""
    from finetune.conversations import reading  # and with it tqdm, which reads quiet()'s settings then

    findings, folder = Findings(), hub.find_folder(options.model_name_or_path)
    settings = settings_of(options)
    with findings:
        settings = replace(settings, max_shard_bytes=max_shard_bytes(options.max_shard_size))
    with findings:
        gptq_checks.check_quantizing(folder, options.out_path, settings, options.samples, options.max_len)
    with findings:
        read = reading.read(options.data_path)
    findings.raise_if_any()
    gptq_checks.check_values(folder)
    from finetune.gptq import calibration, pipeline  # with torch, whose import takes seconds: after the checks
    from finetune.model import loading

    max_length = calibration.longest(folder, options.max_len)
    drawn = calibration.draw(read, loading.load_tokenizer(folder), options.samples, options.seed, max_length)
    sizes = gptq_checks.tensor_parallel_sizes(folder, settings)
    for line in [*drawn.notes, *drawn.describe(), f"tensor parallel sizes that fit: {', '.join(map(str, sizes))}"]:
        note(line)
    with new_folder(options.out_path) as staging:
        pipeline.quantize(folder, staging, drawn, settings)
    note(f"done: {options.out_path} (GPTQ Int{settings.bits}) loads by itself, and Q-LoRA trains over it")


def settings_of(options):
    """The flags as the library takes them, but for the one that may be no size."""
    return Settings(
        bits=options.bits,
        group_size=options.group_size,
        symmetric=options.sym,
        desc_act=options.desc_act,
        damp_percent=options.damp_percent,
        dtype=options.dtype,
    )


def parse(argv: list[str] | None):
    """The flags; the published ones have their names and defaults."""
    parser = Options(prog="python run_gptq.py", description=__doc__.split(":\n\n")[0] + ".")
    add = parser.add_argument
    add("-m", "--model_name_or_path", required=True, metavar="MODEL", help="a 16-bit model: folder, or id on the hub")
    add("-d", "--data_path", required=True, metavar="DATA", help="conversations to calibrate on (data/README.md)")
    add("-o", "--out_path", required=True, type=Path, metavar="OUT", help="a new folder for the quantized model")
    add("--bits", type=int, default=Settings.bits, help="2, 3, 4 or 8 (%(default)s)")
    what = "weights that share a scale; -1: a whole row (%(default)s)"
    add("--group-size", "--group_size", type=int, default=Settings.group_size, help=what)
    what = "tokens of a sample, up to the model's length (%(default)s)"
    add("--max_len", "--max-len", type=int, default=MAX_LENGTH, help=what)
    add("--samples", type=int, default=SAMPLES, help=f"conversations to calibrate on, {FEW} to {MANY} (%(default)s)")
    add("--seed", type=int, default=SEED, help="which ones are drawn (%(default)s)")
    switch = {"type": truth, "nargs": "?", "const": True}
    add("--desc_act", **switch, default=Settings.desc_act, help="in order of activations' size (%(default)s)")
    add("--sym", **switch, default=Settings.symmetric, help="zero in the middle of the range (%(default)s)")
    what = "added to the diagonal, as a share of its mean (%(default)s)"
    add("--damp_percent", type=float, default=Settings.damp_percent, help=what)
    add("--max_shard_size", default=MAX_SHARD_SIZE, help="of the files written (%(default)s)")
    add("--dtype", choices=DTYPES, default=Settings.dtype, help="of the passes (auto: as stored; on CPUs float32)")
    return parser.parse_args(argv)


def truth(text: str) -> bool:
    """true or false, as people write them."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: give true or false")


if __name__ == "__main__":
    main()
