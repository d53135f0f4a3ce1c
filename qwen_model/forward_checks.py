"""What the model's forward refuses: an argument that nobody would read, or two that say different things, is an error.

Silence would be another answer. All of it is looked at without waiting for a GPU, but for the one case that says so.

Shapes: B batch, T tokens.
"""

from .compat import one_cache, refuse_unknown

# what a packed row brings beside its tokens, and attention reads
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "bounds")
# attention functions whose keywords are known; others, registered with transformers' AttentionInterface, may read more
KNOWN_ATTENTION = ("sdpa", "eager", "flash_attention_2")


def check_keywords(kwargs: dict, attention: str) -> None:
    """TypeError for keywords of QWenModel.forward that neither it nor attention reads; ValueError for a packed row's, without the row."""
    if attention in KNOWN_ATTENTION:
        refuse_unknown("QWenModel.forward", kwargs, PACKING)
    given = [name for name in PACKING if kwargs.get(name) is not None]
    if given and "cu_seq_lens_q" not in given:
        raise ValueError(f"{', '.join(given)}: belong to a packed row, which cu_seq_lens_q describes")


def check_inputs(input_ids, inputs_embeds, position_ids) -> None:
    """ValueError unless there is one of the first two, and positions, if given, are one a token."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give input_ids or inputs_embeds, one of them")
    B, T = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
    if position_ids is not None and (position_ids.shape[-1] != T or position_ids.ndim != 2 or len(position_ids) not in (1, B)):
        raise ValueError(f"position_ids must be ({B}, {T}) or (1, {T}), one a token; they are {tuple(position_ids.shape)}")


def check_weights(shift_weights, shift_labels) -> None:
    """ValueError for weights of labels that are not there, or not one for each."""
    if shift_weights is None:
        return
    if shift_labels is None:
        raise ValueError("shift_weights are what each of shift_labels weighs in the loss: give those, too")
    if shift_weights.shape != shift_labels.shape:
        shapes = f"{tuple(shift_labels.shape)}, one for each of shift_labels; they are {tuple(shift_weights.shape)}"
        raise ValueError(f"shift_weights must be {shapes}")


def check_packed(batch: int, kwargs: dict, attention_mask, cache, use_cache) -> None:
    """ValueError for what does not go with a packed row."""
    if kwargs.get("max_length_q") is None:
        raise ValueError("cu_seq_lens_q comes with max_length_q, the tokens of the longest sample")
    if attention_mask is not None or cache is not None or use_cache:
        raise ValueError("a packed row (cu_seq_lens_q) takes no attention_mask, cache or use_cache: leave them out")
    if batch != 1:
        raise ValueError("cu_seq_lens_q describes one packed row: the batch must be 1")


def check_mask(attention_mask, cache, tokens: int) -> None:
    """ValueError for a mask (B, keys) of another width than the tokens in the cache and those of this pass together."""
    if attention_mask is None or attention_mask.ndim != 2 or getattr(cache, "is_compileable", False):
        return  # a static cache has room for more, and counts its tokens on the GPU
    past = cache.get_seq_length() if cache is not None else 0
    if attention_mask.shape[1] != past + tokens:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {past + tokens} tokens ({past} of them in the cache): it must "
            "cover them all"
        )


def check_cache(checkpointing: bool, cache, use_cache, position_ids, attention_mask) -> None:
    """ValueError for a cache that was asked for and cannot be.

    Where a cache is asked for by use_cache=True, positions are given and no mask is, a GPU is waited for: to see that they count on.
    """
    if checkpointing and (cache is not None or use_cache):
        raise ValueError("a cache does not go with gradient checkpointing: use_cache=False, model.eval() or torch.no_grad()")
    if use_cache and cache is None and position_ids is not None and attention_mask is None:
        if position_ids.shape[1] > 1 and bool((position_ids.diff() != 1).any()):
            raise ValueError("position_ids begin several samples in a row, of which no cache is kept: use_cache=False")


def check_attentions(attention: str, packed: bool) -> None:
    """ValueError where attention weights are asked for and nobody keeps them."""
    if packed or attention != "eager":
        what = "a packed row" if packed else f"attn_implementation={attention!r}"
        raise ValueError(f'output_attentions takes attn_implementation="eager" and rows that are not packed: this is {what}')


def check_forward(config, checkpointing: bool, input_ids, inputs_embeds, attention_mask, position_ids, cache, past_key_values,
                  use_cache, output_attentions, kwargs: dict):  # fmt: skip
    """All of it; returns the one cache that was given, by either name, or None."""
    check_keywords(kwargs, config._attn_implementation)
    check_inputs(input_ids, inputs_embeds, position_ids)
    cache, packed = one_cache(cache, past_key_values), kwargs.get("cu_seq_lens_q") is not None
    check_cache(checkpointing, cache, use_cache, position_ids, attention_mask)
    batch, tokens = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
    if packed:
        check_packed(batch, kwargs, attention_mask, cache, use_cache)
    check_mask(attention_mask, cache, tokens)
    if output_attentions:
        check_attentions(config._attn_implementation, packed)
    return cache
