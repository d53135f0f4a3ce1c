"""Merges a LoRA adapter into its base: python -m finetune.merge ADAPTER OUT

OUT loads by itself: weights, config, code, tokenizer and chat settings. The addition is made in float32, tensor by tensor, so
that memory holds one shard and the adapter; then the merged model is compared with base plus adapter, and the folder put into
its place. What the adapter was trained over is dequantized first; --base names another one, for example the 16-bit sibling.
"""

import argparse
import math
import shutil
from pathlib import Path

from .errors import UserError, note, run
from .new_folder import check_free, new_folder
from .quiet import quiet

# largest difference of a logit, computed in float32, as a share of the largest: what rounding the merged weights makes of it
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
MAX_SHARD_SIZE = "2GB"
NEW_TOKENS = 16  # of each answer in the proof


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.merge", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="the output folder of a LoRA run, or one of its checkpoints"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the merged model")
    parser.add_argument(
        "--base",
        help="the base model, if it is no longer where it was when the adapter was trained; or, for an adapter trained over "
        "quantized weights, the 16-bit model to merge it into (default: the quantized one, dequantized)",
    )
    parser.add_argument(
        "--to", choices=["auto", *TOLERANCES], default="auto", help="type of the weights; auto: as the base has them"
    )
    parser.add_argument("--max_shard_size", default=MAX_SHARD_SIZE, help="of a file of weights (default: %(default)s)")
    back = parser.add_argument_group("back to the bits of a quantized base, in the same run")
    back.add_argument("--requantize", action="store_true", help="quantize the merged model as its GPTQ base was")
    back.add_argument("--data_path", help="conversations to calibrate on; data/README.md: their form")
    back.add_argument("--samples", type=int, default=128, help="of them, 64 to 512 (default: %(default)s)")
    back.add_argument("--seed", type=int, default=42, help="which ones are drawn (default: %(default)s)")
    options = parser.parse_args(argv)
    quiet()
    run(lambda: job(options))


def job(options) -> None:
    """The flags as merge() takes them."""
    from .requantize import Wish  # not above: --help is there at once

    wish = Wish(options.data_path, options.samples, options.seed) if options.requantize else None
    kept = {name: getattr(options, name) for name in ("base", "to", "max_shard_size")}
    merge(options.adapter, options.out, **kept, requantized=wish)


def merge(
    adapter: Path,
    out: Path,
    base: str | None = None,
    to: str = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    requantized=None,
) -> float:
    """Merges `adapter` into `out`; with `requantized`, a requantize.Wish, quantizes the result as the base was.

    Returns the largest difference between a logit of base + adapter and of the merged model, as a share of the largest logit.
    """
    from . import model, quantized, requantize
    from .plain_weights import PlainWeights

    check(adapter, out)
    max_bytes = bytes_of_shard(max_shard_size)
    base_folder = model.find_base(adapter, base)
    check_free(out, "the merged model", base_folder, adapter)
    # --base means that model as it lies there; else it is what the adapter was trained over
    over = quantized.of_adapter(adapter) if base is None else None
    back_to = requantize.earlier(adapter, base_folder) if requantized else None
    conversations = requantize.check(requantized) if requantized else None
    found = over or quantized.of_folder(base_folder)
    note(f"merging {adapter} into {base_folder}" + f", dequantized from {found}" * bool(found))
    with PlainWeights(base_folder, over) as weights, new_folder(out) as folder:
        merged = folder / "merged" if requantized else folder
        dtype = write(merged, adapter, base_folder, weights, to, max_bytes)
        difference = prove(merged, adapter, base_folder, weights, dtype, as_trained=base is None)
        if requantized:
            name = f"{base_folder.name} with {adapter.resolve().name}"
            requantize.requantize(merged, folder, conversations, requantized, back_to, name, max_bytes)
            shutil.rmtree(merged)
    note(f"done: {out} ({back_to or dtype}) loads by itself")
    return difference


def write(folder: Path, adapter: Path, base: Path, weights, to: str, max_bytes: int) -> str:
    """Writes the merged model into `folder`; returns the type of its weights. weights: PlainWeights of the base."""
    import torch
    from tqdm import tqdm

    from . import checkpoint, merging, model, model_writer

    folder.mkdir(exist_ok=True)
    tokenizer, changes = model.load_tokenizer(base), merging.Adapter(adapter)
    merged = skeleton(base, adapter, tokenizer, weights)
    expected = model_writer.tensor_shapes(merged)
    dtype = weights.dtype if to == "auto" else getattr(torch, to)
    record = checkpoint.read_record(adapter)
    record |= {"merged": {"adapter": str(adapter.resolve()), "base": str(base.resolve())}}
    model_writer.write_frame(folder, merged, tokenizer, merged.generation_config, dtype, record, card(adapter, base))
    bar = tqdm(expected, desc="merging", unit=" tensors", delay=2, leave=False)
    tensors = ((name, changes.merged(name, weights[name]).to(dtype)) for name in bar)
    model_writer.write_weights(folder, tensors, max_bytes, expected)
    changes.check_all_used(tied=bool(merged.all_tied_weights_keys))
    return str(dtype).removeprefix("torch.")


def skeleton(base: Path, adapter: Path, tokenizer, weights):
    """The merged model without its weights: the base's config unquantized, and the chat settings of the adapter."""
    from transformers import AutoConfig, GenerationConfig

    from . import model, model_writer

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if config.model_type == "qwen" and weights.more_biases(model_writer.tensor_shapes(model_writer.skeleton(config))):
        config.no_bias = False
    merged = model_writer.skeleton(config)
    own = adapter if (adapter / "generation_config.json").is_file() else base
    if (own / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(own)
    model.set_chat_settings(merged, tokenizer)  # of an adapter that other hands made, which has none
    return merged


def card(adapter: Path, base: Path) -> str:
    """README.md of a merged model."""
    return (
        f"---\nbase_model: {base.name}\n---\n\n# {base.name}, fine-tuned\n\n"
        f"The LoRA adapter {adapter.resolve().name} merged into {base.name}. training.json says how it was trained: data, settings,\n"
        "versions. It loads with transformers; first-generation Qwen brings its own code (trust_remote_code=True), which is\n"
        "not needed where the toolkit is installed: `python -m finetune.ask THIS_FOLDER`.\n"
    )


def bytes_of_shard(text: str) -> int:
    from .shards import size_in_bytes

    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise UserError(f"--max_shard_size: {error}") from error


def check(adapter: Path, out: Path) -> None:
    """Raises UserError if there is no whole adapter, or OUT is not free."""
    from . import checkpoint

    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter}: no adapter_config.json there - give the output folder of a LoRA run; a full model needs no merge"
        )
    checkpoint.weight_files(adapter)
    check_free(out, "the merged model")


# ---- the proof


def prove(folder: Path, adapter: Path, base: Path, weights, dtype: str, as_trained: bool) -> float:
    """Compares base + adapter with `folder`, in float32; more than its precision explains is a failed merge.

    weights: PlainWeights of the base. as_trained: over NF4, if that is what the adapter was trained over.
    """
    from . import model
    from .agreement import measure, own_answers, question_prompts

    prompts = question_prompts(model.load_tokenizer(base))
    if too_large(folder):
        loaders, what = block_by_block(folder, adapter, weights), "on a few questions, block by block"
        samples = [(prompt, prompt) for prompt in prompts]
    else:
        loaders, what = whole(folder, adapter, base, as_trained), "on a few answers"

        def samples(tuned):
            return own_answers(tuned, prompts, NEW_TOKENS)

    _, found = measure(loaders, samples, device="cpu")
    if not found.logits_difference <= TOLERANCES[dtype]:
        what = f"the merged model's logits differ from the adapter's by {found.logits_difference:.1e} of the largest"
        raise RuntimeError(f"{what}, which {dtype} does not explain: nothing was written")
    note(f"base + adapter against the merged model, {what}: {found}")
    return found.logits_difference


def whole(folder: Path, adapter: Path, base: Path, as_trained: bool) -> list:
    """Loads base + adapter with peft, which has formulas of its own, and then the merged model."""
    import torch

    from . import model

    return [
        lambda: model.load_tuned(base, adapter, torch.float32, as_trained).to("cpu"),
        lambda: model.load_weights(folder, torch.float32, half_on_cuda=False).to("cpu").eval(),
    ]


def block_by_block(folder: Path, adapter: Path, weights) -> list:
    """For models that memory does not hold: the sums once more from base and adapter, against the files that were written."""
    from transformers import AutoConfig

    from .merging import Adapter
    from .plain_weights import PlainWeights
    from .streamed import streamed

    config, changes = AutoConfig.from_pretrained(folder, trust_remote_code=False), Adapter(adapter)
    return [
        lambda: streamed(config, lambda name: changes.merged(name, weights[name])),
        lambda: streamed(config, PlainWeights(folder).__getitem__),
    ]


def too_large(folder: Path) -> bool:
    """Whether the model in float32, and what loading it takes beside, is more than the memory that is free."""
    import psutil

    from . import model_folder

    numbers = sum(math.prod(shape) for shape in model_folder.shapes(folder).values())
    return 1.2 * 4 * numbers > psutil.virtual_memory().available


if __name__ == "__main__":
    main()
