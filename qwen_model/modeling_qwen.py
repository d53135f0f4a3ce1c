"""First-generation Qwen (model_type "qwen") on transformers' own interfaces.

Pre-norm blocks: x = x + attn(ln_1(x)); x = x + mlp(ln_2(x)); then ln_f and an untied head. Rotary positions over the whole
head, a bias on query, key and value only, and an MLP c_proj(w1(x) * silu(w2(x))): w2 is the gated one, w1 is not.

Shapes, one letter each: B batch, T tokens, H hidden size, N heads, D head size, F MLP width, V vocabulary, R supervised rows.
"""

import torch
from torch import nn
from torch.nn.functional import dropout
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .attention import attend, choose_attention
from .compat import CACHE_NAMES, FOR_GENERATE, cache_name, check_generation_inputs, one_cache, overrides
from .configuration_qwen import QWenConfig
from .forward_checks import check_forward, check_weights
from .fused import gated, rms_norm, rotated_heads
from .generation_qwen import QWenChatMixin
from .head_loss import LMHead, mean_loss
from .kv_cache import Int8Cache, kernel_obstacle
from .positions import QWenRotaryEmbedding, alpha_of_pass, count_on, logn_factor

logger = logging.get_logger(__name__)

CACHE = cache_name(BaseModelOutputWithPast)


class QWenRMSNorm(nn.Module):
    """x / rms(x) times a weight; see fused.rms_norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class QWenAttention(nn.Module):
    """Multi-head attention; c_attn holds query, key and value stacked in that order."""

    is_causal = True
    num_key_value_groups = 1  # for transformers' attention functions: no grouped queries

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.attn_dropout_prob = config.attn_dropout_prob
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(self, x_BTH, rotary, logn, attention_mask=None, cache: Cache | None = None, **kwargs):
        """rotary: (cos, sin); logn None or (B, 1, T, 1); kwargs: bounds, cache_kernel and more, see attention.attend."""
        query, key, value = rotated_heads(self.c_attn(x_BTH), *rotary, self.head_dim)
        if logn is not None:
            query = (query * logn).to(query.dtype)
        if cache is not None:
            # read by the kernels, the int8 cache gives its (q, scale, zero point) instead of tensors
            as_it_is = {"kernel": True} if kwargs.get("cache_kernel") else {}
            key, value = cache.update(key, value, self.layer_idx, **as_it_is)
        dropout_p = self.attn_dropout_prob if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, self.scaling, dropout_p, **kwargs)
        return self.c_proj(out.reshape(x_BTH.shape)), weights


class QWenMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))), width intermediate_size / 2."""

    def __init__(self, config: QWenConfig):
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, x_BTH):
        return self.c_proj(gated(self.w1(x_BTH), self.w2(x_BTH)))


class QWenBlock(GradientCheckpointingLayer):
    """One pre-norm block."""

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, x_BTH, rotary=None, logn=None, attention_mask=None, cache=None, **kwargs):
        """-> (x (B, T, H), attention weights or None)"""
        attended, weights = self.attn(self.ln_1(x_BTH), rotary, logn, attention_mask, cache, **kwargs)
        x_BTH = x_BTH + attended
        return x_BTH + self.mlp(self.ln_2(x_BTH)), weights


class QWenPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    attention_reason = "as asked for"

    @overrides(PreTrainedModel)
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True: transformers looks for its own words in this file, and would leave set_attn_implementation without effect."""
        return True

    @overrides(PreTrainedModel, "requested_attention", "is_init_check")
    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """What the user asks for; else flash-attn 2 where it is installed and config.use_flash_attn lets it, else sdpa."""
        if requested_attention is None:
            requested_attention, reason = choose_attention(self.config.use_flash_attn)
            if self.config.use_cache_quantization and requested_attention == "flash_attention_2":
                requested_attention = "sdpa"
                reason = "the int8 KV cache does not go together with flash-attn: the cache wins"
                logger.warning(f"attention: sdpa ({reason})")
            logger.info(f"attention: {requested_attention} ({reason})")
            self.attention_reason = reason
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class QWenModel(QWenPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.rotary = QWenRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, embeddings):
        self.wte = embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache: Cache | None = None,
        inputs_embeds=None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ):
        """input_ids (B, T) or inputs_embeds (B, T, H) -> hidden states (B, T, H).

        attention_mask (B, keys): 1 for tokens, 0 for padding, on either side. position_ids default to counting from the row's
        first token, padding included, as the published model does; without a mask and a cache, position_ids that restart mark
        the beginning of another sample. Where nobody says use_cache, there is a cache unless the model trains or positions are
        given without a mask. A packed row (B = 1) brings cu_seq_lens_q and max_length_q (transformers' names), and
        bounds, the first as a list: samples lie one after another and do not see each other.
        cache: past_key_values is its name before transformers 5.24.
        Raises TypeError for a keyword that nobody would read, ValueError for what does not go together.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = check_forward(
            self.config, self.checkpoints(), input_ids, inputs_embeds, attention_mask, position_ids, cache, past_key_values,
            use_cache, output_attentions, kwargs,
        )  # fmt: skip
        if cache is None and (self.usually_caches(position_ids, attention_mask, kwargs) if use_cache is None else use_cache):
            cache = self.new_cache()
        x_BTH = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if torch.is_autocast_enabled(x_BTH.device.type):
            # a float32 embedding under autocast would make the whole residual stream float32: twice the memory, and other
            # numbers than under DeepSpeed, which casts the embedding itself
            x_BTH = x_BTH.to(torch.get_autocast_dtype(x_BTH.device.type))
        x_BTH = dropout(x_BTH, self.config.emb_dropout_prob, self.training)

        past = cache.get_seq_length() if cache is not None else 0
        given_positions = position_ids
        if position_ids is None:
            position_ids = count_on(x_BTH, past, kwargs.get("cu_seq_lens_q"))
        alpha = logn = None
        longest = kwargs.get("max_length_q") or x_BTH.shape[1]
        if not self.training:
            alpha = alpha_of_pass(self.config, x_BTH, attention_mask, past, cache, kwargs.get("cu_seq_lens_q"), longest)
            logn = logn_factor(self.config, position_ids, past + longest)
        rotary = self.rotary(position_ids, alpha)
        mask = None
        bounds = kwargs.pop("bounds", None)
        if kwargs.get("cu_seq_lens_q") is not None:
            if self.config._attn_implementation != "flash_attention_2":  # which reads cu_seq_lens itself
                # to ask a GPU for them is to wait until it has done all that it was given: once a row, if it must be
                kwargs["bounds"] = kwargs["cu_seq_lens_q"].tolist() if bounds is None else bounds
        else:
            # by position, because the name of the cache is not the same in all versions
            mask = create_causal_mask(self.config, x_BTH, attention_mask, cache, given_positions)
            if self.config._attn_implementation == "flash_attention_2" and attention_mask is None and cache is None:
                kwargs["position_ids"] = given_positions  # in which transformers' function finds samples that begin anew
            if self.config.use_cache_kernel and cache is not None:
                kwargs["cache_kernel"] = self.cache_kernel(cache, x_BTH, mask)

        hidden_states, attentions = (x_BTH,), ()
        for block in self.h:
            x_BTH, weights = block(x_BTH, rotary, logn, mask, cache, **kwargs)
            if output_hidden_states:
                hidden_states += (x_BTH,)
            if output_attentions:
                attentions += (weights,)
        x_BTH = self.ln_f(x_BTH)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTH,
            # as in all of transformers: the last entry is the normed output
            hidden_states=hidden_states[:-1] + (x_BTH,) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            **{CACHE: cache},
        )

    def checkpoints(self) -> bool:
        """Whether the blocks run twice, for the backward pass: a cache would be written twice."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def usually_caches(self, position_ids, attention_mask, kwargs) -> bool:
        """Whether a cache is made where nobody says: not in training, nor for a row that may hold several samples."""
        several = kwargs.get("cu_seq_lens_q") is not None or (position_ids is not None and attention_mask is None)
        return self.config.use_cache and not self.training and not several

    def new_cache(self) -> Cache:
        """The cache that the config asks for: int8, through which no gradient flows, or transformers' usual one."""
        quantized = self.config.use_cache_quantization and not self.training
        return Int8Cache() if quantized else DynamicCache(config=self.config)

    def cache_kernel(self, cache: Cache, x_BTH, mask) -> bool:
        """Whether the kernels read the cache in this pass. Said once, and with the reason where config.json asks in vain."""
        obstacle = kernel_obstacle(self.config, cache, x_BTH, mask, self.training)
        if obstacle:
            logger.warning_once(f"use_cache_kernel has no effect: {obstacle}")
        else:
            logger.info_once("int8 KV cache: read by the Triton kernels")
        return not obstacle


class QWenLMHeadModel(QWenChatMixin, QWenPreTrainedModel, GenerationMixin):
    """The model with its head: logits, loss, `generate`, and the chat methods of QWenChatMixin."""

    accepts_loss_kwargs = True

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache: Cache | None = None,
        inputs_embeds=None,
        labels=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        shift_labels=None,
        shift_weights=None,
        num_items_in_batch=None,
        skip_logits: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ):
        """Logits (B, kept, V), and the loss if there are labels. More keywords, and what is refused: QWenModel.forward.

        labels (B, T), -100 where nothing is learnt, are shifted by one here; shift_labels are taken as they are, one for each
        position that logits_to_keep (a number of last positions, or a tensor of positions) keeps. The loss is the summed
        cross-entropy over num_items_in_batch, or over the number of labels. shift_weights, of the shape of shift_labels, are what each
        of them weighs in that sum, and in place of their number stands the sum of weights. With labels, in training, no logits are
        returned: skip_logits=False asks for them, True saves them in evaluation too.
        """
        if labels is not None and shift_labels is not None:
            raise ValueError("labels and shift_labels say the same in two ways: give one of them")
        check_weights(shift_weights, shift_labels)
        cache = one_cache(cache, past_key_values)
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        out = self.transformer(*given, return_dict=True, **kwargs)
        x_BTH, loss, logits = out.last_hidden_state, None, None
        if labels is not None or shift_labels is not None:
            loss = self.loss(x_BTH, labels, shift_labels, shift_weights, logits_to_keep, num_items_in_batch)
            skip_logits = self.training if skip_logits is None else skip_logits
        if not skip_logits:
            logits = self.lm_head(keep(x_BTH, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{CACHE: out[CACHE] if CACHE in out else None},
        )

    def loss(self, x_BTH, labels, shift_labels, shift_weights, logits_to_keep, num_items_in_batch):
        """Only supervised positions reach the head."""
        if shift_labels is None:
            x_BTH, shift_labels = x_BTH[:, :-1], labels[:, 1:]
        else:
            x_BTH = keep(x_BTH, logits_to_keep)
        labels_R, x_RH = shift_labels.reshape(-1), x_BTH.reshape(-1, x_BTH.shape[-1])
        weights_R = None if shift_weights is None else shift_weights.reshape(-1)
        if not isinstance(logits_to_keep, torch.Tensor):
            supervised = (labels_R != -100).nonzero().squeeze(1)
            labels_R, x_RH = labels_R[supervised], x_RH[supervised]
            weights_R = None if weights_R is None else weights_R[supervised]
        return mean_loss(self.lm_head, x_RH, labels_R, weights_R, num_items_in_batch)

    @overrides(GenerationMixin)
    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Positions count from the row's first token, padding included; forward does that by itself."""
        return None

    @overrides(GenerationMixin, "generation_config", "model_kwargs")
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """The int8 cache where the config asks for it and the user brings none."""
        for name in CACHE_NAMES:  # either is taken; transformers looks for its own
            if name != CACHE and model_kwargs.get(name) is not None:
                model_kwargs[CACHE] = one_cache(model_kwargs.get(CACHE), model_kwargs.pop(name))
        brought = model_kwargs.get(CACHE) is not None
        if self.config.use_cache_quantization and generation_config.use_cache and not brought:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} and use_cache_quantization, of "
                    "config.json, ask for two different caches: leave one of them out"
                )
            model_kwargs[CACHE] = Int8Cache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @overrides(GenerationMixin)
    def init_continuous_batching(self, *args, **kwargs):
        """transformers' way for many requests at once, generate_batch too: its paged cache knows neither NTK nor int8."""
        raise NotImplementedError("continuous batching does not go with first-generation Qwen: chat_batch, or generate with padding")

    @overrides(GenerationMixin, "input_ids", "inputs_embeds")
    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        """transformers' own, and a look whether the cache came along: without it the answer would be nonsense.

        inputs_embeds by its name: transformers looks in this signature whether generation can begin with it.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        check_generation_inputs(inputs, input_ids.shape[1])
        return {name: value for name, value in inputs.items() if name not in FOR_GENERATE}


def keep(x_BTH, logits_to_keep):
    """The last positions (a number, 0 for all) or the given ones (a tensor of positions)."""
    if isinstance(logits_to_keep, int):
        logits_to_keep = slice(-logits_to_keep, None)
    return x_BTH[:, logits_to_keep]
