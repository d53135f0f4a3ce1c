"""Configuration of first-generation Qwen (1.8B, 7B, 14B, 72B), as the published config.json files spell it."""

from transformers import PretrainedConfig

from .compat import CACHE_NAMES


class QWenConfig(PretrainedConfig):
    """Sizes and switches of a first-generation Qwen model. A checkpoint's own config.json always wins over the defaults.

    Names that are easily misread:

    - `intermediate_size` is TWICE the width of the MLP: w1 and w2 project to intermediate_size / 2 each.
    - `seq_length` is the trained length. Beyond it, outside training, dynamic NTK (`use_dynamic_ntk`) stretches the
      rotary base and LogN (`use_logn_attn`) sharpens the queries.
    - `use_flash_attn` is "auto", True or False: whether flash-attn 2 is taken where it is installed.
    - `use_cache_quantization` keeps the KV cache as int8. With `use_cache_kernel` Triton kernels write and read it on a GPU;
      where they cannot (kv_cache.kernel_obstacle), the model says why, once, and plain torch gives the same.
    - `bf16`, `fp16`, `fp32` say how the published weights were stored; what is loaded is asked for with `dtype=`.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = list(CACHE_NAMES)

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    seq_length: int = 8192
    max_position_embeddings: int = 8192
    rotary_emb_base: int | float = 10000
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    layer_norm_epsilon: float = 1e-6
    no_bias: bool = True
    scale_attn_weights: bool = True
    emb_dropout_prob: float = 0.0
    attn_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    use_flash_attn: bool | str = "auto"
    use_cache: bool = True
    use_cache_quantization: bool = False
    use_cache_kernel: bool = False
    softmax_in_fp32: bool = False
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    onnx_safe: bool | None = None
    tokenizer_type: str = "QWenTokenizer"
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Size of one attention head (`kv_channels` under transformers' name)."""
        return self.kv_channels

    @property
    def num_key_value_heads(self) -> int:
        """As many key and value heads as query heads: first-generation Qwen does not group queries."""
        return self.num_attention_heads

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"kv_channels {self.kv_channels} x num_attention_heads {self.num_attention_heads} must be "
                f"hidden_size, found {self.hidden_size}: config.json does not describe a first-generation Qwen"
            )
        if sum((self.bf16, self.fp16, self.fp32)) > 1:
            raise ValueError("at most one of bf16, fp16 and fp32 can be true in config.json")
        if self.rotary_pct != 1.0:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} in config.json: only 1.0 (the whole head) was ever published"
            )
