"""config.json, generation_config.json and the settings of GPTQ, of one layout as the other has them."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.generation_qwen import MAX_NEW_TOKENS, MAX_WINDOW_SIZE
from qwen_model.tokenization_qwen import N_RANKS

from ..errors import UserError, note
from ..folders import config_files, model_folder
from . import export_checks, layouts

END_OF_TEXT, START_OF_TURN, END_OF_TURN = N_RANKS, N_RANKS + 1, N_RANKS + 2
STOPS = [END_OF_TURN, START_OF_TURN, END_OF_TEXT]  # of a chat model; see chatml.stop_ids
# What both kinds of generation_config.json say in the same words. max_new_tokens is not among them: what is a default
# of chat() here would be a limit to every answer of a server.
SAMPLING = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "length_penalty", "num_beams",
)  # fmt: skip
# Of a config, what is not the network's, is written anew, or (rope_theta) is said twice.
NOT_THE_NETWORK = {
    "dtype", "torch_dtype", "quantization_config", "transformers_version", "architectures", "eos_token_id",
    "rope_theta", "_name_or_path",
}  # fmt: skip


# ---- config.json


def to_qwen2(config: QWenConfig, folder: Path):
    """The Qwen2Config of the same network. Beyond the length that it states, the two would compute different things."""
    from transformers import Qwen2Config

    if not config.scale_attn_weights:
        what = f"{folder}/config.json: scale_attn_weights is false, and the layout of qwen2 always scales"
        raise UserError(f"{what} - it cannot go along; serve this model in its own layout")
    made = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // 2,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        hidden_act="silu",
        max_position_embeddings=exact_length(config),
        initializer_range=config.initializer_range,
        rms_norm_eps=config.layer_norm_epsilon,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_emb_base)},
        use_sliding_window=False,
        max_window_layers=config.num_hidden_layers,
        attention_dropout=config.attn_dropout_prob,
    )
    made.rope_theta = float(config.rotary_emb_base)  # where transformers 4 and servers look
    return made


def exact_length(config: QWenConfig) -> int:
    """Up to how many tokens the layout of qwen2 computes what first-generation Qwen does."""
    if config.use_dynamic_ntk or config.use_logn_attn:
        return config.seq_length
    return max(config.seq_length, config.max_position_embeddings)


def note_of_length(config: QWenConfig) -> None:
    """Says what cannot go along."""
    left = [name for name in ("use_dynamic_ntk", "use_logn_attn") if getattr(config, name)]
    if left:
        what = f"{' and '.join(left)} act beyond {config.seq_length} tokens, and the layout of qwen2 has no such thing"
        note(f"{what}: max_position_embeddings is {config.seq_length}, the longest length that is exact")
    if config.use_cache_quantization:
        note("use_cache_quantization is left out: how the KV cache is held is for the server to say")


def to_qwen(config, folder: Path, record: dict) -> QWenConfig:
    """The QWenConfig of the same network; of an export of first-generation Qwen the one that it came from.

    config: a Qwen2Config. record: of the folder. Raises UserError for what first-generation Qwen does not have.
    """
    if findings := [f"{folder}/config.json: {what}" for what in beyond_first_generation(config)]:
        raise UserError(*findings)
    came_from = record.get("exported", {})
    if came_from.get("layout") == export_checks.QWEN:
        original = QWenConfig.from_dict(came_from["config"])
        if network(to_qwen2(original, folder)) == network(config):
            return original
    theta, length = config.rope_parameters["rope_theta"], config.max_position_embeddings
    return QWenConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.hidden_size // config.num_attention_heads,
        seq_length=length,
        max_position_embeddings=length,
        rotary_emb_base=int(theta) if theta == int(theta) else theta,
        use_dynamic_ntk=False,
        use_logn_attn=False,
        layer_norm_epsilon=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        attn_dropout_prob=config.attention_dropout,
    )


def beyond_first_generation(config) -> list[str]:
    """A line for each thing in a Qwen2Config that cannot be said in a QWenConfig."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rope = config.rope_parameters.get("rope_type", "default")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = {
        f"{heads} heads share {groups} of key and value, and first-generation Qwen has one for each": heads != groups,
        "embedding and head are one matrix (tie_word_embeddings), and first-generation Qwen has two": (
            config.tie_word_embeddings
        ),
        "layers attend within a window (use_sliding_window), and first-generation Qwen's do not": (
            config.use_sliding_window or "sliding_attention" in config.layer_types
        ),
        f"rotary positions of the kind {rope}, and first-generation Qwen has plain ones": rope != "default",
        f"hidden_act is {config.hidden_act}, and first-generation Qwen has silu": config.hidden_act != "silu",
        f"heads of size {size} do not make up hidden_size {config.hidden_size}": size * heads != config.hidden_size,
    }
    return [f"{what} - it cannot go there; use it in its own layout" for what, true in found.items() if true]


def network(config) -> dict:
    """What a config says of the numbers that the model computes."""
    return {key: value for key, value in config.to_dict().items() if key not in NOT_THE_NETWORK}


# ---- generation_config.json


@dataclass
class GenerationFile:
    """Stands where a GenerationConfig does in model_writer.write_frame; transformers would find fault with some.

    Published folders say top_p and leave do_sample out; transformers reads that, but does not write it.
    """

    settings: dict

    def save_pretrained(self, folder: Path) -> None:
        text = json.dumps(self.settings, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")


def generation(settings: dict, folder: Path, layout: str, record: dict) -> dict:
    """generation_config.json in the other layout.

    settings: in `layout`, {} if there are none; folder: the model's; record: of the folder that the settings are from.
    What an export came from is what it goes back to, as long as nobody has changed it since.
    """
    came_from, chat = record.get("exported", {}), chats(settings, layout)
    if layout == export_checks.QWEN2 and came_from.get("layout") == export_checks.QWEN:
        original = came_from["generation_config"]
        if original and same_settings(generation_for_qwen2(original, chats(original, export_checks.QWEN)), settings):
            return original
    if layout == export_checks.QWEN:
        return generation_for_qwen2(settings, chat)
    return generation_for_qwen(settings, chat, model_folder.trained_length(config_files.config_of(folder)))


def chats(settings: dict, layout: str) -> bool:
    """Do a chat model's settings say so?"""
    stops = settings.get("eos_token_id")
    if layout == export_checks.QWEN:
        return settings.get("chat_format") == "chatml"
    return END_OF_TURN in (stops if isinstance(stops, list) else [stops])


def generation_for_qwen2(settings: dict, chats: bool) -> dict:
    ends = {"eos_token_id": STOPS if chats else settings.get("eos_token_id", END_OF_TEXT)}
    return carried(settings) | ends | {"pad_token_id": settings.get("pad_token_id", END_OF_TEXT)}


def generation_for_qwen(settings: dict, chats: bool, seq_length: int) -> dict:
    ends = {"eos_token_id": STOPS if chats else END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    chat = {"chat_format": "chatml" if chats else "raw", "max_window_size": min(MAX_WINDOW_SIZE, seq_length)}
    return carried(settings) | ends | chat | {"max_new_tokens": settings.get("max_new_tokens", MAX_NEW_TOKENS)}


def carried(settings: dict) -> dict:
    return {key: settings[key] for key in SAMPLING if settings.get(key) is not None}


def same_settings(ours: dict, found: dict) -> bool:
    return all(found.get(key) == value for key, value in ours.items()) and carried(found) == carried(ours)


def settings_of(folder: Path) -> dict:
    """generation_config.json as it lies there, or {}."""
    path = folder / "generation_config.json"
    return config_files.read_json(path) if path.is_file() else {}


# ---- GPTQ


def quantization(settings: dict, layout: str, folder: Path) -> dict:
    """The settings of GPTQ, which name layers, for the other layout. UserError where rules of their own name them."""
    if settings.get("dynamic"):
        what = f"{folder}: its GPTQ settings have rules for single layers (dynamic), which name them by patterns"
        raise UserError(f"{what} - export the 16-bit model and quantize that")
    renamed = copy.deepcopy(settings)
    for key in ("modules_in_block_to_quantize", "inside_layer_modules"):
        if settings.get(key):
            renamed[key] = [across(group, layout, folder, key) for group in settings[key]]
    return renamed


def across(group: list[str], layout: str, folder: Path, key: str) -> list[str]:
    """Layers that are quantized together, under the names of the other layout."""
    kinds = layouts.KINDS[layout]
    if unknown := [name for name in group if name not in kinds]:
        what = f"{folder}: {key} of its GPTQ settings lists {unknown[0]}, which is no layer of it"
        raise UserError(f"{what} - take the published file")
    return list(dict.fromkeys(new for name in group for new in kinds[name]))
