"""GB that each method needs, for the published sizes of Qwen: what stands all the time, and the peak of a run.

    python benchmarks/memory.py                  # the README's tables
    python benchmarks/memory.py --gpus 8         # what is sharded, over so many GPUs
    python benchmarks/memory.py --tokens 16384   # the peak with passes of so many tokens

Arithmetic (finetune/memory/memory_model.py) in bf16 with AdamW and LoRA of rank 64: what --max_tokens_per_pass auto decides by. What a run
really takes stands in its log (memory_gb).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.quiet import quiet  # noqa: E402

quiet()  # before anything imports transformers

from finetune.distributed.engines import ZERO3  # noqa: E402
from finetune.memory.memory_model import Run, Sizes, estimate, standing  # noqa: E402

# layers, hidden size, intermediate_size, vocabulary
SIZES = {
    "1.8B": (24, 2048, 11008, 151936),
    "7B": (32, 4096, 22016, 151936),
    "14B": (40, 5120, 27392, 152064),
    "72B": (80, 8192, 49152, 152064),
}
RANK = 64
INT4 = 0.5 + 4 / 128  # 4 bits, and of each group of 128 a scale (2 bytes) and its share of zero points
METHODS = {
    "Q-LoRA, Int4": Run(RANK, packed=INT4),
    "LoRA, LoRA + chat rows": Run(RANK),
    "LoRA + embeddings whole": Run(RANK, embeddings=True),
    "full, --bf16_weights, 8-bit AdamW": Run(0, half_weights=True, state=2),
    "full, one process": Run(0),
}


def sizes_of(name: str) -> Sizes:
    layers, hidden, intermediate, vocabulary = SIZES[name]
    config = {
        "model_type": "qwen", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 128,
        "kv_channels": 128, "intermediate_size": intermediate, "vocab_size": vocabulary,
    }  # fmt: skip
    return Sizes.of(config)


def bytes_each(run: Run) -> float:
    """A parameter, where all of them train."""
    sizes = sizes_of("7B")
    return run.ranks * sum(standing(sizes, run)) / (sizes.blocks + sizes.embeddings)


def table(gpus: int) -> dict[str, dict[str, float]]:
    """{method: {size: GB on each GPU}} of weights, gradients and the optimizer's state."""
    sharded = {
        f"LoRA, ZeRO-3 on {gpus} GPUs": Run(RANK, engine=ZERO3, ranks=gpus),
        f"full, ZeRO-3 on {gpus} GPUs": Run(0, engine=ZERO3, ranks=gpus),
    }
    every = METHODS | sharded
    return {method: {size: sum(standing(sizes_of(size), run)) / 1e9 for size in SIZES} for method, run in every.items()}


def peaks(tokens: int) -> dict[str, dict[str, str]]:
    """{method: {size: GB at the peak on one GPU, without recomputing - with all blocks computed again}}"""

    def both(size, run):
        sizes = sizes_of(size)
        return " - ".join(f"{estimate(sizes, run, tokens, again).peak / 1e9:.0f}" for again in (0, sizes.layers))

    return {method: {size: both(size, run) for size in SIZES} for method, run in METHODS.items()}


def show(title: str, rows: dict[str, dict]) -> None:
    print(f"| {title} | " + " | ".join(SIZES) + " |")
    print("|---" * (len(SIZES) + 1) + "|")
    for method, row in rows.items():
        cells = (value if isinstance(value, str) else f"{value:.0f}" for value in row.values())
        print(f"| {method} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="over how many GPUs ZeRO-3 shards")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="in one pass")
    options = parser.parse_args()
    show("GB for weights, gradients, optimizer", table(options.gpus))
    print()
    show(f"GB at the peak, {options.tokens:,} tokens a pass: nothing - everything computed again", peaks(options.tokens))


if __name__ == "__main__":
    main()
