"""GPTQ (Frantar et al., 2023), done by gptqmodel, which is imported here: import this file only when needed.

It goes through the model block by block: weights come from the source's files, what is finished goes to a folder. So
memory holds a block, embedding and head, and what the calibration samples are at that depth.
"""

import json
import os
from collections.abc import Callable, Container
from pathlib import Path

import torch
from gptqmodel import DEVICE_THREAD_POOL, QuantizeConfig
from gptqmodel.models.auto import MODEL_MAP
from gptqmodel.models.definitions.qwen import QwenQModel

from .. import json_text
from ..compat import on_gptqmodel
from ..folders import tensor_files
from ..folders.shards import Shards, ShardWriter
from ..writing.new_folder import hide_config_until_done


class FirstGeneration(QwenQModel):
    """gptqmodel's definition, adapted from the published code to the bundled model, whose blocks are given rotary embeddings."""

    shared_input_verified_model_types = frozenset({"qwen"})  # w1 and w2 read the same: statistics are gathered once
    module_tree = [
        "transformer",
        "h",
        "#",
        {
            "ln_1": ("ln_1:!",),
            "attn": ("c_attn:0", "c_proj:1"),
            "ln_2": ("ln_2:!",),
            "mlp": ("w1:0:in=x", "w2:0:in=x", "c_proj:1"),
        },
    ]

    def capture_first_layer_input_kwargs(self, args, kwargs, batch_device, layer_input_kwargs):
        """gptqmodel keeps a block's first argument; the others are the rotary embedding and LogN's factor."""
        rotary, logn = args[1:3]
        here = tuple(part.to(batch_device) for part in rotary)
        return layer_input_kwargs | {"rotary": here, "logn": None if logn is None else logn.to(batch_device)}


def run(source: Path, made: Path, samples: list, settings, dtype, device, layer_done: Callable[[], None]) -> None:
    """Quantizes the layers of `source` (see stripped()) on samples (ids, labels); each gets a folder in `made`.

    settings: Settings. layer_done is called after each block.
    """
    on_gptqmodel.keep_to(made / "logs")
    failures = on_gptqmodel.failures_of_threads()
    config = QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.symmetric,
        format="gptq_v2",  # zero points as they are: gptq_tensors sees to v1
        desc_act=settings.desc_act,
        # groups quantized in the order of their weight: better, in the same format
        act_group_aware=settings.group_size != -1 and not settings.desc_act,
        damp_percent=settings.damp_percent,
        true_sequential=True,
        fallback=None,  # else it rounds to nearest, unasked, where it finds the samples too few
        device="cuda:0" if device.type == "cuda" else "cpu",
        compute_device_filter=lambda devices: devices[:1],
        offload_to_disk=True,
        offload_to_disk_path=str(made),
        pack_impl="original",  # the other one is compiled first, for most of a minute
    )
    kind = json.loads((source / "config.json").read_text(encoding="utf-8"))["model_type"]
    definition = FirstGeneration if kind == "qwen" else MODEL_MAP[kind]
    model = definition.from_pretrained(str(source), quantize_config=config, dtype=dtype, attn_implementation="sdpa")

    def called_back(layer_idx, submodule_finalized) -> None:
        if failures:
            raise failures[0]
        if not submodule_finalized:
            layer_done()

    model.layer_callback = called_back
    try:
        model.quantize([row(ids) for ids, _ in samples], batch_size=1, calibration_data_min_length=1)
    finally:
        DEVICE_THREAD_POOL.wait()  # after Ctrl-C, too: Python cannot end while its threads are at work
    if failures:
        raise failures[0]


def row(ids) -> dict[str, torch.Tensor]:
    """One sample as a batch of one."""
    ids = torch.from_numpy(ids).long()[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stripped(folder: Path, place: Path, names: Container[str]) -> None:
    """Makes `place` a folder of the same model without code, which gptqmodel would import unasked, and without .bin.

    Files are linked; it loads only as long as this process lives. names: of the model's tensors; for tied weights, one key.
    """
    place.mkdir()
    pickled = tensor_files.weight_files(folder)[0].suffix == ".bin"
    without_code(folder / "config.json", place)
    hide_config_until_done(place)  # before there is anything that a config would open
    for path in folder.iterdir():
        if path.name == "tokenizer_config.json":
            without_code(path, place)
        elif path.name == "config.json":
            continue
        elif path.is_file() and path.suffix not in (".py", ".bin") and not path.name.endswith(".bin.index.json"):
            os.symlink(path.resolve(), place / path.name)
    if pickled:
        writer = ShardWriter(place, tensor_files.size_in_bytes(tensor_files.MAX_SHARD_SIZE))
        with Shards(folder) as shards:
            for name in shards:
                if name in names:
                    writer.add(name, shards[name])
            writer.close()


def without_code(file: Path, place: Path) -> None:
    """Copies a JSON file without its auto_map."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("auto_map", None)
    json_text.write(place / file.name, values)
