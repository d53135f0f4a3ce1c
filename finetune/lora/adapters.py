"""LoRA on a loaded model, and what else trains: rows of embedding and head, both matrices whole, biases."""

import dataclasses
from pathlib import Path

from ..compat import on_peft
from ..errors import UserError, shortened
from ..folders import adapter_folder, config_files, finite, model_folder
from . import pissa

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


def add(model, lora, rows: list[int] = (), start: Path | None = None):
    """Adapters as the LoRA flags say; or those of --lora_weight_path, trained on with everything that trained in them.

    rows: token ids whose rows of embedding and head train, of trained_rows(). lora.train_embeddings is resolved: none,
    chat_rows or all. start: a checkpoint that the run goes on from; there PiSSA finds how it began.
    """
    from peft import get_peft_model

    assert lora.train_embeddings != "auto"
    if lora.lora_weight_path:
        return load(model, Path(lora.lora_weight_path), is_trainable=True)
    init = lora.init_lora_weights
    begun = pissa.is_asked_for(init) and start is not None and pissa.stored(start)
    settings = config(model, lora, rows, init="default" if begun else init)
    adapted = apply_peft(lambda: get_peft_model(model, settings))
    if begun:
        pissa.begin_again(adapted, start, init)
    elif pissa.is_asked_for(init):
        pissa.remember(adapted)
    return adapted


def config(model, lora, rows: list[int], init: str):
    """The flags as peft's LoraConfig."""
    from peft import LoraConfig

    whole, tied = lora.train_embeddings == "all", is_tied(model)
    names = embedding_names(model)[: 1 if tied else 2]  # to a tied embedding peft ties the head by itself
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=target_modules(model, lora),
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=True if init == "default" else init,
        modules_to_save=names if whole else None,
        trainable_token_indices={name: list(rows) for name in names} if rows and not whole else None,
        ensure_weight_tying=whole and tied,
        task_type="CAUSAL_LM",
    )


def load(model, folder: Path, is_trainable: bool = False, **settings):
    """The adapter of a folder on its base: to train on, use or merge. settings: of PeftModel.from_pretrained.

    Raises RuntimeError (peft's) where sizes differ.
    """
    from peft import PeftConfig, PeftModel

    finite.check_files(folder, "take an earlier checkpoint of its run")
    try:
        own = PeftConfig.from_pretrained(folder)
    except Exception as error:  # whatever a value of the file makes of peft's classes
        what = f"{folder}/adapter_config.json: cannot be used ({type(error).__name__}: {shortened(error)})"
        raise UserError(f"{what} - copy the adapter's folder again") from error
    init = own.init_lora_weights
    if pissa.stored(folder):  # a checkpoint: its adapters are for a base that lacks what they began with
        own.init_lora_weights = True
    own.inference_mode = not is_trainable
    try:
        adapted = apply_peft(lambda: PeftModel.from_pretrained(model, folder, config=own, is_trainable=is_trainable, **settings))
    except (ValueError, KeyError, TypeError) as error:  # settings that mean no layer of the base, above all
        what = f"{folder}: cannot be put onto its base ({shortened(error, 200)})"
        raise UserError(f"{what} - give the base that it was trained on") from error
    if pissa.stored(folder):
        pissa.take_out_of_base(adapted, pissa.read_start(folder))
        own.init_lora_weights = init
    return adapted if is_trainable else adapted.requires_grad_(False)  # biases too, which peft would leave


def apply_peft(make):
    """Runs make(), which puts peft's adapters on a model, and returns it with our forward for trained rows instead of peft's."""
    from . import low_rank, token_rows

    with on_peft.unquantized(), on_peft.first_values_of_rows():
        adapted = make()
    token_rows.install(adapted)
    low_rank.install(adapted)
    return adapted


def target_modules(model, lora) -> list[str]:
    """The layers of --lora_target_modules; auto: every linear layer of the model's blocks."""
    if list(lora.lora_target_modules) != ["auto"]:
        return list(lora.lora_target_modules)
    return model_folder.block_layers(model.config.model_type)


# ---- embedding and head


def embedding_names(model) -> list[str]:
    """What the model calls its embedding and its head: ["wte", "lm_head"]."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    return [found[id(module)] for module in wanted]


def is_tied(model) -> bool:
    """Whether embedding and head are tied."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def trained_rows(tokenizer, train_embeddings: str, train_tokens: list[str]) -> list[int]:
    """The ids of the tokens whose rows train: of the chat format with chat_rows, and those of --train_tokens; in order.

    Where all rows train, none is listed. Raises UserError for a token that the tokenizer does not know as one.
    """
    wanted = [*(CHAT_TOKENS if train_embeddings == "chat_rows" else ()), *train_tokens]
    if train_embeddings == "all" or not wanted:
        return []
    known = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    if unknown := [token for token in wanted if token not in known]:
        what = f"--train_tokens {' '.join(unknown)}: no special token of this model"
        raise UserError(f"{what} - give some of {', '.join(list(known)[:4])} ..., separated by blanks")
    return sorted({known[token] for token in wanted})


def flags_of(lora, tokenizer):
    """The flags as the adapter of --lora_weight_path says them, its rows by their tokens: for the record of the run.

    Raises UserError where flags ask for rows that do not train in it.
    """
    own = adapter_folder.lora_of_run(lora)
    if own.train_embeddings != "chat_rows":
        return own
    ids = adapter_folder.row_ids(config_files.read_json(Path(lora.lora_weight_path) / "adapter_config.json"))
    known = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    asked = trained_rows(tokenizer, lora.train_embeddings, lora.train_tokens)
    if more := [known[index] for index in asked if index not in ids]:
        what = f"--lora_weight_path {lora.lora_weight_path}: the rows of {' '.join(more)} do not train in it"
        raise UserError(f"{what} - leave out --train_tokens and --train_embeddings, or train a new adapter")
    tokens = [known[index] for index in ids if index in known]
    chat = set(CHAT_TOKENS) <= set(tokens)
    others = [token for token in tokens if not (chat and token in CHAT_TOKENS)]
    return dataclasses.replace(own, train_embeddings="chat_rows" if chat else "none", train_tokens=others)
