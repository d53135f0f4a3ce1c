"""What benchmarks/train.py measures: the cells of its table, their published figures, and what is counted as work.

A cell is a method on a model of a size, with samples of a length, done by a trainer ("way"). This file imports no torch.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from memory import SIZES as PUBLISHED_SIZES

RESULTS = Path(__file__).resolve().parent / "results"
# layers, hidden size, intermediate_size, vocabulary; heads have 128 channels, but for tiny's 32
SIZES = {"tiny": (2, 64, 352, 151936)} | PUBLISHED_SIZES
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LORA = "--use_lora --lora_r 64 --lora_alpha 16 --lora_dropout 0.05 --learning_rate 3e-4"
FULL = "--learning_rate 1e-5"
# the flags of finetune.py, and how the base's weights are stored
METHODS = {
    "lora": (f"{LORA} --train_embeddings none", "plain"),
    "lora_emb": (f"{LORA} --train_embeddings all", "plain"),
    "qlora_gptq": (f"{LORA} --q_lora --train_embeddings none", "gptq"),
    "qlora_nf4": (f"{LORA} --q_lora --quant nf4 --train_embeddings none", "plain"),
    "full": (FULL, "plain"),
    "full_bf16": (f"{FULL} --bf16_weights --optim adamw_torch_8bit", "plain"),
}
NAMES = {
    "lora": "LoRA", "lora_emb": "LoRA (embeddings)", "qlora_gptq": "Q-LoRA, GPTQ Int4", "qlora_nf4": "Q-LoRA, NF4",
    "full": "full-parameter", "full_bf16": "full, bf16 weights",
}  # fmt: skip
# trainer: the package that it needs; see yardsticks.py
WAYS = {"ours": "torch", "transformers": "transformers", "liger": "liger_kernel", "trl": "trl"}
OK, OOM, MISSING = "ok", "out of memory", "not installed"

# Published: one A100-80G, samples of 256 to 8192 tokens, GB at the peak and seconds a step of 8 samples
PUBLISHED = {
    ("7B", "lora"): ((20.1, 20.4, 21.5, 23.8, 29.7, 36.6), (1.2, 1.5, 2.8, 5.2, 10.1, 21.3)),
    ("7B", "lora_emb"): ((33.7, 34.1, 35.2, 35.1, 39.2, 48.5), (1.4, 1.6, 2.9, 5.3, 10.3, 21.7)),
    ("7B", "qlora_gptq"): ((11.5, 11.5, 12.3, 13.9, 16.9, 23.5), (3.0, 3.0, 3.5, 7.0, 11.6, 22.3)),
    ("1.8B", "lora"): ((6.7, 7.4, 8.4, 11.0, 16.2, 21.8), (1.0, 1.0, 1.1, 1.7, 3.3, 6.8)),
    ("1.8B", "qlora_gptq"): (None, (1.4, 1.4, 1.4, 2.0, 3.4, 6.5)),
    ("1.8B", "full"): ((43.5, 43.5, 43.5, 43.5, 47.1, 48.3), (2.1, 2.2, 2.2, 2.3, 2.8, 5.6)),
}


@dataclass(frozen=True)
class Cell:
    """What is measured once. recompute: of gradient checkpointing: auto, none or all."""

    way: str
    method: str
    size: str
    length: int
    recompute: str = "auto"

    def key(self) -> tuple:
        return self.way, self.method, self.size, self.length, self.recompute

    def __str__(self) -> str:
        return f"{self.way}: {self.method}, {self.size}, {self.length} tokens, recomputing {self.recompute}"


def obstacle(cell: Cell) -> str | None:
    """Why the cell cannot be measured, as far as that can be told without a start."""
    if importlib.util.find_spec(WAYS[cell.way]) is None:
        return MISSING
    if cell.way == "ours":
        return None
    if METHODS[cell.method][1] == "gptq":
        return "transformers' Qwen2 would need a quantized checkpoint of its own"
    if cell.method == "full_bf16":
        return "rounds to nearest, and loses small updates: not the same work"
    return None


def parameters(size: str) -> int:
    """Of the matrices: the blocks', embedding and head."""
    layers, hidden, intermediate, vocabulary = SIZES[size]
    return layers * (4 * hidden**2 + 3 * hidden * (intermediate // 2)) + 2 * vocabulary * hidden


def model_flop(method: str, size: str, tokens: int) -> float:
    """The work that a step's tokens stand for, as the field counts it: 6 a parameter and token where all train, 4 under LoRA
    (no gradient of frozen weights). Neither attention nor what is computed twice counts."""
    return (6 if method.startswith("full") else 4) * parameters(size) * tokens


def figures(cell: Cell, tokens: int, supervised: int, seconds: float, ceiling_tflops: float) -> dict:
    """What follows from a step's time. tokens, supervised: of a step; ceiling_tflops: measured in the same run."""
    tflops = model_flop(cell.method, cell.size, tokens) / seconds / 1e12
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "supervised_tokens_per_second": supervised / seconds,
        "model_tflops": tflops,
        "utilization": tflops / ceiling_tflops,
    }


def is_final(cell: dict) -> bool:
    """Whether measuring again would find the same: not where a process failed, or a trainer was not installed."""
    return cell["status"] != MISSING and not cell["status"].startswith(("failed", "took"))


def stored(folder: Path = RESULTS) -> list[dict]:
    """All measured cells of all files of train.py, each with its machine, versions and the ceiling measured along; newest last."""
    found = []
    numbers = {path: path.stem.rpartition("_")[2] for path in folder.glob("train_*.json")}
    for path in sorted(numbers, key=lambda path: (int(numbers[path]) if numbers[path].isdigit() else 0, path.name)):
        report = json.loads(path.read_text(encoding="utf-8"))
        about = report["about"]
        found += [
            cell
            | {"machine": about["machine"], "date": about["date"], "ceiling": report["ceiling_tflops"]}
            | {"versions": about.get("versions", {})}
            for cell in report["cells"]
        ]
    return sorted(found, key=lambda cell: cell["date"])
