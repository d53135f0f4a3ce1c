"""What trains beside plain LoRA, on one process, DDP, ZeRO-2 and ZeRO-3: the same losses and the same weights."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm
from tiny import later_model, tiny_model

SCRIPT = Path(__file__).parent.parent / "steps_on_ranks.py"
METHODS = {"biases and dora": {"rows": [3, 151], "lora_bias": "all", "use_dora": True}}
LATER = {"rows": {"rows": [3, 151]}}
# what test_engines.py does not launch through the scripts
CELLS = [("biases and dora", "base"), ("rows", "later")]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """steps(engine, method) -> {losses, values}; on two ranks, but for engine "one" """
    place = tmp_path_factory.mktemp("ranks")
    tiny_model().save_pretrained(place / "base")
    later_model("qwen2", tied=True).save_pretrained(place / "later")
    done = {}

    def run(engine: str, method: str, base: str = "base") -> dict:
        if (engine, method, base) not in done:
            out = place / f"{engine} {method} {base}.json"
            launch = [] if engine == "one" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command = [
                warm.python(),
                *launch,
                str(SCRIPT),
                str(place / base),
                engine,
                json.dumps((METHODS | LATER)[method]),
            ]
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            ran = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True, timeout=300)
            assert ran.returncode == 0, ran.stderr[-3000:]
            done[engine, method, base] = json.loads(out.read_text())
        return done[engine, method, base]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method,base", CELLS)
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_the_same_on_every_engine(steps, engine, method, base):
    """base "later": a Qwen2 whose head is its embedding."""
    expected, found = steps("one", method, base), steps(engine, method, base)
    if base == "base":  # on random tokens, rows of a frozen tied matrix have nothing to learn from
        assert expected["losses"][-1] < expected["losses"][0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["values"] == pytest.approx(expected["values"], rel=1e-4, abs=1e-4)
