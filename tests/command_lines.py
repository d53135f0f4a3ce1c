"""A place to try command lines in: a checkpoint of zeros, a data file, and what check_flags() finds there."""

import json
from collections import namedtuple
from pathlib import Path

from finetune.errors import UserError
from finetune.flags import args as arguments
from finetune.flags import checks, definitions

CONFIG = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_channels": 16,
    "intermediate_size": 96, "seq_length": 64, "max_position_embeddings": 64, "use_dynamic_ntk": True,
    "use_logn_attn": True, "torch_dtype": "bfloat16", "transformers_version": "4.32.0", "onnx_safe": None,
}  # fmt: skip
SHAPES = {
    "transformer.wte.weight": [300, 32],
    "transformer.h.0.ln_1.weight": [32],
    "transformer.h.0.attn.c_attn.weight": [96, 32],
    "transformer.h.0.attn.c_attn.bias": [96],
    "transformer.h.0.attn.c_proj.weight": [32, 32],
    "transformer.h.0.ln_2.weight": [32],
    "transformer.h.0.mlp.w1.weight": [48, 32],
    "transformer.h.0.mlp.w2.weight": [48, 32],
    "transformer.h.0.mlp.c_proj.weight": [32, 48],
    "transformer.ln_f.weight": [32],
    "lm_head.weight": [300, 32],
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
World = namedtuple("World", "model data out")


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """A file of zeros in bfloat16, in the format's own terms: length of the header, header, data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_config(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write_adapter(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 64, "lora_alpha": 16, "target_modules": ["w2", "w1", "c_proj", "c_attn"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    write_safetensors(folder / "adapter_model.safetensors", factors((settings | changes)["r"]))
    return folder


def factors(rank) -> dict[str, list]:
    """{name: shape} of A and B for each layer of SHAPES."""
    layers = {name[:-7]: shape for name, shape in SHAPES.items() if name.endswith(("c_attn.weight", "c_proj.weight", "w1.weight", "w2.weight"))}
    rank = rank if type(rank) is int and 0 < rank < 1000 else 1  # of a hostile one, the settings speak
    shapes = {name: {"A": [rank, inputs], "B": [outputs, rank]} for name, (outputs, inputs) in layers.items()}
    return {f"base_model.model.{name}.lora_{side}.weight": both[side] for name, both in shapes.items() for side in "AB"}


def write_checkpoint(folder: Path, adapter: dict | None = None) -> Path:
    """What is looked at of a checkpoint: that it is whole, and its method."""
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_text("{}")
    if adapter is not None:
        write_adapter(folder, **adapter)
    return folder


def make_world(folder: Path) -> World:
    """A checkpoint, a data file and an output folder that does not exist yet."""
    model = folder / "Qwen model.v1"
    model.mkdir()
    write_config(model)
    write_safetensors(model / "model.safetensors", SHAPES)
    (model / "generation_config.json").write_text('{"chat_format": "chatml"}')
    (model / "qwen.tiktoken").write_text("".join(f"QQ== {rank}\n" for rank in range(20)))
    data = folder / "data.json"
    data.write_text('[{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}]')
    return World(model, data, folder / "out")


def read(world: World, *flags: str) -> definitions.Args:
    """The usual command line and more flags."""
    usual = ["--model_name_or_path", str(world.model), "--data_path", str(world.data), "--output_dir", str(world.out)]
    return arguments.parse([*usual, "--model_max_length", "64", *flags])


def found(world: World, *flags: str) -> list[str]:
    """All findings on a command line."""
    try:
        checks.check_flags(read(world, *flags))
    except UserError as error:
        return error.findings
    return []


def only(world: World, *flags: str) -> str:
    """The one finding."""
    lines = found(world, *flags)
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    return lines[0]
