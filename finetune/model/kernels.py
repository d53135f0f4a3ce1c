"""Every kernel of a training step against plain torch, on the device that will train and in the model's own sizes.

A kernel is right on the machines where it was tested; a driver, a compiler or a GPU of another kind can make it wrong elsewhere.
Both ways are called through the kernel's facade, whose one switch is qwen_model/on_triton.py's `switched_off`, so that what is
compared here is what trains. Each check takes some rows only: a kernel does the same to every row.

The kernels of the int8 cache, with which nothing is trained, are not among them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen_model import fused, head_loss, on_triton

from ..lora import dropout

# how far the two ways may be apart, of the largest number of a result: some roundings of its type
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
ROWS = 64
DROPPED, DROPOUT_ELEMENTS = 0.5, 2**16 + 3


@dataclass(frozen=True)
class Sizes:
    """What of a model the kernels see. heads: 0 where its rotary embedding is transformers' own; layer: a GPTQ layer of it."""

    hidden: int
    width: int
    vocabulary: int
    heads: int = 0
    head_size: int = 0
    eps: float = 1e-6
    layer: torch.nn.Module | None = None

    @classmethod
    def of(cls, model) -> "Sizes":
        """model: a bundled or a later Qwen, with adapters possibly."""
        config = model.config
        layer = next((one for one in model.modules() if hasattr(one, "qweight") and hasattr(one, "unpack")), None)
        if config.model_type == "qwen":
            heads, head_size, width = config.num_attention_heads, config.kv_channels, config.intermediate_size // 2
            return cls(config.hidden_size, width, config.vocab_size, heads, head_size, config.layer_norm_epsilon, layer)
        return cls(config.hidden_size, config.intermediate_size, config.vocab_size, eps=config.rms_norm_eps, layer=layer)


@dataclass(frozen=True)
class Kernel:
    """cases(sizes, random): [(name, tensor)] of what its facade gives, forward and gradients, from the same numbers at each call."""

    name: str
    what: str
    cases: Callable
    applies: Callable = lambda sizes: True


@dataclass(frozen=True)
class Verdict:
    """What a check found. error: the largest difference, of the largest number; why: "" for a kernel that may be used."""

    kernel: str
    error: float
    tolerance: float
    why: str = ""

    def as_record(self) -> dict:
        """For a file: JSON has no infinity."""
        error = self.error if math.isfinite(self.error) else "not finite"
        return {"error": error, "tolerance": self.tolerance, "verdict": self.why or "equals plain torch"}


class Random:
    """Numbers that are the same at each call of a check, on the CPU and then on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape, dtype=None) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, shape, dtype=torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype).to(self.device)


def with_gradients(call, random: Random, *inputs):
    """The results of call(*inputs), and the gradients of inputs to random gradients of the results."""
    leaves = [x.requires_grad_() for x in inputs]
    out = call(*(x * 1 for x in leaves))  # no leaf: the rotary embedding writes in place
    out = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(out, leaves, [random.normal(*x.shape, dtype=x.dtype) for x in out])
    return [(f"result {i}", x) for i, x in enumerate(out)] + [(f"gradient {i}", x) for i, x in enumerate(gradients)]


def norm(sizes: Sizes, random: Random):
    x, weight = random.normal(ROWS, sizes.hidden), random.normal(sizes.hidden)
    return with_gradients(lambda x, weight: fused.rms_norm(x, weight, sizes.eps), random, x, weight)


def rotary(sizes: Sizes, random: Random):
    angles = random.normal(1, 1, ROWS, sizes.head_size // 2, dtype=torch.float32).repeat(1, 1, 1, 2) * 3
    qkv = random.normal(1, ROWS, 3 * sizes.heads * sizes.head_size)
    return with_gradients(lambda x: fused.rotated_heads(x, angles.cos(), angles.sin(), sizes.head_size), random, qkv)


def gate(sizes: Sizes, random: Random):
    return with_gradients(fused.gated, random, random.normal(ROWS, sizes.width), random.normal(ROWS, sizes.width) * 3)


def head(sizes: Sizes, random: Random):
    """The head's exponentials, which its loss and all of its gradients are made of."""
    logits = random.normal(16, sizes.vocabulary) * 3
    labels, hits = random.integers(0, sizes.vocabulary, (16,)), torch.zeros((), dtype=torch.int32, device=random.device)
    labels[::2] = logits[::2].argmax(1)
    found = head_loss.exponentials(logits, labels, hits)
    return [*zip(("others", "sum", "at the label", "loss"), found, strict=True), ("labels that are likeliest", hits.float())]


def dropped(sizes: Sizes, random: Random):
    """Two ways draw two masks: what is told here is what both must have in common, as a number of 1 for each promise kept."""
    x, p = random.normal(DROPOUT_ELEMENTS).abs_().add_(1), DROPPED
    one, again, other = (dropout.drop(x, p, seed) for seed in (1, 1, 2))
    added = dropout.drop(x, p, 1, out=x.clone(), add=True)
    promises = {
        "an element is kept as it is or 0": ((one == x) | (one == 0)).all(),
        "the share that is dropped": ((one == 0).float().mean() - p).abs() < 6 * (p * (1 - p) / len(x)) ** 0.5,
        "a seed gives one mask": (one == again).all(),
        "another seed gives another": (one != other).float().mean() > p / 2,
        "neighbours fall apart": (((one == 0)[1:] == (one == 0)[:-1]).float().mean() - 0.5).abs() < 0.02,
        "added to what is there": ((added.float() - x.float() - one.float()).abs() <= 0.02 * added.float().abs()).all(),
    }
    return [(name, kept.float()) for name, kept in promises.items()]


def unpacked(sizes: Sizes, random: Random):
    """The model's own weights: what they are of is random enough."""
    return [("the weight", sizes.layer.unpack(random.dtype))]


KERNELS = (
    Kernel("norm", "RMSNorm", norm),
    Kernel("rotary", "the rotary embedding", rotary, lambda sizes: sizes.heads > 0),
    Kernel("gate", "the MLP's gate", gate),
    Kernel("head", "the head's softmax", head),
    Kernel("dropout", "LoRA's dropout", dropped),
    Kernel("gptq", "the unpacking of GPTQ layers", unpacked, lambda sizes: getattr(sizes.layer, "bits", 3) != 3),
)


def check(kernel: Kernel, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Verdict:
    """Compares the kernel with plain torch; one that raises an error, or gives what is no number, is wrong as well."""
    tolerance, worst = TOLERANCES[dtype], (0.0, "")
    with on_triton.without(kernel.name):
        plain = kernel.cases(sizes, Random(device, dtype))
    try:
        fast = kernel.cases(sizes, Random(device, dtype))
        for (name, got), (_, want) in zip(fast, plain, strict=True):
            worst = max(worst, (difference(got, want), name))
    except Exception as error:  # of the compiler, of the launch, of the driver
        said = str(error).strip().splitlines()
        return Verdict(kernel.name, math.inf, tolerance, f"{type(error).__name__}: {said[0] if said else ''}")
    why = f"{worst[1]} differs by {worst[0]:.1g} of its largest number" if worst[0] > tolerance else ""
    return Verdict(kernel.name, worst[0], tolerance, why)


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, of the largest number that is wanted; infinite where shapes, types or finiteness differ."""
    if got.shape != want.shape or got.dtype != want.dtype or not got.isfinite().all():
        return math.inf
    got, want = got.double(), want.double()
    found = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    return found if math.isfinite(found) else math.inf


def check_all(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Verdict]:
    """Checks each kernel that runs on this device; [] where none does."""
    running = [k for k in KERNELS if k.applies(sizes) and not on_triton.why_no_triton(device, k.name)]
    with torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False), torch.enable_grad():
        return [check(kernel, device, dtype, sizes) for kernel in running]


def switch_off(verdicts) -> list[str]:
    """Puts plain torch into the place of kernels that are wrong; a line for each."""
    wrong = {verdict.kernel: verdict.why for verdict in verdicts if verdict.why}
    on_triton.switched_off.update(wrong)
    return [f"the kernel of {k.what} is wrong on this machine ({wrong[k.name]}): plain torch does it" for k in KERNELS if k.name in wrong]
