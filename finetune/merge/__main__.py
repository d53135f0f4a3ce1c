"""Merges a LoRA adapter into its base: python -m finetune.merge ADAPTER OUT

OUT loads by itself: weights, config, code, tokenizer and chat settings. The addition is made in float32, tensor by tensor, so
that memory holds one shard and the adapter; then the merged model is compared with base plus adapter, and the folder put into
its place. What the adapter was trained over is dequantized first; --base names another one, for example the 16-bit sibling.
"""

import math
import shutil
from pathlib import Path

from ..errors import Options, UserError, note, run
from ..folders import adapter_base, adapter_files, meant, model_folder, output_folder, quant_settings
from ..folders.tensor_files import MAX_SHARD_SIZE, max_shard_bytes
from ..gptq.settings import FEW, MANY, SAMPLES, SEED
from ..model import packages
from ..quantized import quantized_model
from ..quiet import quiet
from ..writing.new_folder import check_free, new_folder
from . import requantize

# Largest difference of a logit, computed in float32, as a share of the largest: of the sums before they are rounded, and what
# rounding them makes of it. Each rounded number is also compared with its sum.
EXACT = 1e-4
TOLERANCES = {"float32": EXACT, "float16": 1e-2, "bfloat16": 5e-2}
NEW_TOKENS = 16  # of each answer in the proof


def main(argv: list[str] | None = None) -> None:
    parser = Options(prog="python -m finetune.merge", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="the output folder of a LoRA run, or one of its checkpoints"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the merged model")
    parser.add_argument(
        "--base",
        help="the base model, if it is no longer where it was when the adapter was trained; or, for an adapter trained over "
        "quantized weights (NF4 too), the 16-bit model to merge it into, as it is stored (default: what the training saw: the "
        "quantized weights, dequantized)",
    )
    parser.add_argument(
        "--to", choices=["auto", *TOLERANCES], default="auto", help="type of the weights; auto: as the base has them"
    )
    parser.add_argument("--max_shard_size", default=MAX_SHARD_SIZE, help="of a file of weights (default: %(default)s)")
    back = parser.add_argument_group("back to the bits of a quantized base, in the same run")
    back.add_argument("--requantize", action="store_true", help="quantize the merged model as its GPTQ base was")
    back.add_argument("--data_path", help="conversations to calibrate on; data/README.md: their form")
    back.add_argument("--samples", type=int, help=f"of them, {FEW} to {MANY} (default: {SAMPLES})")
    back.add_argument("--seed", type=int, help=f"which ones are drawn (default: {SEED})")
    options = parser.parse_args(argv)
    quiet()

    def merging():
        if argv is None and not options.requantize:  # a process of its own, without gptqmodel, which imports much
            packages.leave_out_with([options.adapter], options.base)
        job(options)

    run(merging)


def job(options) -> None:
    """The flags as merge() takes them."""
    given = {name: getattr(options, name) for name in ("data_path", "samples", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not options.requantize:
        name, value = next(iter(given.items()))
        raise UserError(f"--{name} {value}: only --requantize calibrates - add it, or leave this out")
    wish = requantize.RequantizeOptions(**given) if options.requantize else None
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
    """Merges `adapter` into `out`; with `requantized`, requantize.RequantizeOptions, quantizes the result as the base was.

    Returns the largest difference between a logit of base + adapter and of the merged model, as a share of the largest logit.
    """
    check_folders(adapter, out)
    max_bytes = max_shard_bytes(max_shard_size)
    base_folder = adapter_base.find(adapter, base)
    check_free(out, "the merged model", base_folder, adapter)
    # --base means that model as it lies there; else it is what the adapter was trained over
    over = quantized_model.of_adapter(adapter) if base is None else None
    back_to = requantize.earlier(adapter, base_folder) if requantized else None
    conversations = requantize.read_calibration_data(requantized) if requantized else None
    from ..quantized.plain_weights import PlainWeights  # with torch, whose import takes seconds: after the checks

    check_values(base_folder, adapter)
    found = over or quant_settings.of_folder(base_folder)
    note(f"merging {adapter} into {base_folder}" + f", dequantized from {found}" * bool(found))
    if base is not None and not found and (seen := quantized_model.of_adapter(adapter)):
        note(f"the training saw {seen}; --base is taken as it is stored")
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

    from ..folders import model_writer
    from ..model import loading
    from . import formulas

    folder.mkdir(exist_ok=True)
    tokenizer, changes = loading.load_tokenizer(base), formulas.Adapter(adapter)
    merged = skeleton(base, adapter, tokenizer, weights)
    changes.check_places(tied=bool(merged.all_tied_weights_keys))
    expected = model_writer.tensor_shapes(merged)
    dtype = weights.dtype if to == "auto" else getattr(torch, to)
    record = output_folder.read_record(adapter)
    record |= {"merged": {"adapter": str(adapter.resolve()), "base": str(base.resolve())}}
    model_writer.write_frame(folder, merged, tokenizer, merged.generation_config, dtype, record, model_card(adapter, base))
    bar = tqdm(expected, desc="merging", unit=" tensors", delay=2, leave=False)
    tensors = ((name, rounded(name, changes.merged(name, weights[name]), dtype)) for name in bar)
    model_writer.write_weights(folder, tensors, max_bytes, expected)
    changes.check_all_used()
    return str(dtype).removeprefix("torch.")


def rounded(name: str, tensor, dtype):
    """The sum, rounded to the type it is written in."""
    from ..folders import model_writer

    return model_writer.rounded(name, tensor, dtype, "give --to bfloat16, or --to float32")


def skeleton(base: Path, adapter: Path, tokenizer, weights):
    """The merged model without its weights: the base's config unquantized, and the chat settings of the adapter."""
    from transformers import AutoConfig, GenerationConfig

    from ..folders import model_writer
    from ..model import loading

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if config.model_type == "qwen" and weights.more_biases(model_writer.tensor_shapes(model_writer.skeleton(config))):
        config.no_bias = False
    merged = model_writer.skeleton(config)
    own = adapter if (adapter / "generation_config.json").is_file() else base
    if (own / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(own)
    loading.set_chat_settings(merged, tokenizer)  # of an adapter that other hands made, which has none
    return merged


def model_card(adapter: Path, base: Path) -> str:
    """README.md of a merged model."""
    return (
        f"---\nbase_model: {base.name}\n---\n\n# {base.name}, fine-tuned\n\n"
        f"The LoRA adapter {adapter.resolve().name} merged into {base.name}. training.json says how it was trained: data, settings,\n"
        "versions. It loads with transformers; first-generation Qwen brings its own code (trust_remote_code=True), which is\n"
        "not needed where the toolkit is installed: `python -m finetune.ask THIS_FOLDER`.\n"
    )


def check_folders(adapter: Path, out: Path) -> None:
    """Raises UserError if there is no whole adapter, or OUT is not free."""
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter}: no adapter_config.json there - give the output folder of a LoRA run, a full model needs no merge"
            + meant.folder(adapter, meant.ADAPTER)
        )
    adapter_files.check(adapter)
    check_free(out, "the merged model")


def check_values(base: Path, adapter: Path) -> None:
    """UserError for a base whose config.json and tensors do not fit together, or an adapter that does not fit the base."""
    from ..model import adapter_fits, whole_base

    if problems := model_folder.value_problems(base) or whole_base.problems(base):
        raise UserError(*problems)
    adapter_fits.check(base, adapter)


# ---- the proof


def prove(folder: Path, adapter: Path, base: Path, weights, dtype: str, as_trained: bool) -> float:
    """Compares base + adapter with `folder`, in float32; more than its precision explains is a failed merge.

    weights: PlainWeights of the base. as_trained: over NF4, if that is what the adapter was trained over.
    """
    from ..compare.agreement import measure, own_answers, question_prompts
    from ..model import loading

    prompts = question_prompts(loading.load_tokenizer(base))
    if too_large(folder):
        loaders, what = block_by_block(folder, adapter, weights, dtype), "on a few questions, block by block"
        samples = [(prompt, prompt) for prompt in prompts]
    else:
        loaders, what = whole(folder, adapter, base, weights, dtype, as_trained), "on a few answers"

        def samples(tuned):
            return own_answers(tuned, prompts, NEW_TOKENS)

    _, found, *exact = measure(loaders, samples, device="cpu")
    check_difference(found, TOLERANCES[dtype], dtype)
    for sums in exact:
        check_difference(sums, EXACT, "float32, before they are rounded,")
    note(f"base + adapter against the merged model, {what}: {found}")
    return found.logits_difference


def check_difference(found, tolerance: float, precision: str) -> None:
    """RuntimeError for logits that differ from the reference's by more than the precision explains."""
    if not found.logits_difference <= tolerance:
        what = f"the merged model's logits differ from the adapter's by {found.logits_difference:.1e} of the largest"
        raise RuntimeError(f"{what}, which {precision} does not explain: nothing was written")


def whole(folder: Path, adapter: Path, base: Path, weights, dtype: str, as_trained: bool) -> list:
    """Loads base + adapter with peft, which has formulas of its own, and then the merged model.

    Where its weights were rounded, a third time with the sums in their place: rounding hides what a mild adapter does.
    """
    import torch

    from ..folders import model_writer
    from ..model import loading

    def merged():
        return loading.load_weights(folder, torch.float32, half_on_cuda=False).to("cpu").eval()

    def exact():
        loaded, sums = merged(), Sums(folder, adapter, weights, dtype)
        for name, tensor in model_writer.saved_tensors(loaded).items():
            tensor.data.copy_(sums[name])
        return loaded

    tuned = [lambda: loading.load_tuned(base, adapter, torch.float32, as_trained).to("cpu"), merged]
    return tuned if dtype == "float32" else [*tuned, exact]


def block_by_block(folder: Path, adapter: Path, weights, dtype: str) -> list:
    """For models larger than memory: compares the files that were written with base + adapter, computed once more block by block."""
    from transformers import AutoConfig

    from ..gptq.streamed import streamed
    from ..quantized.plain_weights import PlainWeights

    config, sums = AutoConfig.from_pretrained(folder, trust_remote_code=False), Sums(folder, adapter, weights, dtype)
    return [lambda: streamed(config, sums.__getitem__), lambda: streamed(config, PlainWeights(folder).__getitem__)]


class Sums:
    """base + adapter for each tensor; checks that the merged folder holds its rounded value."""

    def __init__(self, folder: Path, adapter: Path, weights, dtype: str):
        import torch

        from ..quantized.plain_weights import PlainWeights
        from .formulas import Adapter

        self.folder, self.written, self.weights = folder, PlainWeights(folder), weights
        self.changes, self.dtype = Adapter(adapter), getattr(torch, dtype)

    def __getitem__(self, name: str):
        """The sum in float32; RuntimeError where the folder holds another value."""
        import torch

        tensor = self.changes.merged(name, self.weights[name])
        if not torch.equal(rounded(name, tensor, self.dtype), self.written[name]):
            raise RuntimeError(f"{self.folder}: {name} is not what was written; the disk or its quota may be at fault")
        return tensor


def too_large(folder: Path) -> bool:
    """Whether loading the model in float32 takes more memory than is free."""
    import psutil

    numbers = sum(math.prod(shape) for shape in model_folder.shapes(folder).values())
    return 1.2 * 4 * numbers > psutil.virtual_memory().available


if __name__ == "__main__":
    main()
