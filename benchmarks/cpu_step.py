"""A full-parameter step on the CPU: this toolkit against a plain padded trainer, in one run.

    python benchmarks/cpu_step.py

Both train the same 19.5-million-parameter checkpoint (vocabulary 151,936) in float32 on the same batch of 16 conversations,
spread over the file, each in a process of its own, taking turns. The plain one is transformers' Trainer as it comes: every
sample padded to --model_max_length, logits of every position, torch's cross-entropy. It prints seconds a step, useful tokens
(no padding) a second, peak memory and loss of both, and the two ratios. Times are also given in units of a 2048 x 2048 x 2048 float32 matrix product on the same cores.
"""

import argparse
import json
import os
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

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data" / "conversations.json", help="conversations to take 16 of"
    )
    parser.add_argument("--model_max_length", type=int, default=512, metavar="N", help="tokens of a sample, at most")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two take turns")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child, options)))
        return
    figures = measure(options)
    print(table(figures))
    if options.json:
        told = {"about": provenance.about(), "data": options.data.name}
        options.json.write_text(json.dumps(told | figures, indent=2) + "\n")


def measure(options) -> dict:
    """Runs both ways in turns, each time in a fresh process."""
    runs = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        parameters = new_checkpoint(Path(folder), hidden_size=options.hidden_size)
        for _ in range(options.rounds):
            for way in runs:
                print(f"running {way} ...", file=sys.stderr)
                runs[way].append(run_child(way, folder, options))
    best = {way: min(found, key=lambda run: run["seconds"]) for way, found in runs.items()}
    return {
        "parameters": parameters,
        "model_max_length": options.model_max_length,
        "useful_tokens": best["ours"]["tokens"],
        "matmul_seconds": matmul_seconds(),
        **best,
        "speed_ratio": best["plain"]["seconds"] / best["ours"]["seconds"],
        "memory_ratio": best["ours"]["peak_gb"] / best["plain"]["peak_gb"],
    }


def run_child(way: str, folder: str, options) -> dict:
    """One way in a process of its own, so that peak memory is its own."""
    command = [sys.executable, __file__, "--child", way, folder, "--steps", str(options.steps)]
    command += ["--data", str(options.data), "--model_max_length", str(options.model_max_length)]
    out = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    )
    return json.loads(out.stdout.splitlines()[-1])


def table(figures: dict) -> str:
    """The figures for people."""
    unit = figures["matmul_seconds"]
    useful, limit = figures["useful_tokens"], figures["model_max_length"]
    lines = [f"{figures['parameters']:,} parameters, {BATCH} conversations of {useful:,} tokens, none above {limit}, float32"]
    lines += [f"{'':24}{'s/step':>9}{'matmuls':>9}{'useful/s':>10}{'peak GB':>9}{'computed':>10}{'loss':>11}"]
    for way, name in (("plain", "plain padded trainer"), ("ours", "this toolkit")):
        run = figures[way]
        lines.append(
            f"{name:24}{run['seconds']:9.2f}{run['seconds'] / unit:9.0f}{useful / run['seconds']:10,.0f}"
            f"{run['peak_gb']:9.2f}{run['tokens']:10,}{run['loss']:11.6f}"
        )
    lines += [f"{figures['speed_ratio']:.1f} times as fast, in {figures['memory_ratio']:.2f} of the memory"]
    return "\n".join(lines)


def matmul_seconds(size: int = 2048, tries: int = 5) -> float:
    """The best time of a float32 matrix product: what the machine gives."""
    import torch

    a, b, times = torch.randn(size, size), torch.randn(size, size), []
    for _ in range(tries):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return min(times)


# ---- in the child process


def child(way: str, folder: str, options) -> dict:
    """Trains one batch for 1 + steps steps; median seconds, peak resident GB, tokens that went through, first loss."""
    from transformers import TrainingArguments

    from finetune.memory.peak_memory import memory_gb
    from finetune.model.loading import load_tokenizer

    tokenizer = load_tokenizer(Path(folder))
    limit = options.model_max_length
    rows = batch(options.data, tokenizer, limit)
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out, per_device_train_batch_size=BATCH, max_steps=1 + options.steps, learning_rate=1e-5, weight_decay=0.1,
            adam_beta2=0.95, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer, tokens = {"plain": plain, "ours": ours}[way](folder, args, rows, tokenizer, limit)
        clock = stopwatch()
        trainer.add_callback(clock)
        trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return {"seconds": statistics.median(clock.seconds[1:]), "peak_gb": memory_gb(), "tokens": tokens, "loss": loss}


def batch(path: Path, tokenizer, limit: int) -> list:
    """Sixteen conversations, evenly spread over the file, as (ids, labels) arrays."""
    from qwen_model.chatml import render

    samples = json.loads(path.read_text(encoding="utf-8"))
    chosen = [samples[i * len(samples) // BATCH] for i in range(BATCH)]
    roles = {"from": "role", "value": "content"}
    messages = [
        [{roles[key]: value for key, value in turn.items()} for turn in sample["conversations"]] for sample in chosen
    ]
    samples = (render(tokenizer, each, max_length=limit) for each in messages)
    return [(sample.ids, sample.labels) for sample in samples]  # without weights: each label counts 1


def stopwatch():
    """A callback that takes the time of each step."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self):
            self.seconds, self.begin = [], 0.0

        def on_step_begin(self, *args, **kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.perf_counter() - self.begin)

    return Stopwatch()


class InMemory:
    """The batch, with the interface of rendered_samples.Samples."""

    def __init__(self, rows):
        import numpy as np

        self.rows = rows
        self.lengths = np.array([len(ids) for ids, _ in rows])
        self.supervised = self.weight_sums = np.array([(labels[1:] != -100).sum() for _, labels in rows])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def token_weights(self, i) -> None:
        """1 each."""


def ours(folder, args, rows, tokenizer, limit):
    """The toolkit's trainer: packed rows, loss in pieces."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.steps.plan import Plan
    from finetune.steps.trainer import PlannedTrainer

    samples = InMemory(rows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plan = Plan(samples.lengths, samples.supervised, samples_per_step=BATCH, max_tokens_per_pass=8192)
    return PlannedTrainer(model, args, samples=samples, plan=plan, tokenizer=tokenizer), int(samples.lengths.sum())


def plain(folder, args, rows, tokenizer, limit):
    """transformers' Trainer as it comes: padded, all logits, plain cross-entropy."""
    import torch
    from torch.nn.functional import cross_entropy, pad
    from transformers import AutoModelForCausalLM, Trainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def padded(values, fill):
        return pad(torch.from_numpy(values.astype("int64")), (0, limit - len(values)), value=fill)

    data = [
        {
            "input_ids": padded(ids, tokenizer.eod_id),
            "labels": padded(labels, -100),
            "attention_mask": padded(ids * 0 + 1, 0),
        }
        for ids, labels in rows
    ]

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].float()
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)

    return Trainer(model=model, args=args, train_dataset=data, compute_loss_func=loss), BATCH * limit


if __name__ == "__main__":
    main()
