"""Merges a LoRA adapter into its base: python -m finetune.merge ADAPTER OUT

OUT loads by itself: weights, config, code, tokenizer and chat settings. The addition is made in float32, and the merged
model is compared with base plus adapter on a few prompts before the folder is put into its place.
"""

import argparse
import os
import shutil
from pathlib import Path

from .errors import UserError, note, run
from .quiet import quiet

QUESTIONS = ("Who are you?", "你是谁？", "Write a Python function that adds two numbers.", "法国的首都是哪里？")
TOLERANCE = 1e-4  # largest difference of a logit in float32, as a share of the largest logit (and of 1 at least)
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.merge", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="the output folder of a LoRA run, or one of its checkpoints"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the merged model")
    parser.add_argument("--base", help="the base model, if it is no longer where it was when the adapter was trained")
    parser.add_argument(
        "--to", choices=["auto", *DTYPES], default="auto", help="type of the weights; auto: as the base has them"
    )
    options = parser.parse_args(argv)
    quiet()
    run(lambda: merge(options.adapter, options.out, base=options.base, to=options.to))


def merge(adapter: Path, out: Path, base: str | None = None, to: str = "auto") -> float:
    """Merges `adapter` into `out`; returns the largest difference of a logit between base + adapter and the merged model."""
    import torch

    from . import checkpoint, model, quantized

    check(adapter, out)
    base_folder = model.find_base(adapter, base)
    quantized.check_mergeable(base_folder)
    tokenizer = model.load_tokenizer(base_folder)

    note(f"loading {base_folder} and {adapter}")
    tuned = model.load_tuned(base_folder, adapter, torch.float32, as_trained=False)
    prompts = probes(tokenizer)
    expected = logits(tuned, prompts)
    merged = tuned.merge_and_unload()
    difference = compare(expected, logits(merged, prompts))
    note(f"merged in float32: logits differ from the adapter's by at most {difference:.1e}")

    dtype = checkpoint.stored_dtype(base_folder) if to == "auto" else getattr(torch, to)
    merged.to(dtype)
    staging = out.with_name(out.name + ".unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    made_from = {"merged": {"adapter": str(adapter.resolve()), "base": str(base_folder.resolve())}}
    checkpoint.save_model(merged, tokenizer, staging, record=checkpoint.read_record(adapter) | made_from)
    checkpoint.verify(staging, merged)
    if out.is_dir():
        out.rmdir()
    os.replace(staging, out)
    note(f"done: {out} ({str(dtype).removeprefix('torch.')}) loads by itself")
    return difference


def check(adapter: Path, out: Path) -> None:
    """Raises UserError if there is no whole adapter, or OUT is not free."""
    from . import checkpoint

    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter}: no adapter_config.json there - give the output folder of a LoRA run; a full model needs no merge"
        )
    checkpoint.weight_files(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty - give a new folder for the merged model")


def probes(tokenizer) -> list:
    """A few questions as chat prompts, each a tensor (1, T)."""
    import torch

    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    return [torch.tensor([prompt]) for prompt in prompts]


def logits(some_model, prompts: list) -> list:
    """The logits of every position of every prompt."""
    import torch

    with torch.no_grad():
        return [some_model(prompt.to(some_model.device)).logits.float() for prompt in prompts]


def compare(expected: list, found: list) -> float:
    """The largest difference; more than TOLERANCE of the largest logit is a failed merge."""
    difference = max((a - b).abs().max().item() for a, b in zip(expected, found))
    scale = max(1.0, max(a.abs().max().item() for a in expected))
    if not difference <= TOLERANCE * scale:
        raise RuntimeError(
            f"the merged model's logits differ from the adapter's by {difference:.2e}: nothing was written"
        )
    return difference


if __name__ == "__main__":
    main()
