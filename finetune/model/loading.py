"""The tokenizer and the model to train: full-parameter or LoRA, in the precision asked for."""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

import qwen_model
from qwen_model.generation_qwen import MAX_WINDOW_SIZE

from ..errors import UserError, note, shortened
from ..folders import finite, model_folder, quant_settings
from ..folders.model_folder import LATER_TYPES
from ..lora import adapters
from ..quantized import quantized_model
from ..samples import lossless, time_limit
from ..samples.rendering import PROBE
from . import later_qwen, whole_base

NOT_FINITE = "download it again, or take an earlier checkpoint"  # what to do about such a base


def load_tokenizer(folder: Path):
    """The folder's tokenizer; first-generation Qwen's comes from this toolkit, never from code in the folder.

    Raises UserError for one that is damaged, of another model than the folder's, or that does not give back its text.
    """
    qwen_model.register()
    if findings := model_folder.tokenizer_problems(folder):
        raise UserError(*findings)
    try:
        with time_limit.of_tokenizer(str(folder), time_limit.OPENING):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever its damaged files make of the classes of transformers
        what = f"{folder}: its tokenizer cannot be opened ({type(error).__name__}: {shortened(error)})"
        raise UserError(f"{what} - download the tokenizer's files again") from error
    whole_base.check_rows(tokenizer, folder)
    lossless.check(tokenizer, [PROBE])
    if tokenizer.chat_template is None:
        later_qwen.give_chat_template(tokenizer, folder)
    return tokenizer


def compute_dtype(training) -> torch.dtype:
    """What the passes are computed in: --bf16, --fp16, or float32."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def load_model(folder: Path, tokenizer, lora, training, resume_from: Path | None = None, name: str | None = None):
    """The model, ready to train. resume_from: the checkpoint that the run goes on from, if any; name: as the user gave it.

    Trainable weights are float32, with bf16 or fp16 too: an update smaller than half precision's spacing must not be
    lost (with --bf16_weights the optimizer sees to that). What LoRA freezes is held in the precision of the passes,
    or quantized.
    Raises UserError for --train_tokens that the tokenizer does not know, before weights are loaded.
    """
    qwen_model.register()
    rows = adapters.trained_rows(tokenizer, lora.train_embeddings, lora.train_tokens)
    masters_elsewhere = bool(training.deepspeed)  # DeepSpeed keeps the float32 values of half precision itself
    half = lora.use_lora or masters_elsewhere or training.bf16_weights
    dtype = compute_dtype(training) if half else torch.float32
    fast = training.device.type == "cuda" and compute_dtype(training) != torch.float32
    quantization = quantized_model.of_run(folder, lora)
    model = load_weights(folder, dtype, fast, quantization, training.device)
    if name and not os.path.isdir(name):  # an adapter stores the hub's id, which means the same on every machine
        model.name_or_path = model.config.name_or_path = name
    set_chat_settings(model, tokenizer)
    if lora.use_lora:
        model = adapters.add(model, lora, rows, resume_from)
    if quantization:
        quantized_model.leave_to_each_rank(model)
    for parameter in model.parameters():
        # biases that LoRA trains are the base's own, in its precision
        if parameter.requires_grad and not training.bf16_weights:
            parameter.data = parameter.data.float()
    return model


def load_weights(folder: Path, dtype, half_on_cuda: bool, quantization=None, device=None):
    """A model in `dtype` ("auto": as stored). flash-attn takes half precision on CUDA only, so nothing else is offered to it.

    Quantized, as the folder is or as `quantization` says, it comes onto `device` (None: the GPU if there is one).
    Raises UserError for a folder that lacks a tensor, or whose weights are infinite or no number.
    """
    if model_folder.has_outdated_code(folder):
        note(
            f"{folder}: the code in it, which others load it with, is older than this toolkit's and answers nonsense under "
            f"transformers 5.24 and newer - python -m finetune.refresh {folder} replaces it"
        )
    whole_base.check(folder)
    attention = {} if half_on_cuda else {"attn_implementation": "sdpa"}
    if quantization := quantization or quant_settings.of_folder(folder):
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = quantized_model.load(folder, quantization, dtype, device, **attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **attention)
    if is_deepspeed_zero3_enabled() or quantization and quantization.method == "nf4":
        finite.check_files(folder, NOT_FINITE, shared_out=True)  # in memory they are in shards, or packed
    else:
        finite.check_model(model, folder, NOT_FINITE)
    return later_qwen.prepare(model, half_on_cuda) if model.config.model_type in LATER_TYPES else model


def load_tuned(base: Path, adapter: Path, dtype: torch.dtype, as_trained: bool = True):
    """Base and adapter together, for use or for merging, in `dtype`.

    as_trained: over NF4 if that is what the adapter was trained over; else, as for merging, over the base as it lies there.
    """
    quantization = quantized_model.of_adapter(adapter) if as_trained else None
    base_model = load_weights(base, dtype, half_on_cuda=False, quantization=quantization)
    if (adapter / "generation_config.json").is_file():  # a base model that was tuned on conversations chats now
        base_model.generation_config = GenerationConfig.from_pretrained(adapter)
    try:
        tuned = adapters.load(base_model, adapter, autocast_adapter_dtype=False).eval()
    except RuntimeError as error:  # peft's list of tensors whose sizes differ
        raise UserError(
            f"{adapter}: does not fit {base} ({str(error).splitlines()[0]}) - give the base that it was trained on with --base"
        ) from error
    return tuned


def set_chat_settings(model, tokenizer) -> None:
    """A model tuned on ChatML conversations speaks ChatML: it says so, and where it stops, in its generation_config."""
    if model.config.model_type in LATER_TYPES:
        return later_qwen.set_chat_settings(model, tokenizer)
    settings = model.generation_config
    if getattr(settings, "chat_format", "raw") == "chatml":
        return
    settings.chat_format = "chatml"
    settings.eos_token_id = [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]
    settings.pad_token_id = tokenizer.eod_id
    if getattr(settings, "max_window_size", None) is None:
        settings.max_window_size = min(MAX_WINDOW_SIZE, model.config.seq_length)
