"""What finetune.py does with an output folder that another run, a damage or a stranger has been at."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import time

import pytest
import warm
from test_faults import ROOT, place, runs  # noqa: F401 (fixtures)

from finetune.writing import durable, run_lock


@pytest.mark.parametrize("engine", ["one", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("DDP", "ZeRO-2"))])
def test_a_second_run_in_the_same_folder_is_refused(runs, place, engine):  # noqa: F811
    out = place / f"two runs {engine}"
    words = [warm.python(), ROOT / "finetune.py", "-m", place / "base", "-d", place / "talks.json", "-o", out, "--use_cpu", "True"]
    words += ["--model_max_length", "256", "--num_train_epochs", "10000", "--save_strategy", "no"]
    own = {"FINETUNE_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([str(word) for word in words], env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not (out / "training_log.jsonl").exists():
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.1)
        before = sorted(out.iterdir())
        code, printed = runs.start("LoRA", engine, out, "--overwrite_output_dir")
        assert code == 2 and printed.count("error: ") == 1 and sorted(out.iterdir()) == before, printed
        owner = json.loads((out / run_lock.NAME).read_text())
        assert f"another run is at work there (process {owner['pid']} on {socket.gethostname()}, since {owner['since']})" in printed
    finally:
        first.kill()
        first.wait()


def test_a_damaged_checkpoint_is_passed_over(runs, place):  # noqa: F811
    """Through the whole program: the same end as a run that was never stopped."""
    runs.whole("LoRA", "one")
    out = place / "damaged"
    for step in (4, 6):
        shutil.copytree(place / "whole LoRA one" / f"checkpoint-{step}", out / f"checkpoint-{step}")
    content = bytearray((out / "checkpoint-6" / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "checkpoint-6" / "optimizer.pt").write_bytes(content)
    code, printed = runs.start("LoRA", "one", out, "--resume_from_checkpoint", "auto", number=10**6)
    assert code == 0, printed
    assert printed.count("checkpoint-6: optimizer.pt is damaged; going on from checkpoint-4") == 1, printed
    assert (out / "adapter_model.safetensors").read_bytes() == (place / "whole LoRA one" / "adapter_model.safetensors").read_bytes()
    assert durable.verify(out / "checkpoint-6") == []


class Payload:
    """Code that a pickle runs when it is read."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [False, True])
def test_a_planted_pickle_runs_no_code(runs, place, trusted):  # noqa: F811
    """A whole checkpoint of ZeRO-2, with a manifest that somebody made anew: not without --trust_checkpoint."""
    runs.whole("LoRA", "ZeRO-2")
    out, proof = place / f"planted {trusted}", place / f"code has run {trusted}"
    shutil.copytree(place / "whole LoRA ZeRO-2" / "checkpoint-4", out / "checkpoint-4")
    [planted] = out.glob("checkpoint-4/global_step*/*pp_rank_0_mp_rank_00_optim_states.pt")
    planted.write_bytes(pickle.dumps(Payload(proof)))
    (out / "checkpoint-4" / durable.MANIFEST).unlink()
    (out / "checkpoint-4" / "training.json").write_text((out / "checkpoint-4" / "training.json").read_text().replace('"manifest"', '"x"'))
    flags = ["--resume_from_checkpoint", "auto", *(["--trust_checkpoint"] if trusted else [])]
    code, printed = runs.start("LoRA", "ZeRO-2", out, *flags, number=10**6)
    assert proof.exists() == trusted, printed
    if not trusted:
        assert code == 2 and printed.count("error: ") == 1 and "ZeRO-2 reads it by unpickling" in printed, printed
