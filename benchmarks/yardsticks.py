"""What a user would pick instead: transformers' Trainer on its Qwen2 class of the same sizes, as it comes, and with what helps it.

    transformers   peft and transformers' Trainer, samples padded to the length, sdpa attention, its own loss
    liger          the same with liger-kernel's fused operators (use_liger_kernel)
    trl            TRL's SFTTrainer, otherwise as it comes

llamafactory and unsloth want other versions of transformers and torch than this toolkit runs on, so they cannot be installed beside it:
see NOTES.md.
"""

import tempfile

import torch
from cells import SIZES, Cell

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS_AT_ONCE = 16384  # of a forward pass: samples of a step beyond are accumulated


def trainer_of(cell: Cell, out: str, samples: int, steps: int, recompute: bool, on_gpu: bool):
    """(trainer, samples of a forward pass); steps of `samples` samples."""
    at_once = max(1, min(samples, TOKENS_AT_ONCE // cell.length))
    while samples % at_once:
        at_once -= 1
    settings = dict(
        output_dir=out, per_device_train_batch_size=at_once, gradient_accumulation_steps=samples // at_once, max_steps=steps,
        learning_rate=1e-5, weight_decay=0.1, adam_beta2=0.95, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=not on_gpu, bf16=on_gpu, gradient_checkpointing=recompute, optim="adamw_torch_fused",
        gradient_checkpointing_kwargs={"use_reentrant": False}, use_liger_kernel=cell.way == "liger",
    )  # fmt: skip
    model, data = model_of(cell, on_gpu), Filled(cell.length, samples * steps, SIZES[cell.size][3])
    if cell.way == "trl":
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(**settings, max_length=cell.length, dataset_kwargs={"skip_prepare_dataset": True})
        words = {"model": model, "args": config, "train_dataset": data.as_dataset()}
        return SFTTrainer(**words, processing_class=any_tokenizer()), at_once
    from transformers import Trainer, TrainingArguments

    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data), at_once


def any_tokenizer():
    """TRL asks for one, also where samples are tokens already: then it is for padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


def model_of(cell: Cell, on_gpu: bool):
    """transformers' Qwen2 with random weights: frozen in 16 bit under LoRA, in float32 where all train."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layers, hidden, intermediate, vocabulary = SIZES[cell.size]
    heads = hidden // (32 if cell.size == "tiny" else 128)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=intermediate // 2, max_position_embeddings=8192,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    frozen = cell.method != "full"
    dtype = torch.bfloat16 if frozen and on_gpu else torch.float32
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    if cell.method == "qlora_nf4":
        model = in_nf4(model)
    return with_adapters(model, cell.method) if frozen else model


def in_nf4(model):
    """The same with the blocks' layers in bitsandbytes' NF4, through a folder, which is the way that it has."""
    from transformers import BitsAndBytesConfig, Qwen2ForCausalLM

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=model.dtype
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        dtype = model.dtype
        del model
        return Qwen2ForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def with_adapters(model, method: str):
    """LoRA of rank 64 on all layers of the blocks; with embedding and head beside it, where the method says so."""
    from peft import LoraConfig, get_peft_model

    from finetune.compat.on_peft import unquantized

    whole = ["embed_tokens", "lm_head"] if method == "lora_emb" else None
    settings = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS, modules_to_save=whole, task_type="CAUSAL_LM"
    )
    with unquantized():
        return get_peft_model(model, settings)


class Filled(torch.utils.data.Dataset):
    """Samples of one length, of random tokens, all of them supervised."""

    def __init__(self, length: int, count: int, vocabulary: int):
        self.ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i) -> dict:
        return {"input_ids": self.ids[i], "labels": self.ids[i], "attention_mask": torch.ones_like(self.ids[i])}

    def as_dataset(self):
        from datasets import Dataset

        return Dataset.from_dict({key: [self[i][key].tolist() for i in range(len(self))] for key in self[0]})
