"""How much memory a run takes, computed from the sizes of the model and the flags. Imports neither torch nor transformers.

What stands all the time: weights, gradients, the optimizer's state. What a pass adds, for each of its tokens: what every block
keeps for the backward pass, or, of a block that is computed again (gradient checkpointing), its input alone. On top, what is at
work for a moment: the tensors of one block's backward pass and a piece of the head's logits.

The formulas count what this toolkit's layers keep (qwen_model/fused.py, low_rank.py); tests/memory/test_memory_model.py counts the same
with autograd's own hooks. Of later Qwens, attention is transformers' own, which keeps more: `plain` below.

All in bytes unless a name says otherwise; s: bytes of a number in the pass's precision.
"""

import dataclasses
import math
from dataclasses import dataclass

from ..distributed.engines import DDP, FSDP, ONE, ZERO1, ZERO2, ZERO3

CUDA = 0.7e9  # on a GPU: CUDA's own, kernels and libraries
PYTHON = 0.32e9  # in main memory: Python, torch and transformers, measured on the CPU at six sizes of full and LoRA
PYTHON_WITH_CUDA = 3e9  # the same with CUDA's libraries
LIVE = 1e9  # parameters that ZeRO-3 gathers at a time from those in main memory: our DeepSpeed files' stage3_max_live_parameters
SHARD = 5e9  # bytes of one file of a published checkpoint
SLACK = 1.06  # what the GPU's allocator cannot use, seen from what is asked of it
HEAP = 1.17  # the same of the C library on the CPU, measured: benchmarks/dry_run.py


@dataclass(frozen=True)
class Sizes:
    """Of a model: queries and keys are widths (heads x head size), width the MLP's; plain: transformers' attention; normed_heads: a norm
    on each head's queries and keys (Qwen3)."""

    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    width: int
    vocabulary: int
    tied: bool
    plain: bool
    normed_heads: bool = False

    @classmethod
    def of(cls, config: dict):
        """From config.json of a first-generation or later Qwen."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        shared = {
            "layers": config["num_hidden_layers"],
            "hidden": hidden,
            "heads": heads,
            "vocabulary": config["vocab_size"],
        }
        if config["model_type"] == "qwen":
            size, width = heads * (config.get("kv_channels") or hidden // heads), config["intermediate_size"] // 2
            return cls(**shared, queries=size, keys=size, width=width, tied=False, plain=False)
        head = config.get("head_dim") or hidden // heads
        keys = head * (config.get("num_key_value_heads") or heads)
        tied, width = bool(config.get("tie_word_embeddings")), config["intermediate_size"]
        normed = config["model_type"] == "qwen3"
        return cls(**shared, queries=heads * head, keys=keys, width=width, tied=tied, plain=True, normed_heads=normed)

    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of a block's linear layers: query with key and value, output, and the three of the MLP."""
        both = self.queries + 2 * self.keys
        mlp = [(self.width, self.hidden)] * 2 + [(self.hidden, self.width)]
        return [(both, self.hidden), (self.hidden, self.queries), *mlp]

    @property
    def blocks(self) -> int:
        """Parameters of all blocks' matrices."""
        return self.layers * sum(out * inner for out, inner in self.matrices())

    @property
    def embeddings(self) -> int:
        """Parameters of embedding and head."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on all block matrices."""
        return self.layers * rank * sum(out + inner for out, inner in self.matrices())


@dataclass(frozen=True)
class Run:
    """What a run does, as far as memory is concerned.

    rank: of LoRA, 0 for full-parameter; embeddings: both train whole beside LoRA; packed: bytes a frozen block weight takes where
    it is quantized; half: passes in 16 bit; half_weights: --bf16_weights; state: bytes of the optimizer's state a parameter;
    ranks: processes; on_gpu: kernels of a GPU do attention; kernels: ours run there, too (Ampere and newer); offload: what DeepSpeed or FSDP2 keeps in main memory, "",
    "optimizer" (with the gradients and the masters) or "all" (the weights, too); step_tokens: of the largest step of a
    process: where a pass holds less, a step has several.
    """

    rank: int
    embeddings: bool = False
    packed: float | None = None
    half: bool = True
    half_weights: bool = False
    state: float = 8
    engine: str = ONE
    ranks: int = 1
    on_gpu: bool = True
    kernels: bool = True
    offload: str = ""
    step_tokens: float = math.inf

    @property
    def s(self) -> int:
        return 2 if self.half else 4


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, or in main memory on the CPU. tokens: of the largest pass; recomputed: blocks that are computed
    again, of `layers`; libraries: what the process has before it loads a model; host: bytes of main memory, of each process;
    overlap: bytes of gradients that come only as activations go.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    tokens: int
    recomputed: int
    layers: int
    libraries: float = 0.0
    host: float = 0.0
    overlap: float = 0.0

    @property
    def peak(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.libraries - self.overlap

    def describe(self) -> str:
        """The estimate as one line of text."""
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        parts |= {"libraries": self.libraries} if self.libraries else {}
        late = f", {self.overlap / 1e9:.1f} of them not at the same time" if self.overlap >= 0.05e9 else ""
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        again = f"{self.recomputed} of {self.layers} blocks computed again" if self.recomputed else "no block computed again"
        return (
            f"about {self.peak / 1e9:.1f} GB ({listed}, a pass of {self.tokens:,} tokens {self.activations / 1e9:.1f}{late}; {again})"
        )


def estimate(sizes: Sizes, run: Run, tokens: int, recomputed: int = 0) -> Estimate:
    """tokens: of the largest pass; recomputed: how many blocks keep their input alone."""
    weights, gradients, optimizer = on_device(sizes, run)
    # the first blocks are those that are computed again: when their turn comes, what the others kept is gone
    whole = max(sizes.layers - recomputed, 1) * kept_by_block(sizes, run)
    kept = whole + recomputed * sizes.hidden * run.s
    activations = tokens * kept + at_work(sizes, run, tokens) + unpacked(sizes, run)
    activations *= SLACK if run.on_gpu else HEAP
    activations += second_gradients(sizes, run, tokens)
    found = Estimate(weights, gradients, optimizer, activations, tokens, recomputed, sizes.layers, CUDA if run.on_gpu else PYTHON)
    found = dataclasses.replace(found, overlap=overlap(sizes, run, found))
    return dataclasses.replace(found, host=in_main_memory(sizes, run) if run.on_gpu else found.peak)


def overlap(sizes: Sizes, run: Run, found: Estimate) -> float:
    """Bytes of gradients that come only as activations go: where a step has one pass, nothing of them stands before it.

    When the backward pass begins, all activations are there and the head's gradient; when it ends, all gradients and one block's
    activations. DeepSpeed's gradients lie in buffers that stay; on the CPU, the C library keeps what was freed.
    """
    if not run.on_gpu or run.offload or run.engine not in (ONE, DDP, FSDP) or run.step_tokens > found.tokens:
        return 0.0
    each = (2.0 if run.half_weights else 4.0) / (run.ranks if run.engine == FSDP else 1)
    first = each * sizes.vocabulary * sizes.hidden if run.embeddings or not run.rank else 0.0
    last = found.tokens * (kept_by_block(sizes, run) + at_work_in_block(sizes, run)) * SLACK
    return max(0.0, min(each * trained(sizes, run) - first, found.activations - last))


# ---- what stands all the time


def trained(sizes: Sizes, run: Run) -> int:
    """The number of trained parameters."""
    if not run.rank:
        return sizes.blocks + sizes.embeddings
    return sizes.adapters(run.rank) + (sizes.embeddings if run.embeddings else 0)


def standing(sizes: Sizes, run: Run) -> tuple[float, float, float]:
    """Bytes of (weights, gradients, optimizer's state) on each process."""
    count, frozen = trained(sizes, run), 0.0
    if run.rank:  # peft trains copies of embedding and head, and keeps the originals
        frozen = sizes.blocks * (run.packed or run.s) + sizes.embeddings * run.s
    if run.half_weights:
        return count * 2.0, count * 2.0, count * float(run.state)
    cast = 2 if casts(run) else 0
    looked_up = 0 if sizes.tied else sizes.vocabulary * sizes.hidden  # the embedding, of which autocast makes no copy
    if run.engine in (ZERO1, ZERO2, ZERO3):
        # the passes' copy; float32 masters with the state; gradients in float32
        copy, masters, gradients = run.s, 4 + run.state, 4
        share = {ZERO1: (1, 1), ZERO2: (1, run.ranks), ZERO3: (run.ranks, run.ranks)}[run.engine]
        frozen /= share[0]
        return frozen + count * copy / share[0], count * gradients / share[1], count * masters / run.ranks
    ways = run.ranks if run.engine == FSDP else 1
    buckets = 4 if run.engine == DDP and run.ranks > 1 else 0
    return (frozen + count * 4) / ways + (count - looked_up) * cast, count * (4 + buckets) / ways, count * run.state / ways


def casts(run: Run) -> bool:
    """Whether autocast keeps copies of the weights in half precision while a pass lasts."""
    return run.half and not run.rank and not run.half_weights and run.engine in (ONE, DDP, FSDP)


def on_device(sizes: Sizes, run: Run) -> tuple[float, float, float]:
    """standing(), without what is kept in main memory."""
    weights, gradients, optimizer = standing(sizes, run)
    if run.offload == "all":
        weights = min(weights, LIVE * run.s)
    return (weights, 0.0, 0.0) if run.offload else (weights, gradients, optimizer)


def in_main_memory(sizes: Sizes, run: Run) -> float:
    """Bytes of main memory that a process with a GPU takes at most: the weights while they are loaded, or what is kept there.

    Quantized weights are loaded onto the GPU. ZeRO-3 reads a file at a time, and each process keeps its part.
    """
    weights, gradients, optimizer = standing(sizes, run)
    kept = {"": 0.0, "optimizer": gradients + optimizer, "all": weights + gradients + optimizer}[run.offload]
    every = sizes.blocks + sizes.embeddings
    float32 = not run.rank and not run.half_weights and run.engine in (ONE, DDP, FSDP)
    loaded = every * (4 if float32 else run.s)
    if run.packed:
        loaded = 0.0
    elif run.engine == ZERO3:
        loaded = min(loaded, loaded / run.ranks + SHARD)
    return PYTHON_WITH_CUDA + max(kept, loaded)


# ---- what a pass adds


def kept_by_block(sizes: Sizes, run: Run) -> float:
    """Bytes that each token keeps from the forward to the backward pass."""
    s, hidden = run.s, sizes.hidden
    inputs = 2 * hidden * s  # what the norms return, for the gradients of the layers that read it
    attention = (sizes.queries + 2 * sizes.keys) * s + 4 * sizes.heads + sizes.queries * s
    mlp = 3 * sizes.width * s  # up, gate, and their product
    low = len(sizes.matrices()) * run.rank * s
    kept = norms(sizes, run) + inputs + attention + mlp + low
    if not run.on_gpu:  # the outputs of samples, and the row that they are put together to
        kept += sizes.queries * s
    if sizes.plain:  # keys and values repeated for the queries that share them
        kept += 2 * (sizes.queries - sizes.keys) * s
    return kept


def norms(sizes: Sizes, run: Run) -> float:
    """Bytes that each token keeps for a block's norms: their inputs and factors."""
    s = run.s
    trains_wide = not run.rank and not run.half_weights  # float32 weights, and in transformers' blocks such a stream, too
    kept = 2 * (sizes.hidden * (4 if sizes.plain and trains_wide else s) + 4)
    if sizes.normed_heads:  # beside float32 weights in 16 bit transformers' own: a float32 copy, and what is normed
        kept += (sizes.queries + sizes.keys) * (4 + s if trains_wide and run.half else s)
    return kept


def at_work(sizes: Sizes, run: Run, tokens: int) -> float:
    """Bytes beside what the blocks keep: of the head, or, when that is done, of the last block's backward pass.

    The sum of both where operators are not fused: those have more at work than is counted here.
    """
    block, head = tokens * at_work_in_block(sizes, run), tokens * kept_by_head(sizes, run) + head_piece(sizes, run, tokens)
    return max(block, head) if run.on_gpu and run.kernels else block + head


def at_work_in_block(sizes: Sizes, run: Run) -> float:
    """Bytes for each token at the peak of a block's backward pass: gradients of the MLP's three activations, and of its input."""
    return 3 * sizes.width * run.s + 2 * sizes.hidden * run.s


def kept_by_head(sizes: Sizes, run: Run) -> float:
    """Bytes for each token: the last norm's input and output, and the float32 gradient of supervised rows (at most all)."""
    return sizes.hidden * (2 * run.s + run.s + 4)


def head_piece(sizes: Sizes, run: Run, tokens: int) -> float:
    """Bytes of the logits that exist at one time; with a trained head in 16 bit, also of its copy, where autocast has none."""
    # a piece's gradient of the weight, too; a weight that is itself in 16 bit needs neither
    copies = (1 if casts(run) else 2) if run.half and not run.half_weights and (run.embeddings or not run.rank) else 0
    copy = copies * sizes.vocabulary * sizes.hidden * run.s
    rows = min(tokens, (2**26 if run.on_gpu else 2**24) // sizes.vocabulary)
    # the kernel works where the logits lie; plain torch adds them in float32, and the exponentials
    return rows * sizes.vocabulary * (run.s if run.on_gpu and run.kernels else 2 * run.s + 4) + copy


def second_gradients(sizes: Sizes, run: Run, tokens: int) -> float:
    """Bytes of the gradients of embedding and head, whole, before they are added to those of the step's pass before.

    The head's exists from the forward pass on. The embedding's comes when the activations are gone; but on the CPU, the C library
    has not given their memory back, which a GPU's allocator has.
    """
    if (run.rank and not run.embeddings) or run.step_tokens <= tokens:
        return 0.0
    each = sizes.vocabulary * sizes.hidden * (2.0 if run.half_weights else 4.0)
    return each if run.on_gpu else 2 * each


def unpacked(sizes: Sizes, run: Run) -> float:
    """A quantized layer's weight while it is multiplied with; on the CPU also what it is unpacked through."""
    copies = 1 if run.on_gpu else 3
    return copies * max(out * inner for out, inner in sizes.matrices()) * run.s if run.packed else 0.0
