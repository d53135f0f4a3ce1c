"""How a model is quantized and calibrated, as the command line says it. The defaults of all programs that quantize are here."""

import importlib.metadata
from dataclasses import dataclass

from ..folders.tensor_files import MAX_SHARD_SIZE, size_in_bytes

SAMPLES, SEED, MAX_LENGTH = 128, 42, 8192  # of the calibration: conversations, which ones are drawn, tokens of each
FEW, MANY = 64, 512  # conversations: with fewer the statistics are poor, with more nothing is gained but hours


@dataclass(frozen=True)
class Settings:
    """group_size: input rows that share a scale, -1 for all. desc_act: rows in order of their activations' size.

    damp_percent: what is added to the statistics' diagonal, as a share of its mean. dtype: of the passes; auto: see
    pass_dtype(). max_shard_bytes: of the files written.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    desc_act: bool = False
    damp_percent: float = 0.01
    dtype: str = "auto"
    max_shard_bytes: int = size_in_bytes(MAX_SHARD_SIZE)

    def config(self) -> dict:
        """As published folders state it in quantize_config.json."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": self.damp_percent,
            "desc_act": self.desc_act,
            "static_groups": False,
            "sym": self.symmetric,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            # whose zero points can be trusted where weights are not symmetric
            "meta": {"quantizer": [f"gptqmodel:{importlib.metadata.version('gptqmodel')}"]},
        }
