"""Converts config.json, generation_config.json and the GPTQ settings from one layout to the other."""

import copy
from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2Config

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.generation_qwen import MAX_NEW_TOKENS, MAX_WINDOW_SIZE
from qwen_model.tokenization_qwen import N_RANKS

from .. import json_text
from ..errors import UserError, note
from ..folders import config_files, model_folder
from . import export_checks, layouts

END_OF_TEXT, START_OF_TURN, END_OF_TURN = N_RANKS, N_RANKS + 1, N_RANKS + 2
STOPS = [END_OF_TURN, START_OF_TURN, END_OF_TEXT]  # of a chat model; see chatml.stop_ids
# The keys of generation_config.json that mean the same in both layouts. max_new_tokens is not copied to qwen2: here it is
# a default of chat(), and a server would cut every answer at it.
SAMPLING = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "length_penalty", "num_beams",
)  # fmt: skip
# Keys of config.json that do not describe the network, that are written anew, or (rope_theta) that repeat another key.
NOT_THE_NETWORK = {
    "dtype", "torch_dtype", "quantization_config", "transformers_version", "architectures", "eos_token_id",
    "rope_theta", "_name_or_path",
}  # fmt: skip


# ---- config.json


def to_qwen2(config: QWenConfig, folder: Path):
    """The Qwen2Config of the same network. Both compute the same up to its max_position_embeddings.

    Raises UserError for a setting that Qwen2 does not have.
    """
    if not config.scale_attn_weights:
        what = f"{folder}/config.json: scale_attn_weights is false, and Qwen2 always scales attention"
        raise UserError(f"{what} - it cannot be exported; serve this model in its own layout")
    converted = Qwen2Config(
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
    converted.rope_theta = float(config.rotary_emb_base)  # transformers 4 and some servers read it here
    return converted


def exact_length(config: QWenConfig) -> int:
    """The number of tokens up to which Qwen2 computes the same as first-generation Qwen."""
    if config.use_dynamic_ntk or config.use_logn_attn:
        return config.seq_length
    return max(config.seq_length, config.max_position_embeddings)


def note_length_limits(config: QWenConfig) -> None:
    """Prints what Qwen2 has no setting for: dynamic NTK, LogN attention, the int8 KV cache."""
    left = [name for name in ("use_dynamic_ntk", "use_logn_attn") if getattr(config, name)]
    if left:
        what = f"Qwen2 has no {' and no '.join(left)}, in effect beyond {config.seq_length} tokens"
        note(f"{what}: max_position_embeddings is set to {config.seq_length}, up to which both compute the same")
    if config.use_cache_quantization:
        note("use_cache_quantization is left out: the server decides how it stores the KV cache")


def to_qwen(config, folder: Path, record: dict) -> QWenConfig:
    """The QWenConfig of the same network. Where the folder is an unchanged export, the original QWenConfig.

    config: a Qwen2Config. record: the folder's training.json. Raises UserError for what first-generation Qwen does not have.
    """
    if findings := [f"{folder}/config.json: {what}" for what in unsupported_by_first_generation(config)]:
        raise UserError(*findings)
    source = record.get("exported", {})
    if source.get("layout") == export_checks.QWEN:
        original = QWenConfig.from_dict(source["config"])
        if network_settings(to_qwen2(original, folder)) == network_settings(config):
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


def unsupported_by_first_generation(config) -> list[str]:
    """A line for each setting of a Qwen2Config that first-generation Qwen does not have."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rope = config.rope_parameters.get("rope_type", "default")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = {
        f"{heads} query heads share {groups} key/value heads, and first-generation Qwen has one for each": heads != groups,
        "embedding and head are tied (tie_word_embeddings), and first-generation Qwen's are not": (
            config.tie_word_embeddings
        ),
        "some layers use sliding-window attention, and first-generation Qwen has none": (
            config.use_sliding_window or "sliding_attention" in config.layer_types
        ),
        f"rope_type is {rope}, and first-generation Qwen has default": rope != "default",
        f"hidden_act is {config.hidden_act}, and first-generation Qwen has silu": config.hidden_act != "silu",
        f"{heads} heads of size {size} do not add up to hidden_size {config.hidden_size}": size * heads != config.hidden_size,
    }
    return [f"{what} - it cannot be exported; use it in its own layout" for what, true in found.items() if true]


def network_settings(config) -> dict:
    """The settings that the model's numbers depend on."""
    return {key: value for key, value in config.to_dict().items() if key not in NOT_THE_NETWORK}


# ---- generation_config.json


@dataclass
class GenerationFile:
    """Written by model_writer.write_frame in the place of a GenerationConfig, which refuses to write some valid files.

    Published folders have top_p without do_sample; transformers reads that, but refuses to write it.
    """

    settings: dict

    def save_pretrained(self, folder: Path) -> None:
        json_text.write(folder / "generation_config.json", self.settings)


def generation_config(settings: dict, folder: Path, layout: str, record: dict) -> dict:
    """generation_config.json for the other layout.

    settings: as in `layout`, or {}; folder: the model's; record: training.json of the folder that the settings are from.
    An export whose settings nobody has changed gets its original file back.
    """
    source, chat = record.get("exported", {}), is_chat_model(settings, layout)
    if layout == export_checks.QWEN2 and source.get("layout") == export_checks.QWEN:
        original = source["generation_config"]
        exported = generation_config_for_qwen2(original, is_chat_model(original, export_checks.QWEN))
        if original and same_settings(exported, settings):
            return original
    if layout == export_checks.QWEN:
        return generation_config_for_qwen2(settings, chat)
    return generation_config_for_qwen(settings, chat, model_folder.trained_length(config_files.config_of(folder)))


def is_chat_model(settings: dict, layout: str) -> bool:
    """Whether generation_config.json is a chat model's."""
    stops = settings.get("eos_token_id")
    if layout == export_checks.QWEN:
        return settings.get("chat_format") == "chatml"
    return END_OF_TURN in (stops if isinstance(stops, list) else [stops])


def generation_config_for_qwen2(settings: dict, chat: bool) -> dict:
    ends = {"eos_token_id": STOPS if chat else settings.get("eos_token_id", END_OF_TEXT)}
    return sampling_settings(settings) | ends | {"pad_token_id": settings.get("pad_token_id", END_OF_TEXT)}


def generation_config_for_qwen(settings: dict, chat: bool, seq_length: int) -> dict:
    ends = {"eos_token_id": STOPS if chat else END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    window = {"chat_format": "chatml" if chat else "raw", "max_window_size": min(MAX_WINDOW_SIZE, seq_length)}
    return sampling_settings(settings) | ends | window | {"max_new_tokens": settings.get("max_new_tokens", MAX_NEW_TOKENS)}


def sampling_settings(settings: dict) -> dict:
    return {key: settings[key] for key in SAMPLING if settings.get(key) is not None}


def same_settings(ours: dict, found: dict) -> bool:
    return all(found.get(key) == value for key, value in ours.items()) and sampling_settings(found) == sampling_settings(ours)


def settings_of(folder: Path) -> dict:
    """generation_config.json of a folder, or {}."""
    path = folder / "generation_config.json"
    return config_files.read_json(path) if path.is_file() else {}


# ---- GPTQ


def quantization_config(settings: dict, layout: str, folder: Path) -> dict:
    """GPTQ settings with the other layout's layer names. UserError for `dynamic`, whose patterns cannot be renamed."""
    if settings.get("dynamic"):
        what = f"{folder}: its GPTQ settings have rules for single layers (dynamic), which name them by patterns"
        raise UserError(f"{what} - export the 16-bit model and quantize that")
    renamed = copy.deepcopy(settings)
    for key in ("modules_in_block_to_quantize", "inside_layer_modules"):
        if settings.get(key):
            renamed[key] = [renamed_layers(group, layout, folder, key) for group in settings[key]]
    return renamed


def renamed_layers(group: list[str], layout: str, folder: Path, key: str) -> list[str]:
    """The other layout's names for a group of layers that are quantized together."""
    kinds = layouts.KINDS[layout]
    if unknown := [name for name in group if name not in kinds]:
        what = f"{folder}: {key} of its GPTQ settings lists {unknown[0]}, which is not a layer of the model"
        raise UserError(f"{what} - take the published file")
    return list(dict.fromkeys(new for name in group for new in kinds[name]))
