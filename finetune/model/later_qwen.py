"""Later Qwens (model_type qwen2, qwen3), transformers' own classes, taught to train on packed rows.

prepare(model) gives a loaded model what first-generation Qwen has here: the loss of a packed row on its supervised positions
alone, without logits, attention that stays within each sample, and norms and gates of one step (fused_blocks.py). Everything else,
generation above all, stays transformers' own. Weights, names of modules and what is saved do not change.

Shapes: T tokens of the row, R supervised positions, H hidden size, N query heads, D head size.
"""

import functools

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from qwen_model.attention import choose_attention, packed_attention
from qwen_model.compat import one_cache, refuse_unknown
from qwen_model.forward_checks import PACKING, check_weights
from qwen_model.head_loss import LMHead, mean_loss
from qwen_model.positions import count_on
from qwen_model.tokenization_qwen import CHAT_TEMPLATE

from ..errors import note
from . import fused_blocks

PACKED = "packed"  # our name among transformers' attention implementations
SLIDING = "some layers attend within a window: one mask for the whole row"


def prepare(model, half_on_cuda: bool = False):
    """Makes a loaded later Qwen take packed rows, in place; returns it. half_on_cuda: offer flash-attn, where it is installed."""
    name, reason = choose_attention() if half_on_cuda else ("sdpa", "as asked for")
    if name == "sdpa" and has_sliding_layers(model.config):
        reason = SLIDING
    elif name == "sdpa":
        name = PACKED
    model.set_attn_implementation(name)
    model.attention_reason = reason
    if type(model.lm_head) is torch.nn.Linear:
        model.lm_head.__class__ = LMHead  # the same parameters: what is tied stays tied
    fused_blocks.install(model)
    if not isinstance(model, PackedRows):
        model.__class__ = with_packed_rows(type(model))
    return model


def has_sliding_layers(config) -> bool:
    """Whether some layers use sliding-window attention."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


@functools.cache
def with_packed_rows(cls):
    """The class under its own name, which config.json states, with PackedRows in front."""
    return type(cls.__name__, (PackedRows, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


class PackedRows:
    """Mixin that overrides a transformers ...ForCausalLM's forward for packed rows, those with shift_labels."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        shift_labels=None,
        shift_weights=None,
        skip_logits: bool | None = None,
        num_items_in_batch=None,
        past_key_values=None,
        **kwargs,
    ):
        """With shift_labels (1, R): the row of batches.pack(), as QWenLMHeadModel.forward takes it. Without: as it ever was.

        The loss is the summed cross-entropy over num_items_in_batch, or over R. With shift_weights (1, R) each label weighs so much
        in the sum, and their sum is in the place of R. In training no logits are returned:
        skip_logits=False asks for them (1, R, V), True saves them in evaluation too.
        Raises TypeError or ValueError for what a packed row has no use for: a mask, a cache, labels, unknown keywords.
        """
        cache = one_cache(cache, past_key_values)
        check_weights(shift_weights, shift_labels)
        if shift_labels is None:
            if skip_logits or kwargs.get("cu_seq_lens_q") is not None and self.config._attn_implementation == PACKED:
                raise ValueError("cu_seq_lens_q and skip_logits belong to a packed row, which comes with shift_labels")
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            # by position: the fourth is past_key_values up to transformers 5.23, then cache
            usual = (input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, use_cache)
            return super().forward(*usual, logits_to_keep=logits_to_keep, **kwargs)
        refuse_unknown("a packed row", kwargs, PACKING)
        if any(given is not None for given in (attention_mask, cache, labels)) or use_cache:
            raise ValueError("a packed row (shift_labels) takes no attention_mask, cache, use_cache or labels: leave them out")
        x_RH = self.packed_hidden(input_ids, position_ids, inputs_embeds, **kwargs)[0, logits_to_keep]
        weights_R = None if shift_weights is None else shift_weights.reshape(-1)
        loss = mean_loss(self.lm_head, x_RH, shift_labels.reshape(-1), weights_R, num_items_in_batch)
        skip_logits = self.training if skip_logits is None else skip_logits
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else self.lm_head(x_RH)[None],
        )

    def packed_hidden(self, input_ids, position_ids, inputs_embeds, **kwargs):
        """The normed output of the last layer, (1, T, H)."""
        name, bounds, mask = self.config._attn_implementation, kwargs["cu_seq_lens_q"], {"full_attention": None}
        listed = kwargs.pop("bounds", None)
        if name == PACKED:
            kwargs["bounds"] = bounds.tolist() if listed is None else listed  # once a row, not once a layer
        elif name == "sdpa":
            mask = None  # transformers makes one, and tells samples apart by their positions
        else:
            mask["sliding_attention"] = None  # flash-attn reads cu_seq_lens and knows windows
        if position_ids is None:
            position_ids = count_on(input_ids if inputs_embeds is None else inputs_embeds, 0, bounds)
        return self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        ).last_hidden_state


def attention(module, query, key, value, attention_mask, scaling=None, dropout: float = 0.0, bounds=None, **kwargs):
    """For transformers' AttentionInterface: query (B, N, T, D), key and value with fewer heads -> ((B, T, N, D), None).

    bounds: where the samples of a packed row begin, and its end. Without them it is transformers' sdpa.
    """
    if bounds is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    refuse_unknown("attention on packed rows", kwargs, (*PACKING, "position_ids", "use_cache"))
    # autocast leaves the rotated ones in float32, which the fast kernels do not take
    query, key = query.to(value.dtype), key.to(value.dtype)
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    lengths = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    return packed_attention(query, key, value, *lengths, bounds, scaling, dropout), None


# ---- chat


def special_ids(tokenizer) -> list[int]:
    """The ids of <|im_end|> and <|endoftext|>, as far as the tokenizer has them."""
    known = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    return [known[token] for token in ("<|im_end|>", "<|endoftext|>") if token in known]


def set_chat_settings(model, tokenizer) -> None:
    """A base model that was tuned on conversations stops where an answer ends; a chat model does so already."""
    settings, ends = model.generation_config, special_ids(tokenizer)
    stops = settings.eos_token_id
    if len(ends) < 2 or ends[0] in (stops if isinstance(stops, list) else [stops]):
        return
    settings.eos_token_id, settings.pad_token_id = ends, ends[1]


def give_chat_template(tokenizer, folder) -> None:
    """Plain ChatML for a tokenizer without a chat template, as some base models' are; saved along with the model."""
    if len(special_ids(tokenizer)) == 2:
        tokenizer.chat_template = CHAT_TEMPLATE
        note(f"{folder}: its tokenizer has no chat template, so conversations are laid out as plain ChatML")


AttentionInterface.register(PACKED, attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
