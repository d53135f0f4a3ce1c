"""What a training step does on a GPU, counted without one: device.py, recorder.py; steps.py runs the cases below.

Counted, for 7B's width with 4 layers (once with all): waits of the host, launches, bytes, FLOP and memory of the third step. A
change that makes a step dearer turns a limit red; one that makes it cheaper lowers the limit.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from device import build  # noqa: E402

HERE = Path(__file__).parent
LORA = "--use_lora --lora_r 64 --lora_dropout 0.05 --train_embeddings"
FLASH, SAMPLES = "_varlen_attn", "_scaled_dot_product_efficient_attention"
# name: (the case, limits of one pass of the third step: launches, GB moved)
CASES = {
    "LoRA": ({"layers": 32, "flags": f"--bf16 {LORA} none"}, 4527, 576.65),
    "LoRA without dropout": ({"flags": "--bf16 --use_lora --lora_r 64 --lora_dropout 0 --train_embeddings none"}, 676, 113.15),
    "LoRA and chat rows": ({"flags": f"--bf16 {LORA} chat_rows", "length": 256}, 743, 37.52),
    "LoRA and embeddings": ({"flags": f"--bf16 {LORA} all"}, 904, 394.4),
    "LoRA, blocks computed again": ({"flags": f"--bf16 {LORA} none --gradient_checkpointing True"}, 945, 148.66),
    "LoRA on an A100": ({"gpu": [8, 0], "flags": f"--bf16 {LORA} none"}, 775, 123.87),
    "LoRA on an RTX 5090": ({"gpu": [12, 0], "flags": f"--bf16 {LORA} none"}, 775, 123.87),
    "LoRA on a T4": ({"gpu": [7, 5], "tokens": 4096, "flags": f"--fp16 {LORA} none"}, 1308, 134.31),
    "LoRA, torch without varlen": ({"varlen": False, "flags": f"--bf16 {LORA} none"}, 811, 126.55),
    "Q-LoRA over GPTQ": ({"stored": "gptq", "flags": f"--bf16 --q_lora {LORA} none"}, 822, 129.44),
    "full": ({"flags": "--bf16", "tokens": 16384}, 959, 721.86),
    "full, several passes": ({"flags": "--bf16"}, 614, 387.47),
    "full, bf16 weights": ({"flags": "--bf16 --bf16_weights --optim adamw_torch_8bit"}, 591, 214.42),
    "Qwen2, LoRA": ({"family": "qwen2", "flags": f"--bf16 {LORA} none"}, 1065, 136.88),
    "Qwen3, LoRA": ({"family": "qwen3", "flags": f"--bf16 {LORA} none"}, 1081, 138.57),
    "Qwen3, full": ({"family": "qwen3", "flags": "--bf16"}, 1054, 446.72),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What was recorded, by the case's name."""
    library = build(tmp_path_factory.mktemp("device"))
    cases = [{"layers": 4} | case for case, *_ in CASES.values()]
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "steps.py", library, json.dumps(cases)]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES), done.stderr
    found = {name: json.loads(line) for name, line in zip(CASES, lines)}
    assert not any("failed" in one for one in found.values()), done.stderr
    return found


def of_step(found: dict, what: str) -> float:
    """A sum over the operators of the third step's passes, of each pass."""
    return sum(work[what] for work in found["work"]["step 3"].values()) / found["passes"]


@pytest.mark.parametrize("name", CASES)
def test_the_host_never_waits_for_the_device(recorded, name):
    """From the second step on, whose first one loads; behind the last one, transformers reads the sum of all losses."""
    waits = recorded[name]["waits"]
    found = [line for phase in ("step 2", "optimizer 2", "behind 2", "step 3", "optimizer 3") for line in waits.get(phase, ())]
    if name == "full, bf16 weights":  # torchao keeps the learning rate on the device, and transformers reads it for the log
        found = [line for line in found if "last_lr" not in line]
    assert not found


@pytest.mark.parametrize("name", CASES)
def test_the_memory_that_lives_is_what_the_model_says(recorded, name):
    """Without what the allocator wastes and CUDA itself takes.

    The 8-bit optimizer's state is wrapped in tensors whose storages, of the full size, are no memory, and are counted here: that
    run is looked at in its first step, before there is a state.
    """
    found, computed = recorded[name], recorded[name]["computed"]
    step, state = ("step 1", computed["optimizer"]) if name == "full, bf16 weights" else ("step 3", 0)
    slack = computed["activations"] * (1 - 1 / 1.06)
    expected = computed["peak"] - computed["libraries"] - slack - state
    assert found["peaks"][step] / expected == pytest.approx(1, abs=0.05)
    assert found["live"] <= computed["weights"] * 1.01


@pytest.mark.parametrize("name", CASES)
def test_a_pass_costs_no_more_than_before(recorded, name):
    _, launches, moved = CASES[name]
    found = of_step(recorded[name], "launches"), of_step(recorded[name], "bytes") / 1e9
    assert found[0] <= launches and found[1] <= moved * 1.001, f"{found[0]:.0f} launches, {found[1]:.2f} GB"
    assert found[0] > 0.98 * launches and found[1] > 0.98 * moved, f"lower the limits: {found[0]:.0f} launches, {found[1]:.2f} GB"


@pytest.mark.parametrize("name", CASES)
def test_the_work_is_what_the_method_needs(recorded, name):
    """Products of 2 FLOP a weight and token forward, 2 for the input's gradient, 2 for a weight's where it trains, and no more."""
    found, (case, *_) = recorded[name], CASES[name]
    assert not found["frozen with gradient"]
    products = sum(found["work"]["step 3"].get(kind, {"flop": 0})["flop"] for kind in ("mm", "addmm", "addmm_"))
    tokens = case.get("length", 2048) * 8
    weights = products / tokens / 2
    blocks, head = found["matrices"], found["head"]
    if "--use_lora" not in case["flags"]:
        expected = 3 * (blocks + head)
    else:
        again = 1 if "--gradient_checkpointing True" in case["flags"] else 0
        expected = (2 + again) * blocks + 2 * head + (3 + again) * found["adapters"]
        if "none" in case["flags"] and not again:  # transformers asks for it where blocks are computed again
            expected -= found["first"]  # nobody asks for the gradient of frozen embeddings
        elif "all" in case["flags"]:
            expected += head
    assert weights / expected == pytest.approx(1, abs=0.002)


def test_each_device_gets_the_attention_that_it_can_run(recorded):
    for name, (case, *_) in CASES.items():
        work = recorded[name]["work"]["step 3"]
        own, other = (SAMPLES, FLASH) if case.get("gpu") == [7, 5] or case.get("varlen") is False else (FLASH, SAMPLES)
        assert own in work and f"{own}_backward" in work and other not in work, name
        assert any(kind.startswith("triton") for kind in work) == (case.get("gpu") != [7, 5]), name
