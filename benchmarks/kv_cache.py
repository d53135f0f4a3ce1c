"""What the int8 KV cache saves and costs: memory and tokens a second, with and without it, and with its kernels.

    python benchmarks/kv_cache.py                            # Qwen-7B on a GPU: all cells, beside the published figures
    python benchmarks/kv_cache.py --timed 64                 # the same memory in a fraction of the time, see below
    python benchmarks/kv_cache.py --batches 32 64 --lengths  # some cells: batches at 1024 tokens, no lengths at batch 1
    python benchmarks/kv_cache.py --size toy                 # on a CPU: shows that it runs, and nothing else

The model is made from its config with random weights, on the device: nothing is downloaded, and neither memory nor speed
depends on the weights. Each cell generates greedily through `model.generate` after a prompt of 8 tokens. GB (10^9 bytes) is the
most that torch had allocated at a time, weights included (`reserved`, in the JSON, is what it had taken from the GPU); tokens/s
counts all rows, from the first token to the last, so without the prefill. A cell that does not fit says "out of memory".

The caches: "full" is in the model's own type, "int8" is use_cache_quantization read in plain torch, "kernel" is with
use_cache_kernel. On a CPU the kernel's column is empty, or, with TRITON_INTERPRET=1, run by Triton's interpreter.

--timed N fills the cache with random numbers and generates only the last N tokens: the peak is that of these, and tokens/s
is that of the longest context instead of the mean over the way there.

Published (one A100-80G, 7B in bf16, GB): other code on another torch, to be read as orders of magnitude.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import provenance  # noqa: E402

PROMPT_TOKENS, BATCH_TOKENS = 8, 1024
BATCHES, LENGTHS = (1, 4, 16, 32, 64, 100), (512, 1024, 2048, 4096, 8192)
# layers, hidden size, head size, intermediate_size, vocabulary
SIZES = {
    "toy": (2, 128, 64, 256, 512),
    "1.8B": (24, 2048, 128, 11008, 151936),
    "7B": (32, 4096, 128, 22016, 151936),
    "14B": (40, 5120, 128, 27392, 152064),
}
# way: use_cache_quantization, use_cache_kernel
WAYS = {"full": (False, False), "int8": (True, False), "kernel": (True, True)}
OOM = "out of memory"
# (batch, tokens): GB without and with the int8 cache
PUBLISHED = {
    (1, 1024): (16.3, 15.5), (4, 1024): (24.1, 17.2), (16, 1024): (31.7, 22.3), (32, 1024): (48.7, 30.2),
    (64, 1024): (OOM, 48.2), (100, 1024): (OOM, 72.4),
    (1, 512): (15.2, 15.0), (1, 2048): (17.6, 15.8), (1, 4096): (19.5, 16.6), (1, 8192): (23.2, 17.6),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=BATCHES, help=f"batch sizes, each at {BATCH_TOKENS} tokens"
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="generated tokens, each at batch 1")
    parser.add_argument("--batch_tokens", type=int, default=BATCH_TOKENS, help="tokens of the --batches cells")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which caches")
    parser.add_argument("--timed", type=int, metavar="N", help="generate only the last N tokens of each cell")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=ROOT / "benchmarks" / "results", metavar="FOLDER",
        help="write a JSON file there (default: benchmarks/results), after each cell",
    )  # fmt: skip
    options = parser.parse_args()
    if options.timed is not None and options.timed < 2:
        parser.error("--timed needs 2 tokens at least")
    report = {"about": about(options), "cells": []}
    model = make_model(options.size)
    report["weights_gb"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    cells = [(batch, options.batch_tokens) for batch in options.batches] + [(1, length) for length in options.lengths]
    for batch, length in dict.fromkeys(cells):
        for way in options.ways:
            cell = {"batch": batch, "tokens": length, "way": way, **measure(model, batch, length, way, options.timed)}
            report["cells"].append(cell)
            print(f"batch {batch}, {length} tokens, {way}: {shown(cell)}", file=sys.stderr)
            if options.save:
                save(report, options.save)
    print(table(report, options))


def make_model(size: str):
    """A model with random weights: bf16 on a GPU, float32 on a CPU."""
    import torch

    from qwen_model import QWenConfig, QWenLMHeadModel

    layers, hidden, head, intermediate, vocabulary = SIZES[size]
    config = QWenConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=hidden // head, kv_channels=head,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        # sdpa for all: flash-attn, where installed, would stand for one way only
        model = QWenLMHeadModel._from_config(
            config, dtype=torch.bfloat16 if on_gpu else torch.float32, attn_implementation="sdpa"
        )
    return model.eval()


def measure(model, batch: int, length: int, way: str, timed: int | None) -> dict:
    """One cell: {"gb", "reserved_gb", "cache_gb", "tokens_per_second"}, or {"problem"}."""
    import torch

    model.config.use_cache_quantization, model.config.use_cache_kernel = WAYS[way]
    if problem := model.config.use_cache_kernel and obstacle(model):
        return {"problem": f"not used: {problem}"}
    try:
        for context in (PROMPT_TOKENS, 200):  # compiles the kernels, those for split keys too
            generate(model, batch, context, 3)
        if timed is None or timed >= length:
            return generate(model, batch, PROMPT_TOKENS, length)
        held = PROMPT_TOKENS + length - timed
        return generate(model, batch, held, timed, filled_cache(model, batch, held - 1))
    except torch.OutOfMemoryError:
        return {"problem": OOM}


def obstacle(model) -> str:
    """Why the kernels would not read the cache, "" if they would."""
    import torch

    from qwen_model.kv_cache import Int8Cache, kernel_obstacle

    with torch.no_grad():
        return kernel_obstacle(model.config, Int8Cache(), model.get_input_embeddings().weight)


def filled_cache(model, batch: int, tokens: int):
    """The cache that the config asks for, holding random keys and values."""
    import torch

    config, cache = model.config, model.transformer.new_cache()
    how = {"kernel": True} if config.use_cache_kernel else {}
    shape = (batch, config.num_attention_heads, tokens, config.head_dim)
    with torch.no_grad():
        for i in range(config.num_hidden_layers):
            states = torch.randn(shape, device=model.device, dtype=model.dtype)
            cache.update(states, states, i, **how)
    return cache


def generate(model, batch: int, prompt_tokens: int, new_tokens: int, cache=None) -> dict:
    """The figures of one call of model.generate; the cache, if given, holds the prompt but for its last token."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        """Ends nothing, and takes the time of every token."""

        def __init__(self):
            self.times = []

        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    gc.collect()
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt_tokens), device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]), return_dict_in_generate=True,
        past_key_values=cache,
    )  # fmt: skip
    assert out.sequences.shape == (batch, prompt_tokens + new_tokens)
    steps, seconds = len(clock.times) - 1, clock.times[-1] - clock.times[0]
    return {
        "gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None,
        "cache_gb": cache_gb(out.past_key_values),
        "tokens_per_second": batch * steps / seconds,
    }


def cache_gb(cache) -> float:
    """What the cache holds, with the room it keeps for tokens to come."""
    from qwen_model.kv_cache import Int8Cache

    tensors = []
    for layer in cache.layers:
        tensors += [*layer.key_room, *layer.value_room] if isinstance(cache, Int8Cache) else [layer.keys, layer.values]
    return sum(x.numel() * x.element_size() for x in tensors) / 1e9


# ---- for people


def shown(cell: dict) -> str:
    """ "16.1 GB, 35 tokens/s", or what was in the way; on a CPU the cache's GB alone."""
    if "problem" in cell:
        return cell["problem"]
    gb = f"cache {cell['cache_gb']:.4f} GB" if cell["gb"] is None else f"{cell['gb']:.1f} GB"
    return f"{gb}, {cell['tokens_per_second']:.0f} tokens/s"


def table(report: dict, options) -> str:
    """One line for each batch and length, the published figures at the end of the line where they apply."""
    about = report["about"]
    lines = [f"Qwen {options.size} ({report['weights_gb']:.1f} GB of weights), {about['dtype']}, {about['machine']}"]
    if options.timed:
        lines.append(
            f"only the last {options.timed} tokens of each cell are generated, after a cache of random numbers"
        )
    columns = [*options.ways, *(["published: without", "with int8"] if options.size == "7B" else [])]
    lines += ["", "| batch | tokens | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    rows: dict[tuple, list[str]] = {}
    notes = []
    for cell in report["cells"]:
        problem = cell.get("problem", "")
        text = shown(cell)
        if problem.startswith("not used"):
            notes.append(f"{cell['way']}: {problem}")
            text = "–"
        rows.setdefault((cell["batch"], cell["tokens"]), []).append(text)
    for (batch, tokens), texts in rows.items():
        if options.size == "7B":
            texts += [x if isinstance(x, str) else f"{x} GB" for x in PUBLISHED.get((batch, tokens), ("–", "–"))]
        lines.append(f"| {batch} | {tokens} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, *([""] if notes else []), *dict.fromkeys(notes)])


def about(options) -> dict:
    """Where the figures come from, and the settings."""
    return provenance.about() | {"size": options.size, "timed": options.timed}


def save(report: dict, folder: Path) -> None:
    """kv_cache_SIZE_MACHINE.json"""
    folder.mkdir(parents=True, exist_ok=True)
    machine = provenance.file_name(report["about"]["machine"])
    path = folder / f"kv_cache_{report['about']['size']}_{machine}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
