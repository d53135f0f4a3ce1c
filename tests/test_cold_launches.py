"""Each script and each program is launched cold at least once, so that an import which is missing shows (see warm.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quantizing import model_to_quantize
from tiny import small_checkpoint, tiny_gptq

ROOT = Path(__file__).parent.parent
QUICKSTART = "quickstart.sh"  # which .ci/run runs
# What is launched cold, and by which test. A script's name ends in .sh; a program is called by its file or its package.
COLD = {
    "finetune": QUICKSTART,
    "new_checkpoint": QUICKSTART,
    "ask": QUICKSTART,
    "merge": QUICKSTART,
    "finetune_lora_single_gpu.sh": QUICKSTART,
    "setup_env.sh": QUICKSTART,
    "finetune_full_single_gpu.sh": "test_the_whole_circle",
    "finetune_qlora_single_gpu.sh": "test_the_whole_circle",
    "finetune_ds.sh": "test_a_script_for_several_gpus",
    "finetune_lora_ds.sh": "test_a_script_for_several_gpus",
    "finetune_qlora_ds.sh": "test_a_script_for_several_gpus",
    "torchrun": "test_a_script_for_several_gpus",
    "dies_with_parent": "test_a_worker_dies_with_its_agent",
    "refresh": "test_the_refreshed_folder_answers_by_itself",
    "run_gptq": "test_quantizing_comparing_exporting",
    "compare": "test_quantizing_comparing_exporting",
    "export": "test_quantizing_comparing_exporting",
    "data": "test_a_look_at_a_file",
    "dry_run": "test_a_dry_run_says_what_the_run_takes",
    "cpu_step": "test_a_cpu_step_is_ten_times_as_fast_in_a_fifth_of_the_memory",
    "kv_cache": "test_the_kv_cache_benchmark_runs_on_a_cpu",
    "memory": "test_memory_counts_the_bundled_model",
    "rendering": "test_all_three_parts",
    "step_profile": "test_where_the_time_of_a_step_goes",
    "table": "test_the_readme_is_what_the_files_say",
    "train": "test_a_run_at_toy_size",
    "on_a_gpu.sh": "test_on_a_gpu_gives_every_program_flags_that_it_takes",
}


def programs() -> set[str]:
    """All that a person can start, by name."""
    found = {path.name for path in [ROOT / "setup_env.sh", *ROOT.glob("benchmarks/*.sh"), *ROOT.glob("finetune/finetune_*.sh")]}
    folders = [path for name in ("finetune", "qwen_model", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    for path in [*ROOT.glob("*.py"), *folders]:
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            found.add(path.parent.name if path.name == "__main__.py" else path.stem)
    return found


def test_each_has_one():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert set(COLD) == programs()
    for name, place in COLD.items():
        if place == QUICKSTART:
            words = [name] if name.endswith(".sh") else [f"-m finetune.{name} ", f"-m qwen_model.{name} ", f" {name}.py "]
            assert any(word in (ROOT / place).read_text() for word in words), f"{name}: {place} does not start it"
        else:
            _, there, body = tests.partition(f"\ndef {place}(")
            assert there and "warm.python" not in body.partition("\n\n\n")[0], f"{name}: no cold launch in {place}"


def launch(*words, **environment) -> str:
    """Runs a command to its end, and returns what it printed."""
    settings = os.environ | {"FINETUNE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | environment
    done = subprocess.run([*map(str, words)], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def talks(folder: Path) -> Path:
    turns = [{"from": "user", "value": "Who are you?"}, {"from": "assistant", "value": "I am a small model."}]
    path = folder / "talks.json"
    path.write_text(json.dumps([{"conversations": turns}] * 8))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name, files", [
    ("finetune_ds.sh", {"config.json", "model.safetensors"}),
    ("finetune_lora_ds.sh", {"adapter_config.json", "adapter_model.safetensors"}),
    ("finetune_qlora_ds.sh", {"adapter_config.json", "adapter_model.safetensors"}),
])  # fmt: skip
def test_a_script_for_several_gpus(tmp_path, name, files):
    """As it stands, on one process, for one step."""
    if "qlora" in name:
        tiny_gptq(tmp_path / "model", 4)
    else:
        small_checkpoint(tmp_path / "model")
    words = ["-m", tmp_path / "model", "-d", talks(tmp_path), "-o", tmp_path / "out", "--max_steps", "1"]
    launch("bash", ROOT / "finetune" / name, *words)
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_quantizing_comparing_exporting(tmp_path):
    model, data = model_to_quantize(tmp_path / "model"), talks(tmp_path)
    launch(sys.executable, "run_gptq.py", "-m", model, "-d", data, "-o", tmp_path / "Int4", "--samples", "4", "--group-size", "32")
    launch(sys.executable, "-m", "finetune.export", tmp_path / "Int4", tmp_path / "exported", "--to", "qwen2")
    told = launch(sys.executable, "-m", "finetune.compare", model, tmp_path / "Int4", "--data_path", data)
    assert "perplexity" in told and (tmp_path / "exported" / "config.json").is_file()


def test_a_look_at_a_file(tmp_path):
    told = launch(sys.executable, "-m", "finetune.data", talks(tmp_path), FINETUNE_CACHE=str(tmp_path / "cache"))
    assert "I am a small model." in " ".join(told.split()) and "samples    8" in told
