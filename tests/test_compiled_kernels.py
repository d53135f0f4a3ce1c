"""All Triton kernels become machine code for every GPU that people train on, without that GPU; the interpreter does not show it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KIB = 1024
# compute capability: bytes of shared memory that a program may ask for, the types that are compiled, GPUs
GPUS = {
    75: (64 * KIB, ("fp16",), "T4, RTX 20; on_triton.py does not use kernels there yet"),
    80: (163 * KIB, ("bf16", "fp32"), "A100"),
    86: (99 * KIB, ("bf16",), "A10, RTX 30"),
    89: (99 * KIB, ("bf16",), "L4, L40, RTX 40"),
    90: (227 * KIB, ("bf16", "fp16", "fp32"), "H100, H200"),
    100: (227 * KIB, ("bf16",), "B200"),
    120: (99 * KIB, ("bf16",), "RTX 50"),
}
LAUNCHES = 29  # that differ, of one type; and the trial, which has none
# Bytes that registers of a thread spill to. The int8 cache's attention keeps eight of them out of its loop, on some GPUs.
SPILLED = {"attend_kernel": 32}


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_every_kernel_compiles_and_does_not_spill(capability, tmp_path):
    shared, types, _ = GPUS[capability]
    own = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    own.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name("compiled_kernels.py"), str(capability), *types]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == LAUNCHES * len(types) + 1, len(found)
    for one in found:
        assert one["shared"] <= shared, one
        assert capability == 75 or one["spilled"] <= SPILLED.get(one["kernel"], 0), one
        # it rounds where torch rounds: a fused multiply-add would round once for twice
        assert one["kernel"] != "write_kernel" or one["fused multiply-adds"] == 0, one


def test_no_length_of_a_row_makes_another_program():
    """Triton compiles anew for a number that is 1, or a multiple of 16, unless it is told not to: for some steps in mid-run, a second each."""
    code = "import compiled_kernels as c; one = c.programs([4096]); print(one == c.programs(range(1, 70)) and len(one))"
    own = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert done.stdout.strip() == "16", done.stdout + done.stderr
