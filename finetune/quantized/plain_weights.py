"""A checkpoint's weights under their plain names, whatever they are stored as: 16 bit, GPTQ, or what NF4 makes of 16 bit."""

from pathlib import Path

import torch

from ..folders import gptq_format, quant_settings
from ..folders.quant_settings import Quantization
from ..folders.shards import Shards


class PlainWeights:
    """Reads one tensor at a time. Dequantized weights come in float32, all else as stored.

    over: NF4 to read a 16-bit checkpoint's weights as NF4 rounds them; a GPTQ folder says itself what it is.
    """

    def __init__(self, folder: Path, over: Quantization | None = None):
        self.folder, self.gptq = folder, quant_settings.of_folder(folder)
        self.shards = Shards(folder)
        self.rounded: set[str] = set()
        if over is not None and over.method == "nf4":
            from . import nf4

            self.rounded = set(nf4.block_matrices(folder)) - set(nf4.narrow_layers(folder))

    def __enter__(self) -> "PlainWeights":
        return self

    def __exit__(self, *failure) -> None:
        self.shards.__exit__(*failure)

    def __getitem__(self, name: str) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if f"{layer}.qweight" in self.shards:
            parts = {part: self.shards[f"{layer}.{part}"] for part in gptq_format.PARTS}
            return gptq_format.dequantize(**parts, bits=self.gptq.bits, checkpoint_format=self.gptq.format)
        tensor = self.shards[name]
        if layer in self.rounded and layer != name:
            from . import nf4

            return nf4.rounded(tensor)
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that are not quantized."""
        whole = (name for name in self.shards if not name.endswith(gptq_format.PARTS))
        return next(dtype for name in whole if (dtype := self.shards[name].dtype).is_floating_point)

    def more_biases(self, expected: dict) -> list[str]:
        """The layers' biases that published GPTQ folders hold though the model has none, where one of them is not zero."""
        found = [name for name in self.shards if name.endswith(".bias") and name not in expected]
        found = [name for name in found if name.replace(".bias", ".qweight") in self.shards]
        return found if any(self.shards[name].any() for name in found) else []
