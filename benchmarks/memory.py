"""GB that each method needs for weights, gradients and the optimizer's state, for the published sizes of Qwen.

    python benchmarks/memory.py            # the README's table
    python benchmarks/memory.py --gpus 8   # what is sharded, over so many GPUs

Arithmetic on the sizes of the parameters, in bf16 with AdamW; activations come on top (they grow with --max_tokens_per_pass,
and little with --gradient_checkpointing). What a run really takes stands in its log (memory_gb).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# layers, hidden size, intermediate_size, vocabulary
SIZES = {
    "1.8B": (24, 2048, 11008, 151936),
    "7B": (32, 4096, 22016, 151936),
    "14B": (40, 5120, 27392, 152064),
    "72B": (80, 8192, 49152, 152064),
}
RANK = 64
TRAINED = 4 + 4 + 8  # bytes of a trained float32 parameter: itself, its gradient, AdamW's two moments
DEEPSPEED = 2 + 4 + 4 + 8  # the same under DeepSpeed in bf16: the passes' copy, the gradient, the master, the moments
HALF = 2 + 2 + 2  # --bf16_weights: weight, gradient, moments of 8 bits
FROZEN, INT4 = 2, 0.5 + 4 / 128  # 4 bits, and of each group of 128 a scale (2 bytes) and its share of zero points


def count(size: str) -> tuple[int, int, int]:
    """(parameters of the blocks' matrices, of embedding and head, of LoRA adapters on all block matrices)."""
    layers, hidden, intermediate, vocabulary = SIZES[size]
    shapes = [(3 * hidden, hidden), (hidden, hidden), *[(intermediate // 2, hidden)] * 3]
    blocks = layers * sum(out * inner for out, inner in shapes)
    adapters = layers * RANK * sum(out + inner for out, inner in shapes)
    return blocks, 2 * vocabulary * hidden, adapters


def table(gpus: int) -> dict[str, dict[str, float]]:
    """{method: {size: GB on each GPU}}."""
    rows: dict[str, dict[str, float]] = {}
    for size in SIZES:
        blocks, embeddings, adapters = count(size)
        every, trained = blocks + embeddings, adapters * TRAINED
        needs = {
            "Q-LoRA, Int4": blocks * INT4 + embeddings * FROZEN + trained,
            "LoRA, LoRA + chat rows": every * FROZEN + trained,
            "LoRA + embeddings whole": every * FROZEN + trained + embeddings * TRAINED,
            "full, --bf16_weights, 8-bit AdamW": every * HALF,
            "full, one process": every * (2 + TRAINED),  # autocast keeps a copy of the weights in bf16
            f"LoRA, ZeRO-3 on {gpus} GPUs": (every * FROZEN + adapters * DEEPSPEED) / gpus,
            f"full, ZeRO-3 on {gpus} GPUs": every * DEEPSPEED / gpus,
        }
        for method, needed in needs.items():
            rows.setdefault(method, {})[size] = needed / 1e9
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, help="over how many GPUs ZeRO-3 shards")
    rows = table(parser.parse_args().gpus)
    print("| GB for weights, gradients, optimizer | " + " | ".join(SIZES) + " |")
    print("|---" * (len(SIZES) + 1) + "|")
    for method, needed in rows.items():
        print(f"| {method} | " + " | ".join(f"{needed[size]:.0f}" for size in SIZES) + " |")


if __name__ == "__main__":
    main()
