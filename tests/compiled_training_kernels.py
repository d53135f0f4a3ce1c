"""Compiles the kernels of training for a GPU that need not be there: python tests/compiled_training_kernels.py 90

Prints a line for each: kernel, type, bytes of shared memory, and whether registers spill to local memory.
"""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))

from finetune.lora import dropout_kernel  # noqa: E402
from finetune.quantized import gptq_kernel  # noqa: E402
from qwen_model import fused_kernels, head_loss_kernels  # noqa: E402

# kernel: its constants at a 7B model's sizes, float32 tensors, {integer tensor: bits}, float numbers; other tensors have the pass's type
KERNELS = {
    fused_kernels.rms_norm_forward_kernel: ({"BLOCK_H": 4096}, {"inverse"}, {}, {"eps"}),
    fused_kernels.rms_norm_backward_kernel: (
        {"BLOCK_H": 4096, "HAS_WEIGHT": True}, {"inverse", "grad_weight"}, {}, set(),
    ),
    fused_kernels.turn_kernel: ({"HALF": 64, "HEADS": fused_kernels.HEADS}, {"cos", "sin"}, {}, {"sign"}),
    fused_kernels.gated_forward_kernel: ({"BLOCK": fused_kernels.BLOCK}, set(), {}, set()),
    fused_kernels.gated_backward_kernel: ({"BLOCK": fused_kernels.BLOCK}, set(), {}, set()),
    head_loss_kernels.exponentials_kernel: (
        {"BLOCK_V": head_loss_kernels.BLOCK_V}, {"Z", "c", "losses"}, {"labels": 64}, set(),
    ),
    dropout_kernel.drop_kernel: ({"BLOCK": dropout_kernel.BLOCK, "ADD": True}, set(), {}, set()),
    gptq_kernel.unpack_kernel: (
        {"BITS": 4, "BLOCK_O": gptq_kernel.BLOCK_O}, set(), {"qweight": 32, "qzeros": 32, "g_idx": 32}, set(),
    ),
}  # fmt: skip
TENSORS = {
    "x", "out", "weight", "gradient", "grad_x", "up", "gate", "grad_up", "grad_gate", "logits",
    "cos", "sin", "inverse", "grad_weight", "Z", "c", "losses", "labels", "qweight", "qzeros", "scales", "g_idx",
}  # fmt: skip
NEVER_DIVISIBLE = {"sign", "eps", "seed", "dropped"}


def compile_kernel(kernel, dtype: str, capability: int):
    """Tensors and sizes are multiples of 16, as they are in a model; numbers are 32 bit."""
    constants, wide, integers, floats = KERNELS[kernel]
    signature, fixed, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
            continue
        if name in TENSORS:
            signature[name] = "*fp32" if name in wide else f"*i{integers[name]}" if name in integers else f"*{dtype}"
        else:
            signature[name] = "fp32" if name in floats else "i32"
        if name not in NEVER_DIVISIBLE:
            aligned[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", capability, 32))


for dtype in ("bf16", "fp16", "fp32"):
    for kernel in KERNELS:
        compiled = compile_kernel(kernel, dtype, int(sys.argv[1]))
        print(kernel.fn.__name__, dtype, compiled.metadata.shared, ".local" in compiled.asm["ptx"])
