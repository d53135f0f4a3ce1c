"""The data side: how fast conversations become tokens, in how much memory, and how soon a second start trains.

    python benchmarks/rendering.py                       # all three, some minutes
    python benchmarks/rendering.py --data YOUR.json      # your conversations for the first
    python benchmarks/rendering.py --parts speed
    python benchmarks/rendering.py --parts speed --model Qwen3-8B    # through a later Qwen's chat template

speed   rendered_samples.load on an empty cache (reading, checking, rendering, writing) beside tiktoken's own encode_ordinary_batch over
        the same texts with as many threads, in turns; the ratio of the medians. The file is repeated, with a number behind each
        text, up to 20 MB. To reach: 1.25. With --model, the folder of a later Qwen, its own tokenizer is what it stands beside.
memory  The peak resident memory of a process that loads --conversations of them (default 1,000,000). To reach: 2 GB.
start   finetune.py on 200,000 conversations that an earlier start has rendered: seconds from the end of the imports to the end of the
        first optimizer step of a tiny model. To reach: 5.
"""

import argparse
import itertools
import json
import os
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import provenance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from qwen_model.new_checkpoint import new_checkpoint  # noqa: E402

PARTS = ("speed", "memory", "start")
TURNS = 5  # of each in the race


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "conversations.json", help="for speed")
    parser.add_argument("--model", type=Path, help="for speed: a folder with the tokenizer of a later Qwen")
    parser.add_argument("--multi_turn", default="unroll", help="for speed")
    parser.add_argument("--megabytes", type=float, default=20, metavar="MB", help="of the file for speed")
    parser.add_argument("--conversations", type=int, default=1_000_000, metavar="N", help="for memory")
    parser.add_argument("--rendered", type=int, default=200_000, metavar="N", help="conversations for start")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--child", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        part, folder = options.child
        print(json.dumps(CHILDREN[part](Path(folder), options)))
        return
    figures = {}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            figures[part] = run_part(part, Path(folder), options)
        print(LINES[part].format(**figures[part]), flush=True)
    if options.json:
        packages = ("tiktoken", "numpy", "torch", "transformers")
        told = {"about": provenance.about(packages), "data": options.data.name}
        options.json.write_text(json.dumps(told | figures, indent=2) + "\n", encoding="utf-8")


LINES = {
    "speed": "speed:  {ours:.2f} s for {megabytes:.1f} MB, {conversations:,} conversations, {tokens:,} tokens; "
    "the tokenizer alone {alone:.2f} s; ratio {ratio:.2f}",
    "memory": "memory: {peak_gb:.2f} GB at the peak for {conversations:,} conversations, {tokens:,} tokens ({seconds:.0f} s)",
    "start": "start:  {seconds:.1f} s from the imports to the end of the first step, {conversations:,} conversations rendered before",
}


def run_part(part: str, folder: Path, options) -> dict:
    """The part's figures, measured in a process of its own."""
    new_checkpoint(folder / "model", hidden_size=16, heads=2)
    environment = os.environ | {"FINETUNE_CACHE": str(folder / "cache"), "TRANSFORMERS_VERBOSITY": "error"}

    def child(name: str) -> dict:
        command = [sys.executable, __file__, "--child", name, str(folder), "--data", str(options.data)]
        command += ["--megabytes", str(options.megabytes), "--conversations", str(options.conversations)]
        command += ["--rendered", str(options.rendered), "--multi_turn", options.multi_turn]
        command += ["--model", str(options.model)] if options.model else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    if part == "memory":
        write_short(folder / "data.jsonl", options.conversations)
    if part == "start":
        write_short(folder / "data.jsonl", options.rendered)
        child("start")
    return child(part)


# ---- conversations


def write_repeated(path: Path, source: Path, megabytes: float) -> int:
    """The source's conversations again and again, up to so many MB, each time with another number behind each text."""
    samples, written, count = json.loads(source.read_text(encoding="utf-8")), 0, 0
    with path.open("w", encoding="utf-8") as file:
        for number in itertools.count():
            for sample in samples:
                turns = [turn | {"value": f"{turn['value']} {number}"} for turn in sample["conversations"]]
                written += file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")
                count += 1
            if written >= megabytes * 1e6:
                return count


def write_short(path: Path, count: int) -> None:
    """Conversations of two turns and some dozen tokens, no two alike."""
    words = "the a lantern ship river of in under bright old three walks sees carries 灯笼 河流 明亮 船".split()
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            said = [" ".join(draw.choices(words, k=12)) for _ in range(2)]
            turns = [{"from": "user", "value": f"{number}: {said[0]}?"}, {"from": "assistant", "value": said[1]}]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


# ---- in the child processes


def speed(folder: Path, options) -> dict:
    from finetune.model import loading
    from finetune.samples import rendered_samples

    path, tokenizer = folder / "data.jsonl", loading.load_tokenizer(options.model or folder / "model")
    count = write_repeated(path, options.data, options.megabytes)
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = [turn["value"] for line in lines for turn in json.loads(line)["conversations"]]
    threads = len(os.sched_getaffinity(0))
    seconds: dict[str, list[float]] = {"ours": [], "alone": []}
    for turn in range(TURNS):
        begin = time.perf_counter()
        samples = rendered_samples.load(
            path, tokenizer, max_length=2048, cache_dir=folder / f"cache{turn}", multi_turn=options.multi_turn
        )
        middle = time.perf_counter()
        if options.model:
            tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        else:
            tokenizer.tokenizer.encode_ordinary_batch(texts, num_threads=threads)
        seconds["ours"].append(middle - begin)
        seconds["alone"].append(time.perf_counter() - middle)
    found = {way: statistics.median(each) for way, each in seconds.items()} | {"tokens": samples.total_tokens}
    megabytes = path.stat().st_size / 1e6
    return found | {"ratio": found["ours"] / found["alone"], "megabytes": megabytes, "conversations": count}


def memory(folder: Path, options) -> dict:
    from finetune.memory.peak_memory import memory_gb
    from finetune.model import loading
    from finetune.samples import rendered_samples

    tokenizer, begin = loading.load_tokenizer(folder / "model"), time.perf_counter()
    samples = rendered_samples.load(folder / "data.jsonl", tokenizer, max_length=2048)
    seconds = time.perf_counter() - begin
    return {
        "peak_gb": memory_gb(), "seconds": seconds, "conversations": len(samples), "tokens": samples.total_tokens
    }  # fmt: skip


def start(folder: Path, options) -> dict:
    """finetune.py, for one step. All that it imports is imported before the clock starts."""
    import torch  # noqa: F401
    import transformers
    from transformers import Trainer  # noqa: F401

    from finetune.flags import args  # noqa: F401
    from finetune.samples import rendered_samples  # noqa: F401
    from finetune.steps import preparation, report, trainer  # noqa: F401

    ends = []

    class FirstStep(transformers.TrainerCallback):
        def on_step_end(self, *arguments, **kwargs):
            ends.append(time.perf_counter())

    replace = report.replace_progress_callbacks
    report.replace_progress_callbacks = lambda made: (replace(made), made.add_callback(FirstStep()))
    flags = "--max_steps 1 --use_cpu --per_device_train_batch_size 4 --save_strategy no --gradient_accumulation_steps 4"
    paths = ["-m", str(folder / "model"), "-d", str(folder / "data.jsonl"), "-o", str(folder / "out")]
    sys.argv = ["finetune.py", *paths, *flags.split(), "--overwrite_output_dir"]
    begin = time.perf_counter()
    runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
    return {"seconds": ends[0] - begin, "conversations": options.rendered}


CHILDREN = {"speed": speed, "memory": memory, "start": start}


if __name__ == "__main__":
    main()
