"""Self-tests on two ranks: a leak is found. Under ZeRO-3 there are none."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm
from tiny import tiny_later_qwen

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
TORCHRUN = ROOT / "finetune" / "distributed" / "torchrun.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(script, flags) -> (exit code, what was printed, output folder) of three steps on two ranks, in several passes each."""
    place = tmp_path_factory.mktemp("self-tests")
    tiny_later_qwen(place / "base")
    talks = [[{"from": "user", "value": f"a {i}"}, {"from": "assistant", "value": f"{2 * i}. " * (i % 4 + 1)}] for i in range(12)]
    (place / "talks.json").write_text(json.dumps([{"conversations": turns} for turns in talks]))

    def once(script: Path, *flags: str):
        out = place / f"out{len(list(place.iterdir()))}"
        words = ["-m", place / "base", "-d", place / "talks.json", "-o", out, "--max_steps", "3", "--save_strategy", "no", "--use_cpu", "True"]
        words += ["--per_device_train_batch_size", 6, "--max_tokens_per_pass", "150", "--learning_rate", "1e-2", "--logging_steps", "1"]
        words += ["--model_max_length", "128", *flags]
        own = {"FINETUNE_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
        command = [str(word) for word in [warm.python(), TORCHRUN, "--nproc_per_node", 2, script, *words]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 120}
        done = subprocess.run(command, env=os.environ | own, cwd=place, **pipes)
        return done.returncode, done.stdout, out

    return once


ZERO3 = ["--deepspeed", ROOT / "finetune" / "ds_config_zero3.json"]


def test_zero3_has_none(run):
    code, printed, out = run(ROOT / "finetune.py", *ZERO3, "--eval_data_path", "talks.json", "--eval_strategy", "steps", "--eval_steps", "2")
    assert code == 0 and "self-tests passed" not in printed and (out / "model.safetensors").exists(), printed


def test_a_leak_is_found(run):
    code, printed, out = run(ROOT / "tests" / "leaky_run.py")
    assert code == 1 and printed.count("error:") == 1 and "error: self-test causality: " in printed, printed
    assert not (out / "model.safetensors").exists()
