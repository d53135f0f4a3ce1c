"""--max_tokens_per_pass auto and --gradient_checkpointing auto: chosen from the memory model and the memory that is free.

Activation checkpointing makes a block's work a third more, so as few blocks use it as a pass of a useful size allows; then
passes become as large as fits. Neither changes a result.
"""

import math
from pathlib import Path

from ..distributed import engines
from ..errors import note, warn
from ..folders import config_files
from ..model import optimizers
from .memory_model import Estimate, Run, Sizes, estimate

AUTO = "auto"
USEFUL, LARGEST, LARGEST_ON_CPU = 4096, 16384, 8192  # tokens of a pass: below, a GPU idles; above, nothing is gained
USED = 0.92  # of the free memory: the model is not exact
STEP = 1024
NF4_BYTES, GPTQ_EXTRA = 0.5 + 0.127 / 8, 4  # of NF4 with its doubly quantized scales; of a group of GPTQ: scale, zeros


def free_bytes(training) -> float:
    """What this process may use: of its GPU, else of the machine's main memory, shared by the processes on it.

    training: of args.parse(); infinite where its flags are at fault, which others say.
    """
    import torch

    if not hasattr(training, "device"):
        return math.inf
    if training.device.type == "cuda":
        return float(torch.cuda.mem_get_info(training.device)[0])
    import psutil

    return psutil.virtual_memory().available / max(1, training.world_size)


def resolve_auto(args, folder: Path, longest: int, step_tokens: int, free: float) -> Estimate:
    """Replaces auto in args.data.max_tokens_per_pass, and decides how many blocks use activation checkpointing.

    longest: tokens of the longest sample; step_tokens: of the largest step, of a rank; free: bytes, the least of all ranks.
    """
    data, training = args.data, args.training
    config = config_files.config_of(folder)
    sizes, run = Sizes.of(config), run_of(args, config)
    asked = training.recompute
    choices = range(sizes.layers + 1) if asked == AUTO else [sizes.layers if asked else 0]
    largest = LARGEST if run.on_gpu else LARGEST_ON_CPU
    useful = max(longest, min(USEFUL, step_tokens))
    if data.max_tokens_per_pass != AUTO:
        useful = max(longest, min(data.max_tokens_per_pass, step_tokens))
    chosen = least_checkpointing(sizes, run, useful, choices, free) or least_checkpointing(sizes, run, longest, choices, free)
    if chosen is None:
        chosen = estimate(sizes, run, longest, choices[-1])
        warn_of(chosen, free, args)
    if data.max_tokens_per_pass == AUTO:
        chosen = largest_fitting_pass(sizes, run, chosen, min(largest, step_tokens), free)
        data.max_tokens_per_pass = chosen.tokens
    if asked == AUTO:
        training.recompute_blocks(chosen.recomputed)
    return chosen


def least_checkpointing(sizes: Sizes, run: Run, tokens: int, choices, free: float) -> Estimate | None:
    """The estimate with the fewest checkpointed blocks that lets a pass of `tokens` fit; None where none does."""
    fitting = (found for again in choices if fits(found := estimate(sizes, run, tokens, again), free))
    return next(fitting, None)


def largest_fitting_pass(sizes: Sizes, run: Run, chosen: Estimate, limit: int, free: float) -> Estimate:
    """The estimate with the largest pass that fits, up to `limit` tokens, in steps of 1024."""
    for tokens in range(math.ceil(limit / STEP) * STEP, chosen.tokens, -STEP):
        found = estimate(sizes, run, tokens, chosen.recomputed)
        if fits(found, free):
            return found
    return chosen


def fits(found: Estimate, free: float) -> bool:
    return found.peak <= free * USED


def warn_of(found: Estimate, free: float, args) -> None:
    """What does not fit by the model may still be tried: it says so, and what would help."""
    ways = ["a lower --model_max_length"]
    if not args.lora.use_lora:
        ways.append("--use_lora")
    elif not args.lora.q_lora:
        ways.append("--q_lora --quant nf4")
    if args.training.recompute is False:
        ways.append("--gradient_checkpointing auto")
    if args.training.engine == engines.DDP:
        ways.append("--deepspeed ds_config_zero3.json")
    what = f"this run needs {found.describe()}, and {free / 1e9:.1f} GB are free"
    warn(f"{what}: it will hardly fit - give {' or '.join(ways)}")


def run_of(args, config: dict) -> Run:
    """The Run of these flags, for the memory model."""
    lora, training = args.lora, args.training
    return Run(
        rank=lora.lora_r if lora.use_lora else 0,
        embeddings=lora.use_lora and lora.train_embeddings == "all",
        packed=packed_bytes(lora, config),
        half=bool(training.bf16 or training.fp16),
        half_weights=training.bf16_weights,
        state=optimizers.state_bytes(training.optim),
        engine=training.engine,
        ranks=training.world_size,
        on_gpu=training.device.type == "cuda",
    )


def packed_bytes(lora, config: dict) -> float | None:
    """Bytes of a block weight where blocks are quantized; None where not."""
    if lora.quant == "nf4":
        return NF4_BYTES
    stored = config.get("quantization_config")
    if not stored:
        return None
    bits, group = stored.get("bits", 4), stored.get("group_size", 128)
    return bits / 8 + (GPTQ_EXTRA / group if group > 0 else 0)


def compare(found: Estimate, measured: float) -> None:
    """A note where the measured peak (bytes) is far from what was computed."""
    if abs(measured / found.peak - 1) > 0.25:
        note(f"memory: {measured / 1e9:.1f} GB at the peak, where {found.peak / 1e9:.1f} GB were computed")
