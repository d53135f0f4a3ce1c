"""What would make a run fit that does not: other flags, each with the memory that the run would then take."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from ..distributed.engines import DDP, ONE, ZERO2, ZERO3
from .memory_model import Estimate, Run, Sizes, estimate

USED = 0.92  # of the free memory: the model is not exact
NF4_BYTES = 0.5 + 0.127 / 8  # of a weight in NF4 with its doubly quantized scales
LORA_RANK = 64  # finetune.py's default
SHORTEST = 128  # tokens; a smaller limit leaves little of a conversation


class Way(NamedTuple):
    """flags: what to add to the command; opens: is the way open to a run; changes: what becomes of the run."""

    flags: str
    opens: Callable[[Run], bool]
    changes: Callable[[Run], dict]


def _over_nf4(run: Run) -> dict:
    return {"rank": run.rank or LORA_RANK, "packed": NF4_BYTES, "half_weights": False, "state": 8}


SHARDED = "--deepspeed ds_config_zero"
WAYS = (  # what changes the result least comes first
    Way(f"{SHARDED}2.json", lambda run: run.engine == DDP and not run.rank, lambda run: {"engine": ZERO2}),
    Way(f"{SHARDED}3.json", lambda run: run.engine in (DDP, ZERO2) and not run.packed, lambda run: {"engine": ZERO3}),
    Way(
        f"{SHARDED}3_offload.json",
        lambda run: run.engine != ONE and run.on_gpu and not run.packed and run.offload != "all",
        lambda run: {"engine": ZERO3, "offload": "all"},
    ),
    Way(
        "--bf16_weights --optim adamw_torch_8bit",
        lambda run: run.engine == ONE and run.half and not run.rank and not run.half_weights,
        lambda run: {"half_weights": True, "state": 2},
    ),
    Way("--use_lora", lambda run: not run.rank, lambda run: {"rank": LORA_RANK, "half_weights": False, "state": 8}),
    Way("--q_lora --quant nf4", lambda run: run.engine in (ONE, DDP, ZERO2) and not run.packed, _over_nf4),
)


def fits(found: Estimate, free: float) -> bool:
    return found.peak <= free * USED


def ways_to_fit(sizes: Sizes, run: Run, tokens: int, free: float, recompute: str = "") -> list[tuple[str, Estimate]]:
    """[(flags, what the run then takes)], of the ways that fit into `free` bytes, every block computed again where need be.

    tokens: of the longest sample. recompute: the flag that allows computing blocks again, where the run forbids it.
    """
    open_to = [(way.flags, dataclasses.replace(run, **way.changes(run))) for way in WAYS if way.opens(run)]
    changed = [(recompute, run)] * bool(recompute) + [(f"{flags} {recompute}".rstrip(), other) for flags, other in open_to]
    found = [(flags, estimate(sizes, other, tokens, sizes.layers)) for flags, other in changed]
    if shorter := longest_that_fits(sizes, run, tokens, free):
        found.append((f"--model_max_length {shorter}", estimate(sizes, run, shorter, sizes.layers)))
    return [(flags, needs) for flags, needs in found if fits(needs, free)]


def longest_that_fits(sizes: Sizes, run: Run, tokens: int, free: float) -> int | None:
    """The largest power of two below `tokens` whose pass fits with every block computed again; None where none does."""
    length = 1 << (tokens - 1).bit_length() - 1 if tokens > 1 else 0
    while length >= SHORTEST:
        if fits(estimate(sizes, run, length, sizes.layers), free):
            return length
        length //= 2
    return None
