"""A kernel that is wrong on this machine is found before the first step, and the run goes on without it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from finetune.model import kernels
from qwen_model import on_triton

CPU = torch.device("cpu")
NAMES = {"norm", "rotary", "gate", "head", "dropout"}


@pytest.fixture(scope="module")
def done():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    command = [sys.executable, str(Path(__file__).parent.parent / "interpreted_checks.py")]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)


@pytest.fixture
def told(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_right_kernels_pass_in_each_type(told):
    assert len(told["right"]) == 3
    for found in told["right"].values():
        assert found == dict.fromkeys(NAMES, "")


@pytest.mark.parametrize("kernel", sorted(NAMES))
def test_a_wrong_one_is_found_and_no_other(told, kernel):
    assert list(told["wrong"][kernel]) == [kernel]


def test_the_run_goes_on_with_plain_torch(told, done):
    assert told["off"] == ["gate"]
    assert told["switched"] == pytest.approx(told["plain"], rel=1e-5) and told["good"] == pytest.approx(told["plain"], rel=1e-5)
    assert told["untested"] != pytest.approx(told["plain"], rel=1e-5)  # so that the losses tell
    assert "warning: the kernel of the MLP's gate is wrong on this machine (result 0 differs by 0.05 of its largest" in done.stderr
    assert "plain torch does it, and the run goes on - please report it, with the kernels in training.json" in done.stderr
    assert set(told["record"]["kernels"]) == NAMES == set(told["good record"]["kernels"])
    assert told["record"]["kernels"]["gate"]["verdict"].startswith("result 0 differs")
    assert told["good record"]["kernels"]["gate"]["verdict"] == "equals plain torch"
    assert "self-tests passed" in done.stderr and "): kernels, causality, packing" in done.stderr


def test_without_a_gpu_there_is_nothing_to_check():
    assert kernels.check_all(CPU, torch.float32, kernels.Sizes(8, 8, 8)) == []


def test_a_kernel_that_raises_an_error_is_wrong():
    def cases(sizes, random):
        if "mine" not in on_triton.switched_off:
            raise RuntimeError("no such instruction\nmore")
        return [("result", random.normal(2))]

    found = kernels.check(kernels.Kernel("mine", "a test", cases), CPU, torch.float32, None)
    assert found.why == "RuntimeError: no such instruction" and found.as_record()["error"] == "not finite"
    assert "mine" not in on_triton.switched_off


@pytest.mark.parametrize("got", [[1.0, math.nan], [1.0, math.inf], [1.0], [1.0, 2.5]])
def test_what_is_no_number_of_another_shape_or_another_type_differs(got):
    want = torch.tensor([1.0, 2.0])
    assert kernels.difference(torch.tensor(got), want) >= 0.25
    assert kernels.difference(want, want) == 0 and kernels.difference(want.half(), want) == math.inf


class Layer(torch.nn.Module):
    """As a GPTQ layer: unpacked by a kernel unless it is switched off."""

    bits = 4

    def __init__(self, off: float):
        super().__init__()
        self.off = off
        self.register_buffer("qweight", torch.arange(8))

    def unpack(self, dtype):
        return self.qweight.to(dtype) + (0 if "gptq" in on_triton.switched_off else self.off)


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_the_kernel_of_gptq_layers_is_tried_on_a_layer_of_the_model(off):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Layer(off))
    model.config = tiny_model().config
    sizes, kernel = kernels.Sizes.of(model), next(one for one in kernels.KERNELS if one.name == "gptq")
    assert kernel.applies(sizes) and not kernel.applies(kernels.Sizes.of(tiny_model()))
    assert bool(kernels.check(kernel, CPU, torch.float32, sizes).why) == bool(off)
