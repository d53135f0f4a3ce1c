"""Compiles the int8 cache's kernels for a GPU that need not be there: python tests/compiled_kernels.py 90

Prints a line for each: kernel, type, bytes of shared memory, number of fused multiply-adds, head size.
"""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))

from qwen_model import kv_cache, kv_cache_kernels  # noqa: E402

# what the launches of kv_cache_kernels.py pass
CONSTANTS = {
    "STEP": kv_cache.STEP, "RELATIVE": kv_cache.RELATIVE_FLOOR, "ABSOLUTE": kv_cache.ABSOLUTE_FLOOR,
    "HAS_MASK": True, "IS_PART": True, "BLOCK_Q": kv_cache_kernels.BLOCK_Q, "BLOCK_K": kv_cache_kernels.BLOCK_K,
    "BLOCK_R": kv_cache_kernels.BLOCK_R, "MAX_SPLITS": kv_cache_kernels.MAX_SPLITS,
}  # fmt: skip
KERNELS = {"write_kernel": {"enable_fp_fusion": False}, "dequantize_kernel": {}, "attend_kernel": {}, "join_kernel": {}}


def pointer(name: str, kernel: str, dtype: str) -> str:
    """The type of a pointer argument."""
    if name == "mask_ptr" or name in ("kq_ptr", "vq_ptr"):
        return "*u8"
    states = name in ("k_ptr", "v_ptr", "q_ptr") or (kernel, name) == ("join_kernel", "out_ptr")
    return f"*{dtype}" if states else "*fp32"


def compile_kernel(name: str, options: dict, dtype: str, head_size: int, capability: int):
    """Signature: pointers and strides are multiples of 16, as they are in a model; numbers are 32 bit."""
    kernel = getattr(kv_cache_kernels, name)
    constants = CONSTANTS | {"D": head_size}
    signature, fixed, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        argument = parameter.name
        if parameter.is_constexpr:
            signature[argument], fixed[(i,)] = "constexpr", constants[argument]
        elif argument.endswith("_ptr"):
            signature[argument], aligned[(i,)] = pointer(argument, name, dtype), [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scaling_log2" else "i32"
            if argument[:2] in ("q_", "k_", "v_"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


for head_size in kv_cache_kernels.HEAD_SIZES:
    for dtype in ("bf16", "fp16", "fp32"):
        for name, options in KERNELS.items():
            compiled = compile_kernel(name, options, dtype, head_size, int(sys.argv[1]))
            print(name, dtype, compiled.metadata.shared, compiled.asm["ptx"].count("fma.rn.f32"), head_size)
