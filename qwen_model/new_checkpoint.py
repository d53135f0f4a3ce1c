"""Makes a small first-generation Qwen checkpoint in the published format, from a seed: python -m qwen_model.new_checkpoint OUT

It has the real vocabulary and random weights: something to train from scratch in a test, a demonstration or a benchmark.
"""

import argparse
import json
import shutil
from pathlib import Path

from .vocabulary import find_vocabulary

# Of the token embeddings. With the usual 0.02 and a small hidden size, Adam spends the first hundreds of steps on leaving the
# neighbourhood of zero: measured on 19.5 million parameters, 190 steps end at a loss of 2.5 instead of 5.
EMBEDDING_STD = 0.1
AUTO_MAP = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
GENERATION = {
    "chat_format": "raw",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
}
TOKENIZER = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}


def new_checkpoint(
    out: Path,
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    seq_length: int = 2048,
    vocab_size: int = 151936,
    seed: int = 0,
    dtype=None,
) -> int:
    """Writes a base model's folder and returns its number of parameters. The MLP is 8/3 as wide as hidden_size.

    dtype: of torch; None: float32.
    """
    import torch  # not above: --help is there at once
    from safetensors.torch import save_file

    from .configuration_qwen import QWenConfig
    from .modeling_qwen import QWenLMHeadModel

    dtype = dtype or torch.float32
    config = QWenConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        kv_channels=hidden_size // heads,
        intermediate_size=2 * (-(-8 * hidden_size // 3 // 16) * 16),
        seq_length=seq_length,
        max_position_embeddings=seq_length,
        architectures=["QWenLMHeadModel"],
        auto_map=AUTO_MAP,
        **{{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]: True},
    )
    torch.manual_seed(seed)
    model = QWenLMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(EMBEDDING_STD / config.initializer_range)
    model.to(dtype)
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(config.to_json_string())
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2) + "\n")
    shutil.copyfile(find_vocabulary(), out / "qwen.tiktoken")
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qwen_model.new_checkpoint", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=2048, help="trained length that config.json states")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = new_checkpoint(**vars(options))
    print(f"{options.out}: {count:,} parameters, random (seed {options.seed})")


if __name__ == "__main__":
    main()
