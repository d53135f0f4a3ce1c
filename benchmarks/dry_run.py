"""How true --dry_run is on this machine: its memory, passes, steps and time beside those of the run itself.

    python benchmarks/dry_run.py                    # full and LoRA at three sizes, on the CPU: ten minutes
    python benchmarks/dry_run.py --sizes 64x2 --steps 2

A size is HIDDENxLAYERS of a model with the real vocabulary and random weights. Every case is trained for a few steps by finetune.py in a process of
its own; its log tells the peak (GB resident, or allocated on a GPU), the passes and the tokens a second.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"full": [], "LoRA": ["--use_lora"]}
LENGTHS = (40, 900)  # tokens of the samples, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["256x4", "512x8", "768x12"], metavar="HIDDENxLAYERS")
    parser.add_argument("--passes", nargs="+", type=int, default=[1024, 4096], metavar="TOKENS", help="--max_tokens_per_pass")
    parser.add_argument("--steps", type=int, default=4, metavar="N")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--look", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look is not None:
        return print(json.dumps(look(options.look)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        data.write_text(json.dumps(conversations(64)), encoding="utf-8")
        print(f"{'size':>8} {'method':>6} {'limit':>6} {'memory, GB':>22} {'passes a step':>14} {'seconds':>16}")
        for size in options.sizes:
            for method in METHODS:
                for limit in options.passes:
                    flags = [*METHODS[method], "--max_steps", options.steps, "--per_device_train_batch_size", options.samples]
                    rows.append(measure(Path(folder), data, size, method, flags, limit))
                    print(in_words(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def conversations(count: int) -> list[dict]:
    """Conversations of many lengths, from a seed."""
    random.seed(0)
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()

    def text(length: int) -> str:
        return " ".join(random.choices(words, k=length))

    found = []
    for _ in range(count):
        length = random.randint(*LENGTHS) // 2
        found.append({"conversations": [{"from": "user", "value": text(length // 4)}, {"from": "assistant", "value": text(length // 4)}]})
    return found


def measure(folder: Path, data: Path, size: str, method: str, flags: list, limit: int) -> dict:
    """One case: what --dry_run says, and what the run does."""
    model, out = folder / size, folder / "out"
    hidden, layers = map(int, size.split("x"))
    if not model.exists():
        heads = max(2, hidden // 64)
        run("-m", "qwen_model.new_checkpoint", model, "--hidden_size", hidden, "--layers", layers, "--heads", heads)
    command = [
        "-m", model, "-d", data, "-o", out, "--model_max_length", 1024,
        "--max_tokens_per_pass", limit, "--gradient_checkpointing", False, "--save_strategy", "no", "--overwrite_output_dir", *flags,
    ]  # fmt: skip
    said = json.loads(run(__file__, "--look", *command).splitlines()[-1])
    run(ROOT / "finetune.py", *command)
    lines = [json.loads(line) for line in (out / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "loss" in line]
    found = {
        "memory_gb": max(line["memory_gb"] for line in logged),
        "passes": [line["passes"] for line in logged],
        "steps": len(logged),
        "tokens_per_second": sum(line["tokens_per_second"] for line in logged[1:]) / (len(logged) - 1),
    }
    return {"size": size, "method": method, "limit": limit, "said": said, "found": found}


def run(*words) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"RANK": "0"})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stderr}")
    return done.stdout


def look(argv: list[str]) -> dict:
    """In a process of its own: what --dry_run computes, as numbers."""
    sys.path.insert(0, str(ROOT))
    from finetune.quiet import quiet

    quiet()
    from finetune.data import run_rows
    from finetune.flags import args as arguments
    from finetune.memory import memory_plan
    from finetune.steps import preparation

    args = arguments.parse([*argv, "--dry_run"])
    free = memory_plan.free_bytes(args)
    job = preparation.prepare(args, Path(args.training.output_dir), free=free)
    total = job.plan.total_steps(args.training.num_train_epochs, args.training.max_steps)
    steps = [job.plan.step(0, index) for index in range(min(total, job.plan.steps_per_epoch))]
    return {
        "memory_gb": job.memory.peak / 1e9,
        "passes": [len(step.passes[0]) for step in steps],
        "steps": total,
        "tokens_per_second": sum(step.tokens for step in steps) / run_rows.seconds(args, job)[0],
    }


def in_words(row: dict) -> str:
    said, found = row["said"], row["found"]
    memory = f"{said['memory_gb']:.2f} said, {found['memory_gb']:.2f} ({100 * (said['memory_gb'] / found['memory_gb'] - 1):+.0f} %)"
    passes = "as said" if said["passes"] == found["passes"] else f"{said['passes']} {found['passes']}"
    speed = f"{said['tokens_per_second'] / found['tokens_per_second']:.2f} of the speed said"
    return f"{row['size']:>8} {row['method']:>6} {row['limit']:>6} {memory:>22} {passes:>14} {speed:>16}"


if __name__ == "__main__":
    main()
