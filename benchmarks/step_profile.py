"""Where a training step's time and memory go.

    python benchmarks/step_profile.py                                            # toy size, on this machine
    python benchmarks/step_profile.py --size 7B --method lora --length 2048 --trace trace.json
    python benchmarks/step_profile.py --recompute all --operators 20

(Not profile.py: standing beside the other programs, it would hide the standard library's module of that name.)

One cell of train.py, set up the same way (and with its checkpoints), a few steps under torch's profiler. Each operator's own time goes to the
part of the model that called it, forward and backward; on a GPU it is the time of its kernels, and "nothing" is when none ran. The
trace is for chrome://tracing or https://ui.perfetto.dev.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from cells import METHODS, SIZES, Cell  # noqa: E402

OTHER, NOTHING = "other", "nothing"
NO_WORK = "Command Buffer Full"  # what the profiler calls waiting for room to launch in: not a kernel, and the GPU is busy meanwhile
# part: what an operator's name, or that of one of those that called it, contains
PARTS = {
    "attention": ("scaled_dot_product", "ScaledDotProduct", "varlen", "flash_attn", "FlashAttn", "efficient_attention"),
    "norms, rotary, gate": ("RMSNorm", "RotatedHeads", "Gated"),
    "LoRA": ("DroppedProduct", "AddedProduct", "LoraLinear"),
    "head and loss": ("HeadLoss",),
    "quantized layers": ("Unpacked", "MatMul4Bit", "dequantize"),
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad", "clip_grad"),
    "embedding": ("aten::embedding", "EmbeddingBackward"),
    "data": ("DataLoader",),
    "linear layers": ("aten::linear",),  # also where LoRA's step of autograd calls it
}
# matrix products that none of these parts called
REST = {"linear layers": ("AddmmBackward", "MmBackward", "LinearBackward", "aten::addmm", "aten::mm")}


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
        options.checkpoints = options.checkpoints or Path(folder)
        cell = Cell("ours", options.method, options.size, options.length, options.recompute)
        trainer, said = train.ours(cell, options.recompute, out, options)
        found = profiled(trainer, options)
    report = {"cell": vars(cell), **said, **found}
    print(table(report, options.operators))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a sample")
    parser.add_argument("--recompute", choices=("auto", "none", "all"), default="auto")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="of a step")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help=f"profiled ones, after {train.WARM_UP}")
    parser.add_argument("--flags", default="", metavar="FLAGS", help="more of finetune.py: --flags='--lora_r 16'")
    parser.add_argument("--operators", type=int, default=10, metavar="N", help="how many to list")
    train.add_checkpoints(parser)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the profiler's trace here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser.parse_args()


def profiled(trainer, options) -> dict:
    """Trains, the last steps under the profiler; {seconds of a step, by part, by operator, GB by kind}."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    watch = watcher(profile(activities=activities, acc_events=True))
    trainer.add_callback(watch)
    trainer.train()
    if options.trace:
        watch.profiler.export_chrome_trace(str(options.trace))
    events, steps = [event for event in watch.profiler.events() if event.name != NO_WORK], options.steps
    parts = by_part(events, on_gpu, steps)
    parts[NOTHING] = max(watch.seconds / steps - sum(parts.values()), 0.0)
    return {
        "seconds": watch.seconds / steps,
        "parts": largest(parts),
        "operators": by_operator(events, on_gpu, steps),
        # what the CPU was at, also waiting: where "nothing" is large, that is what the GPU waited for
        "host": by_operator(events, False, steps) if on_gpu else {},
        "memory_gb": watch.memory,
    }


def largest(seconds: dict[str, float], count: int = 50) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1])[:count])


def by_operator(events, on_gpu: bool, steps: int) -> dict[str, float]:
    """{name: seconds a step}, the largest"""
    found: dict[str, float] = {}
    for event in events:
        found[event.name] = found.get(event.name, 0.0) + own_seconds(event, on_gpu) / steps
    return largest(found)


def own_seconds(event, on_gpu: bool) -> float:
    """Of an operator itself, without those that it called. On a GPU, of the kernels that it launched."""
    return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6


def by_part(events, on_gpu: bool, steps: int) -> dict[str, float]:
    """{part: seconds a step}"""
    found: dict[str, float] = {}
    for event in events:
        if on_gpu and str(event.device_type).endswith("CUDA"):
            continue  # a kernel by itself: its time is counted where it was launched
        found[part_of(event)] = found.get(part_of(event), 0.0) + own_seconds(event, on_gpu) / steps
    return found


def part_of(event) -> str:
    """The part that the operator, or the innermost of its callers that has one, belongs to."""
    callers = []
    while event is not None:
        callers.append(event.name)
        event = event.cpu_parent
    for parts in (PARTS, REST):
        for called in callers:
            for part, names in parts.items():
                if any(name in called for name in names):
                    return part
    return OTHER


def watcher(profiler):
    """A callback that profiles the steps after the warm-up and takes stock of the memory."""
    import torch
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self):
            self.profiler, self.done, self.memory = profiler, 0, {}

        def on_step_begin(self, *args, **kwargs):
            if self.done == train.WARM_UP:
                train.synchronize()
                self.profiler.start()
                self.begin = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.memory["gradients"] = gigabytes(p.grad for p in model.parameters() if p.grad is not None)

        def on_step_end(self, *args, **kwargs):
            self.done += 1

        def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            train.synchronize()
            self.seconds = time.perf_counter() - self.begin
            self.profiler.stop()
            from finetune.memory.peak_memory import memory_gb

            states = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
            self.memory["weights"] = gigabytes([*model.parameters(), *model.buffers()])
            self.memory["optimizer"] = gigabytes(states)
            rest = memory_gb() - sum(self.memory.values())
            self.memory["activations" if torch.cuda.is_available() else "all else, Python too"] = rest

    return Watcher()


def gigabytes(tensors) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / 1e9


def table(report: dict, operators: int) -> str:
    """For people."""
    cell, seconds = report["cell"], report["seconds"]
    lines = [
        f"{cell['method']}, {cell['size']}, samples of {cell['length']} tokens, passes of {report['tokens_per_pass']:,}, "
        f"{report['recomputed']} blocks computed again: {seconds:.3f} s a step (profiled)",
        "",
    ]
    lines += [f"  {part:22}{value * 1e3:10.1f} ms{value / seconds:7.1%}" for part, value in report["parts"].items()]
    lines += ["", "  GB at the peak: " + ", ".join(f"{name} {size:.2f}" for name, size in report["memory_gb"].items()), ""]
    for title, found in (("", report["operators"]), ("\n  on the host", report["host"])):
        shown = list(found.items())[:operators]
        lines += ([title] if title and shown else []) + [f"  {value * 1e3:10.1f} ms  {name[:90]}" for name, value in shown]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
