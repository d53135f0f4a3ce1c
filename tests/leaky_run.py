"""finetune.py with a later Qwen whose layers give each position something of the one behind it."""

import runpy
import sys
from pathlib import Path

import torch
from transformers.models.qwen2 import modeling_qwen2

usual = modeling_qwen2.Qwen2DecoderLayer.forward


def forward(self, hidden, *words, **more):
    return usual(self, hidden + 0.5 * torch.roll(hidden, -1, 1), *words, **more)


modeling_qwen2.Qwen2DecoderLayer.forward = forward
sys.argv = [str(Path(__file__).parent.parent / "finetune.py"), *sys.argv[1:]]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
