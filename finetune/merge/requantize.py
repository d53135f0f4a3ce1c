"""Quantizes a merged model again as its base was, calibrated on conversations."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, note
from ..folders import fingerprints, output_folder, quant_settings
from ..folders.quant_settings import Quantization
from ..gptq.settings import FEW, MANY, MAX_LENGTH, SAMPLES, SEED, Settings


@dataclass
class RequantizeOptions:
    """What to calibrate on."""

    data_path: str | None = None
    samples: int = SAMPLES
    seed: int = SEED
    max_len: int = MAX_LENGTH


def earlier(adapter: Path, base: Path) -> Quantization:
    """The GPTQ settings of the weights that the adapter was trained over. UserError where these were not GPTQ."""
    kept = output_folder.read_record(adapter).get("method", {}).get("quantization")
    found = quant_settings.of_folder(base) or (Quantization(**kept) if kept else None)
    if found is None or found.method != "gptq":
        over = "NF4, which is made while a model is loaded" if found else "weights that are not quantized"
        what = f"--requantize: {adapter} was trained over {over}"
        raise UserError(f"{what} - leave it out; python run_gptq.py quantizes the merged model")
    return found


def read_calibration_data(wish: RequantizeOptions):
    """The conversations, read and checked before anything is merged."""
    from ..conversations import reading

    if not wish.data_path:
        raise UserError("--requantize needs conversations to calibrate on - give them with --data_path")
    if wish.samples < 1:
        raise UserError(f"--samples {wish.samples}: nothing to calibrate on - give {FEW} to {MANY}")
    return reading.read(wish.data_path)


def requantize(merged: Path, staging: Path, read, wish: RequantizeOptions, to: Quantization, name: str, max_bytes: int) -> None:
    """Writes the model of `merged` into `staging`, quantized. read: of read_calibration_data(). name: what it was made from, for people."""
    from ..gptq import calibration, pipeline
    from ..model import loading

    settings = Settings(
        bits=to.bits,
        group_size=to.group_size,
        symmetric=to.symmetric,
        desc_act=to.desc_act,
        max_shard_bytes=max_bytes,
    )
    max_length = calibration.longest(merged, wish.max_len)
    drawn = calibration.draw(read, loading.load_tokenizer(merged), wish.samples, wish.seed, max_length)
    for line in [*drawn.notes, *drawn.describe()]:
        note(line)
    made_from = {"folder": name, "fingerprint": fingerprints.of_model(merged)}
    pipeline.quantize(merged, staging, drawn, settings, made_from)
