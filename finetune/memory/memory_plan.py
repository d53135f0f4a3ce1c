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
from .ways_to_fit import NF4_BYTES, fits, ways_to_fit

AUTO = "auto"
USEFUL, LARGEST, LARGEST_ON_CPU = 4096, 16384, 8192  # tokens of a pass: below, a GPU idles; above, nothing is gained
STEP = 1024
GPTQ_EXTRA = 4  # bytes of a group of GPTQ: scale, zeros


def free_bytes(args) -> float:
    """What this process may use: of its GPU, or of one that is not here (--gpu_memory); else of the machine's main memory,
    shared by the processes on it.

    args: of args.parse(); infinite where its flags are at fault, which others say.
    """
    import torch

    training = args.training
    if args.look.gpu_memory:
        return args.look.gpu_memory * 1e9
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
    sizes, run = Sizes.of(config), run_of(args, config, step_tokens)
    asked = training.recompute
    choices = range(sizes.layers + 1) if asked == AUTO else [sizes.layers if asked else 0]
    largest = LARGEST if run.on_gpu else LARGEST_ON_CPU
    useful = max(longest, min(USEFUL, step_tokens))
    if data.max_tokens_per_pass != AUTO:
        useful = max(longest, min(data.max_tokens_per_pass, step_tokens))
    chosen = least_checkpointing(sizes, run, useful, choices, free) or least_checkpointing(sizes, run, longest, choices, free)
    if chosen is None:
        chosen = estimate(sizes, run, longest, choices[-1])
        if not args.look.dry_run:  # which says it itself
            warn_of(sizes, run, chosen, free, args)
    if data.max_tokens_per_pass == AUTO:
        chosen = largest_fitting_pass(sizes, run, chosen, min(largest, step_tokens), free)
        data.max_tokens_per_pass = chosen.tokens
    if asked == AUTO:
        training.recompute_blocks(chosen.recomputed)
    return chosen


def with_passes_of(args, folder: Path, chosen: Estimate, largest: dict[bool, int]) -> Estimate:
    """The estimate for the passes that the plan has come to: levelled out, they may be far smaller than the limit.

    largest: of plan.largest_passes(). A step of several passes takes more than one of a single pass of that size.
    """
    config = config_files.config_of(folder)
    sizes = Sizes.of(config)
    runs = [(run_of(args, config, math.inf if several else tokens), tokens) for several, tokens in largest.items()]
    return max((estimate(sizes, run, tokens, chosen.recomputed) for run, tokens in runs), key=lambda found: found.peak)


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


def warn_of(sizes: Sizes, run: Run, found: Estimate, free: float, args) -> None:
    """What does not fit by the model may still be tried: it says so, and what would help."""
    what = f"this run needs {found.describe()}, and {free / 1e9:.1f} GB are free"
    warn(f"{what}: it will hardly fit - {remedy(sizes, run, found.tokens, free, args)}")


def remedy(sizes: Sizes, run: Run, longest: int, free: float, args) -> str:
    """What to add to the command, each with the memory that the run then takes."""
    recompute = "--gradient_checkpointing auto" if args.training.recompute is False else ""
    ways = [f"{flags} ({needs.peak / 1e9:.1f} GB)" for flags, needs in ways_to_fit(sizes, run, longest, free, recompute)]
    return f"give {' or '.join(ways)}" if ways else "no flag brings it down to that: take a smaller model or a larger GPU"


def run_of(args, config: dict, step_tokens: float = math.inf) -> Run:
    """The Run of these flags, for the memory model."""
    from qwen_model import on_triton  # with torch

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
        on_gpu=training.device.type == "cuda" or bool(args.look.gpu_memory),
        kernels=training.device.type != "cuda" or not on_triton.refusal(training.device),
        offload=engines.offloaded(training),
        step_tokens=step_tokens,
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
