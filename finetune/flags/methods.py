"""The table: which method trains over which weights under which engine, and why not where it does not.

What RULES does not list is allowed. Launched and compared with one process: full-parameter, LoRA, its rows and embeddings on
DDP, ZeRO-2, ZeRO-3 and FSDP2, LoRA+ with rsLoRA on the last two, Q-LoRA on DDP and ZeRO-2 (tests/distributed/test_engines.py); biases,
DoRA and rows of a tied embedding on DDP and ZeRO-3 (tests/lora/test_adapters_on_ranks.py). The others, those on ZeRO-1 among them,
share their code, and no test launches them.

A rule names sets of methods, weights and engines; where all three meet, the run is refused with the rule's reason and way
out, before weights are loaded.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ..distributed.engines import DDP, FSDP, ONE, ZERO1, ZERO2, ZERO3

FULL, FULL_BF16 = "full-parameter", "full-parameter in bf16"
LORA, EMBEDDINGS, BIASES = "LoRA", "LoRA + embeddings", "LoRA + biases"
ROWS, TIED_ROWS = "LoRA + chat rows", "LoRA + rows of a tied embedding"  # of --train_tokens as well
DORA, PISSA, RSLORA, LORA_PLUS = "DoRA", "PiSSA", "rsLoRA", "LoRA+"
METHODS = (FULL, FULL_BF16, LORA, ROWS, EMBEDDINGS, BIASES, TIED_ROWS, DORA, PISSA, RSLORA, LORA_PLUS)
PLAIN, GPTQ, NF4 = "16-bit", "GPTQ", "NF4"
WEIGHTS = (PLAIN, GPTQ, NF4)
ENGINES = (ONE, DDP, ZERO1, ZERO2, ZERO3, FSDP)
SEVERAL = (DDP, ZERO1, ZERO2, ZERO3, FSDP)
QUANTIZED, CUT = (GPTQ, NF4), (ZERO3, FSDP)


class Rule(NamedTuple):
    """What does not go together: the flags that meet, why, and the way out."""

    methods: tuple[str, ...]
    weights: tuple[str, ...]
    engines: tuple[str, ...]
    line: str

    def forbids(self, methods, weights: str, engine: str) -> bool:
        return any(method in self.methods for method in methods) and weights in self.weights and engine in self.engines


RULES = (
    Rule(
        (FULL, FULL_BF16), QUANTIZED, ENGINES,
        "quantized weights cannot be trained themselves - add --q_lora, or give the 16-bit checkpoint",
    ),
    Rule(
        METHODS, (GPTQ,), (ZERO3,),
        "ZeRO-3 cannot shard GPTQ weights - use --deepspeed ds_config_zero2.json",
    ),
    Rule(
        METHODS, (GPTQ,), (FSDP,),
        "FSDP2 cannot shard GPTQ weights - leave out --fsdp, or use --deepspeed ds_config_zero2.json",
    ),
    Rule(
        METHODS, (NF4,), CUT,
        "NF4 weights cannot be sharded - use --deepspeed ds_config_zero2.json, or plain DDP without --deepspeed and --fsdp",
    ),
    Rule(
        (FULL_BF16,), (PLAIN,), SEVERAL,
        "--bf16_weights rounds at random, and the copies of several processes would drift apart - train in one process, or "
        "without it under --deepspeed ds_config_zero3.json, which shares the float32 weights out",
    ),
    Rule(
        (PISSA,), QUANTIZED, ENGINES,
        "PiSSA decomposes the weights, and over quantized ones there are none to decompose - leave out --init_lora_weights",
    ),
    Rule(
        (DORA,), (GPTQ,), ENGINES,
        "DoRA needs the weights' norms, which GPTQ layers do not tell - leave out --use_dora, or use --quant nf4 on the 16-bit "
        "checkpoint",
    ),
    Rule(
        (BIASES,), (GPTQ,), ENGINES,
        "the biases of GPTQ layers are part of them and stay as they are - leave out --lora_bias, or use --quant nf4 on the "
        "16-bit checkpoint",
    ),
    Rule(
        (TIED_ROWS,), (PLAIN,), (FSDP,),
        "accelerate cannot shard a matrix that is embedding and head while rows of it train - use --deepspeed "
        "ds_config_zero3.json, or --train_embeddings none or all",
    ),
)  # fmt: skip


def refused(methods, weights: str, engine: str) -> Iterator[str]:
    """A line for each rule that a run breaks. methods: all that it combines, such as LoRA, rows and DoRA."""
    return (rule.line for rule in RULES if rule.forbids(methods, weights, engine))


def named(methods, weights: str, engine: str) -> str:
    """A run in words: "LoRA, DoRA over GPTQ weights on ZeRO-2"."""
    return f"{', '.join(methods)} over {weights} weights on {engine}"


def of_run(args, embeddings: str, tied: bool = False) -> list[str]:
    """The methods that the flags combine. args: of args.parse(); embeddings: --train_embeddings with auto decided.

    tied: embedding and head of the model are one matrix.
    """
    lora = args.lora
    if not lora.use_lora:
        return [FULL_BF16 if args.training.bf16_weights else FULL]
    rows = embeddings == "chat_rows" or (bool(lora.train_tokens) and embeddings != "all")
    found = {
        ROWS: rows and not tied,
        TIED_ROWS: rows and tied,
        EMBEDDINGS: embeddings == "all",
        BIASES: lora.lora_bias != "none",
        DORA: lora.use_dora,
        PISSA: str(lora.init_lora_weights).startswith("pissa"),
        RSLORA: lora.use_rslora,
        LORA_PLUS: lora.loraplus_lr_ratio is not None,
    }
    return [LORA, *(method for method, asked in found.items() if asked)]
