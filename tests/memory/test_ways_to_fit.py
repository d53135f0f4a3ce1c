"""What would make a run fit: each way that is named does, as the memory model has it, and goes with the run."""

import dataclasses

import pytest
from test_memory_model import QWEN_7B

from finetune.distributed.engines import DDP, ONE, ZERO2, ZERO3
from finetune.memory import ways_to_fit
from finetune.memory.memory_model import Run, Sizes, estimate

SIZES = Sizes.of(QWEN_7B)


def named(run: Run, free_gb: float, tokens: int = 2048, recompute: str = "") -> dict[str, float]:
    """{flags: GB}"""
    found = ways_to_fit.ways_to_fit(SIZES, run, tokens, free_gb * 1e9, recompute)
    assert all(ways_to_fit.fits(needs, free_gb * 1e9) for _, needs in found)
    return {flags: round(needs.peak / 1e9, 1) for flags, needs in found}


@pytest.mark.parametrize(
    "run, free_gb, flags",
    [
        (Run(0), 80, {"--bf16_weights --optim adamw_torch_8bit", "--use_lora", "--q_lora --quant nf4"}),
        (Run(0), 24, {"--use_lora", "--q_lora --quant nf4"}),
        (Run(0), 12, {"--q_lora --quant nf4"}),
        (Run(0), 4, set()),
        (Run(64), 16, {"--q_lora --quant nf4"}),
        (Run(64, packed=0.53), 4, set()),
        (Run(0, half=False), 30, {"--q_lora --quant nf4"}),  # without --bf16, --bf16_weights is refused
        (
            Run(0, engine=DDP, ranks=8),
            60,
            {"--deepspeed ds_config_zero3.json", "--deepspeed ds_config_zero2.json", "--deepspeed ds_config_zero3_offload.json",
             "--use_lora", "--q_lora --quant nf4"},
        ),
        (Run(0, engine=ZERO3, ranks=2), 24, {"--deepspeed ds_config_zero3_offload.json", "--use_lora"}),
        (Run(64, engine=ZERO2, ranks=2, packed=0.53), 4, set()),  # ZeRO-3 does not go over quantized weights
    ],
)  # fmt: skip
def test_what_fits_is_named_with_what_it_takes(run, free_gb, flags):
    assert set(named(run, free_gb)) == flags


def test_what_it_takes_is_the_changed_run():
    changed = dataclasses.replace(Run(0), rank=64, packed=ways_to_fit.NF4_BYTES)
    needs = estimate(SIZES, changed, 2048, SIZES.layers).peak / 1e9
    assert named(Run(0), 12) == {"--q_lora --quant nf4": round(needs, 1)}
    assert named(Run(0), 12, recompute="--gradient_checkpointing auto") == {
        "--q_lora --quant nf4 --gradient_checkpointing auto": round(needs, 1)
    }


def test_shorter_samples_where_they_are_what_is_too_much():
    run = Run(64, engine=ONE)
    free = estimate(SIZES, run, 5000, SIZES.layers).peak / 1e9 / ways_to_fit.USED
    assert named(run, free, tokens=32_000)["--model_max_length 4096"] < free
    assert ways_to_fit.longest_that_fits(SIZES, run, 4096, free * 1e9) == 2048  # shorter than what there is
    assert ways_to_fit.longest_that_fits(SIZES, run, 1, free * 1e9) is None


def test_recomputing_alone_may_do():
    run = Run(64)
    whole, least = (estimate(SIZES, run, 8192, again).peak / 1e9 for again in (0, 32))
    assert "--gradient_checkpointing auto" in named(run, (whole + least) / 2, 8192, "--gradient_checkpointing auto")
