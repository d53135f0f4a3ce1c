"""Training, measured: method x size x length, beside what a user would pick instead, all in one run.

    python benchmarks/train.py                                                  # toy size: shows that it works, seconds
    python benchmarks/train.py --sizes 7B --methods lora --lengths 512 2048     # on a GPU
    python benchmarks/train.py --sizes 7B 1.8B --missing --save                 # the README's cells that no file has yet
    python benchmarks/train.py --sizes 7B --minutes 8 --checkpoints /dev/shm/checkpoints --save    # what is worth most, in little time

Random weights of the published sizes, samples filled with random tokens, all of them supervised, 8 samples a step as published. Ours
goes the way of finetune.py: its flags, its model, its trainer. Each cell has a process of its own, and running out of memory is
a result. What stands first in --sizes, --methods, --lengths and --ways is measured first, all four counting the same. --checkpoints keeps
the random weights (7B: 15 GB) for the next cells and programs. First the machine's ceiling is measured, the best of ten times: a bf16 product of 8192 x 8192 matrices on a GPU (float32, 2048 on a CPU).

s/step is the median after two steps to warm up. GB is the most that torch had allocated on the GPU, resident on a CPU. Utilization is
model FLOP over the ceiling: 4 a parameter and token under LoRA, 6 where all train; recomputing counts nothing (see cells.py).
--save writes train_MACHINE_DATE_N.json into benchmarks/results/, or the folder given, after every cell; table.py makes the README's tables of such files.
"""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cells  # noqa: E402
import provenance  # noqa: E402
from cells import LENGTHS, METHODS, OK, OOM, SIZES, WAYS, Cell  # noqa: E402

WARM_UP = 2
PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "bitsandbytes", "gptqmodel", "torchao",
            "liger-kernel", "trl", "flash-attn")  # fmt: skip


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(machine() if options.child == "machine" else child(options)))
        return
    begin = time.perf_counter()
    # in a process of its own too: what this one held of a GPU, no cell could have
    found = subprocess.run([sys.executable, __file__, "--child", "machine"], stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(found.stdout.splitlines()[-1]) | {"cells": []}
    wanted = chosen(options, report["about"]["machine"])
    report["cells"] = [vars(cell) | {"status": why} for cell in wanted if (why := cells.obstacle(cell))]
    wanted = [cell for cell in wanted if not cells.obstacle(cell)]
    path = free_name(report["about"], options.save) if options.save else None
    print(f"{report['about']['machine']}: {report['ceiling_tflops']:.1f} TFLOP/s at a large matrix product\n{HEADER}")
    print(*map(line, report["cells"]), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options.checkpoints = options.checkpoints or Path(folder)
        for number, cell in enumerate(wanted):
            if time.perf_counter() - begin > 60 * options.minutes:
                print(f"out of time: {len(wanted) - number} of {len(wanted)} cells are left")
                break
            report["cells"].append(measure(cell, report["ceiling_tflops"], options))
            print(line(report["cells"][-1]), flush=True)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"nargs": "+"}
    parser.add_argument("--sizes", choices=SIZES, default=["tiny"], **several)
    parser.add_argument("--methods", choices=METHODS, default=list(METHODS), **several)
    parser.add_argument("--lengths", type=int, default=None, metavar="N", help="tokens of a sample", **several)
    parser.add_argument("--ways", choices=WAYS, default=list(WAYS), help="trainers (default: all)", **several)
    parser.add_argument("--recompute", choices=("auto", "none", "all"), default=["auto"], help="which blocks", **several)
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="of a step")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help=f"timed ones, after {WARM_UP} to warm up")
    parser.add_argument("--flags", default="", metavar="FLAGS", help="for ours, more of finetune.py: --flags='--lora_r 16'")
    parser.add_argument("--missing", action="store_true", help="leave out what a file of this machine has")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="start no cell later than that")
    parser.add_argument("--timeout", type=float, default=500, metavar="S", help="seconds for a cell")
    add_checkpoints(parser)
    parser.add_argument(
        "--save", type=Path, nargs="?", const=cells.RESULTS, metavar="FOLDER", help="into benchmarks/results/, or another"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.lengths = options.lengths or ([64, 128] if options.sizes == ["tiny"] else LENGTHS)
    if options.save and options.sizes != ["tiny"] and (options.samples != 8 or options.flags):
        parser.error("--save keeps cells of 8 samples, without other flags: use --json")  # they would pass for the README's
    return options


def add_checkpoints(parser) -> None:
    """The flag --checkpoints, also of step_profile.py."""
    words = "where random weights are written, and kept; default: a folder that is deleted again"
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help=words)


def machine() -> dict:
    """What the cells are measured on and by."""
    return {"about": provenance.about(PACKAGES), "ceiling_tflops": ceiling_tflops()}


def chosen(options, here: str) -> list[Cell]:
    """The cells, what stands early in the lists first. here: the machine's name."""
    lists = options.sizes, options.methods, options.lengths, options.recompute, options.ways
    places = itertools.product(*(range(len(one)) for one in lists))
    found = [
        Cell(way, method, size, length, recompute)
        for place in sorted(places, key=sum)
        for size, method, length, recompute, way in [[one[at] for one, at in zip(lists, place)]]
    ]
    if options.missing:
        there = [cell for folder in {cells.RESULTS, options.save or cells.RESULTS} for cell in cells.stored(folder)]
        there = [cell for cell in there if cell["machine"] == here and cells.is_final(cell)]
        measured = {tuple(cell[name] for name in Cell.__dataclass_fields__) for cell in there}
        found = [cell for cell in found if cell.key() not in measured]
    return found


def free_name(about: dict, folder: Path) -> Path:
    """A file that is not there yet."""
    start = f"train_{provenance.file_name(about['machine'])}_{about['date']}"
    number = 1
    while (path := folder / f"{start}_{number}.json").exists():
        number += 1
    return path


def ceiling_tflops(tries: int = 10) -> float:
    """The machine's best at a large matrix product, of random numbers."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, place = (8192, "cuda") if on_gpu else (2048, "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=place, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        synchronize()
        begin = time.perf_counter()
        for _ in range(10 if on_gpu else 1):
            a @ b
        synchronize()
        best = min(best, (time.perf_counter() - begin) / (10 if on_gpu else 1))
    return 2 * size**3 / best / 1e12


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(cell: Cell, ceiling: float, options) -> dict:
    """The cell's figures, or in `status` why there are none. In a process of its own, and nothing beside it.

    (With the next cell's process starting meanwhile, a step of 2,048 tokens took 0.25 to 0.30 s on an H200 instead of 0.17.)
    """
    command = [sys.executable, __file__, "--child", json.dumps(vars(cell)), "--checkpoints", str(options.checkpoints)]
    command += [f"--flags={options.flags}", "--samples", str(options.samples), "--steps", str(options.steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return vars(cell) | {"status": f"took more than {options.timeout:.0f} s"}
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        print(done.stderr[-6000:], file=sys.stderr, flush=True)
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return vars(cell) | {"status": f"failed: {last[:300]}"}
    if found["status"] == OK:
        found |= cells.figures(cell, found["tokens"], found["supervised"], found["seconds"], ceiling)
    return vars(cell) | found


HEADER = f"{'trainer':13}{'method':12}{'size':6}{'tokens':>7}{'again':>7}{'GB':>8}{'s/step':>9}{'tokens/s':>10}{'use':>7}"


def line(cell: dict) -> str:
    """A row of the table on the terminal."""
    start = f"{cell['way']:13}{cell['method']:12}{cell['size']:6}{cell['length']:7}"
    if cell["status"] != OK:
        return f"{start}   {cell['status']}"
    return (
        f"{start}{cell['recomputed']:>7}{cell['memory_gb']:8.2f}{cell['seconds_per_step']:9.3f}"
        f"{cell['tokens_per_second']:10,.0f}{cell['utilization']:7.1%}"
    )


# ---- in the child process


def child(options) -> dict:
    """{status, and where that is OK: seconds, tokens, supervised, memory_gb, ...}"""
    import torch

    cell, begin = Cell(**json.loads(options.child)), time.perf_counter()
    tries = {"auto": ["auto"] if cell.way == "ours" else ["none", "all"]}.get(cell.recompute, [cell.recompute])
    for recompute in tries:  # what has no "auto" of its own computes again where it has to
        try:
            return {"status": OK} | tried(cell, recompute, options, begin)
        except torch.OutOfMemoryError:
            pass  # only behind this block is what the failed try held let go
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"status": OOM}


def tried(cell: Cell, recompute: str, options, begin: float) -> dict:
    """The measured run. begin: when the cell's process was told its cell."""
    with tempfile.TemporaryDirectory() as out:
        trainer, said = (ours if cell.way == "ours" else theirs)(cell, recompute, out, options)
        return timed(trainer, said | {"setup_seconds": time.perf_counter() - begin})


def timed(trainer, more: dict) -> dict:
    """Trains; the median step and the memory, and what is said in `more`."""
    import torch

    from finetune.memory.peak_memory import memory_gb

    clock = stopwatch()
    trainer.add_callback(clock)
    trainer.train()
    on_gpu = torch.cuda.is_available()
    reserved = torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None
    seconds = statistics.median(clock.seconds[WARM_UP:])
    return {"seconds": seconds, "memory_gb": memory_gb(), "reserved_gb": reserved, **more}


def stopwatch():
    """A callback that takes the time of each step, waiting for the GPU at its ends only."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self):
            self.seconds, self.begin = [], 0.0

        def on_step_begin(self, *args, **kwargs):
            synchronize()
            self.begin = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            synchronize()
            self.seconds.append(time.perf_counter() - self.begin)

    return Stopwatch()


def ours(cell: Cell, recompute: str, out: str, options):
    """(this toolkit's trainer, what is to be said of the run)."""
    import torch
    from checkpoints import random_checkpoint
    from filled import Filled

    from finetune.flags import args as arguments
    from finetune.memory import memory_plan
    from finetune.model import loading
    from finetune.steps import activation_checkpointing
    from finetune.steps.plan import Plan
    from finetune.steps.trainer import PlannedTrainer

    flags, stored = METHODS[cell.method]
    folder = random_checkpoint(options.checkpoints / f"{cell.size}_{stored}", cell.size, stored)
    steps = WARM_UP + options.steps
    precision = "--bf16" if torch.cuda.is_available() else "--use_cpu"
    if cell.method == "full_bf16":
        precision += " --bf16"
    words = f"{flags} {precision} --max_steps {steps} --weight_decay 0.1 --adam_beta2 0.95 --save_strategy no --disable_tqdm True"
    words += f" --gradient_checkpointing { {'none': False, 'all': True}.get(recompute, 'auto')} {options.flags}"
    args = arguments.parse([*words.split(), "-m", str(folder), "-o", out])
    assert not args.findings, args.findings
    samples = Filled(cell.length, options.samples * steps, SIZES[cell.size][3])
    together = options.samples * cell.length
    memory = memory_plan.resolve_auto(args, folder, cell.length, together, memory_plan.free_bytes(args))
    limit = args.data.max_tokens_per_pass
    plan = Plan(samples.lengths, samples.supervised, samples_per_step=options.samples, max_tokens_per_pass=limit)
    tokenizer = loading.load_tokenizer(folder)
    loaded = loading.load_model(folder, tokenizer, args.lora, args.training)
    trainer = PlannedTrainer(loaded, args.training, samples=samples, plan=plan, tokenizer=tokenizer)
    activation_checkpointing.install(trainer, args.training.recomputed_blocks, memory)
    largest = max(len(one) for rank in plan.step(0, 0).passes for one in rank) * cell.length
    return trainer, {
        "tokens": together, "supervised": together - options.samples, "tokens_per_pass": largest,
        "recomputed": f"{memory.recomputed}/{memory.layers}", "predicted_gb": memory.peak / 1e9,
    }  # fmt: skip


def theirs(cell: Cell, recompute: str, out: str, options):
    """As ours(), for a yardstick."""
    import torch
    import yardsticks

    steps, again = WARM_UP + options.steps, recompute == "all"
    on_gpu = torch.cuda.is_available()
    trainer, at_once = yardsticks.trainer_of(cell, out, options.samples, steps, again, on_gpu)
    layers, together = SIZES[cell.size][0], options.samples * cell.length
    return trainer, {
        "tokens": together, "supervised": together - options.samples, "tokens_per_pass": at_once * cell.length,
        "recomputed": f"{layers if again else 0}/{layers}", "predicted_gb": None,
    }  # fmt: skip


if __name__ == "__main__":
    main()
