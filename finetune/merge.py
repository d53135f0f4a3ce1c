"""Merges a LoRA adapter into its base: python -m finetune.merge ADAPTER OUT

OUT loads by itself: weights, config, code, tokenizer and chat settings. The addition is made in float32, and the merged
model is compared with base plus adapter on a few prompts before the folder is put into its place.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from . import checkpoint, model
from .errors import UserError, note

QUESTIONS = ("Who are you?", "你是谁？", "Write a Python function that adds two numbers.", "法国的首都是哪里？")
TOLERANCE = 1e-4  # largest difference of a logit in float32, as a share of the largest logit (and of 1 at least)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.merge", description=__doc__.split("\n\n")[0])
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the output folder of a LoRA run, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the merged model")
    parser.add_argument("--base", help="the base model, if it is no longer where it was when the adapter was trained")
    parser.add_argument("--to", choices=["auto", *DTYPES], default="auto", help="type of the weights; auto: as the base has them")
    options = parser.parse_args(argv)
    try:
        merge(options.adapter, options.out, base=options.base, to=options.to)
    except UserError as error:
        sys.exit(fail(error))


def fail(error: UserError) -> int:
    """Prints the findings; returns the exit code for what a user gave."""
    for line in error.findings:
        print(f"error: {line}", file=sys.stderr)
    return 2


def merge(adapter: Path, out: Path, base: str | None = None, to: str = "auto") -> float:
    """Merges `adapter` into `out`; returns the largest difference of a logit between base + adapter and the merged model."""
    config = check(adapter, out)
    base_folder = find_base(adapter, base or config["base_model_name_or_path"])
    tokenizer = model.load_tokenizer(base_folder)

    note(f"loading {base_folder} and {adapter}")
    tuned, stored_dtype = load(base_folder, adapter)
    prompts = probes(tokenizer)
    expected = logits(tuned, prompts)
    merged = tuned.merge_and_unload()
    difference = compare(expected, logits(merged, prompts))
    note(f"merged in float32: logits differ from the adapter's by at most {difference:.1e}")

    dtype = stored_dtype if to == "auto" else DTYPES[to]
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


def check(adapter: Path, out: Path) -> dict:
    """The adapter's config, if it is an adapter and OUT is free."""
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter_config.json there - give the output folder of a LoRA run; a full model needs no merge")
    checkpoint.weight_files(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty - give a new folder for the merged model")
    return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))


def find_base(adapter: Path, name: str) -> Path:
    """The base's folder, and the one that the adapter was trained on."""
    try:
        folder = model.find_folder(name)
    except UserError as error:
        raise UserError(f"{adapter}: its base {name} was not found - give it with --base") from error
    checkpoint.check_base(adapter, folder)
    return folder


def load(base: Path, adapter: Path):
    """(base + adapter in float32, the type of the base's stored weights)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    stored_dtype = next(tensor.dtype for _, tensor in checkpoint.read_tensors(base) if tensor.is_floating_point())
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    if (adapter / "generation_config.json").is_file():  # a base model that was tuned on conversations chats now
        base_model.generation_config = GenerationConfig.from_pretrained(adapter)
    return PeftModel.from_pretrained(base_model, adapter).eval(), stored_dtype


def probes(tokenizer) -> list[torch.Tensor]:
    """A few questions as chat prompts, each (1, T)."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
        for question in QUESTIONS
    ]
    return [torch.tensor([prompt]) for prompt in prompts]


@torch.no_grad()
def logits(some_model, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The logits of every position of every prompt."""
    return [some_model(prompt.to(some_model.device)).logits.float() for prompt in prompts]


def compare(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The largest difference; more than TOLERANCE of the largest logit is a failed merge."""
    difference = max((a - b).abs().max().item() for a, b in zip(expected, found))
    scale = max(1.0, max(a.abs().max().item() for a in expected))
    if not difference <= TOLERANCE * scale:
        raise RuntimeError(f"the merged model's logits differ from the adapter's by {difference:.2e}: nothing was written")
    return difference


if __name__ == "__main__":
    main()
