"""Compiles every Triton kernel for a GPU that need not be there: python tests/compiled_kernels.py 90 bf16 fp32

The functions that launch them are called, on the CPU, with tensors as a model has them; each launch is compiled with the types, the
constants and the number of warps that it came with, and not run. Prints a line of JSON for each launch that differs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent))

from finetune.lora import dropout_kernel  # noqa: E402
from finetune.quantized import gptq_kernel  # noqa: E402
from qwen_model import fused_kernels, head_loss_kernels, kv_cache, kv_cache_kernels, on_triton  # noqa: E402

MODULES = fused_kernels, head_loss_kernels, kv_cache_kernels, dropout_kernel, gptq_kernel, on_triton
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
WIDTHS = 2048, 4096, 5120, 8192  # 1.8B, 7B, 14B, 72B
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


# ---- the launches of a model


def call_all(dtype: torch.dtype) -> None:
    """Every function that launches a kernel, in each way that makes another program of it. Few tokens: a launch knows no grid."""
    call_training(dtype, 16)
    unpack_all(dtype)
    for head_size in kv_cache_kernels.HEAD_SIZES:
        attend_all(dtype, head_size)
    on_triton.trial_kernel[(1,)](torch.empty(1))


def call_training(dtype: torch.dtype, T: int, seed: int = 12345) -> None:
    """What a step does with rows of T tokens."""
    for hidden in WIDTHS:
        x, weight = torch.empty(T, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
        inverse = torch.empty(T, 1)
        fused_kernels.rms_norm_forward(x, weight, 1e-6)
        for trains in (False, True):
            fused_kernels.rms_norm_backward(x, x, weight, inverse, trains)
    heads = torch.empty(1, 32, T, 128, dtype=dtype)
    angles = torch.empty(1, T, 128)
    fused_kernels.turn_heads(heads, angles, angles, 1.0, torch.empty_like(heads))
    up = torch.empty(T, 11008, dtype=dtype)
    fused_kernels.gated_backward(fused_kernels.gated_forward(up, up), up, up)
    for hits in (None, torch.zeros((), dtype=torch.int32)):
        head_loss_kernels.exponentials(torch.empty(T, 151936, dtype=dtype), torch.zeros(T, dtype=torch.int64), hits)
    for add in (False, True):
        dropout_kernel.drop_on_gpu(up, 3277, seed, torch.empty_like(up), add=add)


def unpack_all(dtype: torch.dtype) -> None:
    """A layer of each number of bits; some published checkpoints hold scales in 16 bit only, ours in the model's type."""
    inner, out = 4096, 4096
    for bits in (2, 4, 8):
        words = torch.empty(inner * bits // 32, out, dtype=torch.int32), torch.empty(inner // 128, out * bits // 32, dtype=torch.int32)
        scales = torch.empty(inner // 128, out, dtype=torch.float16)
        gptq_kernel.unpack(*words, scales, torch.zeros(inner, dtype=torch.int32), bits, dtype)


def attend_all(dtype: torch.dtype, D: int) -> None:
    B, N, K = 2, 32, 2048
    keys, values = (kept(B, N, K, D) for _ in range(2))
    new = torch.empty(B, N, 16, D, dtype=dtype)
    kv_cache_kernels.write_int8(new, new, keys, values, 16, kv_cache.STEP, kv_cache.RELATIVE_FLOOR, kv_cache.ABSOLUTE_FLOOR)
    kv_cache_kernels.dequantize_int8(keys, values, dtype)
    for mask, splits in ((None, 1), (torch.ones(B, 1, 16, K, dtype=torch.bool), 4)):
        kv_cache_kernels.attend_int8(new, keys, values, mask, 0.125, splits)


def kept(B: int, N: int, K: int, D: int):
    """(q, scale, zero point) of an int8 cache."""
    return torch.zeros(B, N, K, D, dtype=torch.uint8), torch.empty(B, N, K, 1), torch.empty(B, N, K, 1)


# ---- compiled and not run


def recorded(launches: dict):
    """In place of JITFunction.run: keeps each launch that is another program than those before, by its signature."""

    def run(kernel, *args, grid, warmup=False, **kwargs):
        signature, fixed, aligned = {}, {}, {}
        named = dict(zip((p.name for p in kernel.params), args))
        for i, parameter in enumerate(kernel.params):
            value = named[parameter.name] if parameter.name in named else kwargs.pop(parameter.name)
            if parameter.is_constexpr or value_is_compiled_in(parameter, value):
                signature[parameter.name], fixed[(i,)] = "constexpr", value
                continue
            signature[parameter.name] = type_of(value)
            if divides_by_16(parameter, value):
                aligned[(i,)] = [["tt.divisibility", 16]]
        key = repr((kernel.fn.__name__, signature, fixed, aligned, kwargs))
        launches.setdefault(key, (kernel, signature, fixed, aligned, kwargs))

    return run


def value_is_compiled_in(parameter, value) -> bool:
    """Triton makes a number that is 1 a part of the program."""
    return isinstance(value, int) and value == 1 and not parameter.do_not_specialize


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def divides_by_16(parameter, value) -> bool:
    if isinstance(value, torch.Tensor):
        return True  # storages of torch are aligned
    return isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize


def compiled(launch, capability: int) -> dict:
    """What it needs: bytes of shared memory, registers, bytes of local memory (where
    registers spill to), and multiply-adds that round once."""
    kernel, signature, fixed, aligned, options = launch
    made = triton.compile(ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = dict(word.split(":") for word in told.splitlines()[-1].split() if ":" in word)
    return {
        "kernel": kernel.fn.__name__, "shared": made.metadata.shared, "registers": int(used["REG"]),
        "spilled": int(used["STACK"]) + int(used["LOCAL"]), "fused multiply-adds": made.asm["ptx"].count("fma.rn.f32"),
        "types": " ".join(signature.values()), "constants": str(list(fixed.values())),
    }  # fmt: skip


def main(capability: int, types: list[str]) -> None:
    launches = {}
    JITFunction.run = recorded(launches)
    for dtype in TYPES:
        if TYPES[dtype] in types:
            call_all(dtype)
    forgotten = {k for module in MODULES for k in vars(module) if k.endswith("_kernel")} - {one[0].fn.__name__ for one in launches.values()}
    assert not forgotten, f"never launched: {forgotten}"
    for launch in launches.values():
        print(json.dumps(compiled(launch, capability)))


def programs(lengths: list[int]) -> list[str]:
    """The different programs that training has of each kernel with rows of these lengths."""
    launches = {}
    JITFunction.run = recorded(launches)
    for length in lengths:
        call_training(torch.bfloat16, length, seed=length)
    return sorted(launches)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
