"""How a model is quantized, as the command line says it."""

import importlib.metadata
from dataclasses import dataclass


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
    max_shard_bytes: int = 2 * 10**9

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
