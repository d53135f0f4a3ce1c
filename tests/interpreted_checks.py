"""What the first seconds find out about kernels, in Triton's interpreter: steps/test_self_tests_of_kernels.py runs this file.

In a process of its own, with TRITON_INTERPRET=1, as the interpreter is chosen when triton is imported. Prints a line of JSON.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from tiny import tiny_model  # noqa: E402
from trainers import losses, make_trainer  # noqa: E402

from finetune.lora import dropout_kernel  # noqa: E402
from finetune.model import kernels  # noqa: E402
from finetune.steps import self_tests  # noqa: E402
from qwen_model import fused_kernels, head_loss_kernels, on_triton  # noqa: E402

CPU = torch.device("cpu")
kernels.ROWS = 8  # the interpreter is slow


def wrong(result):
    """The results with the first of them a little off."""
    first, *others = result if isinstance(result, tuple) else (result,)
    return (first * 1.05, *others) if others else first * 1.05


def wrong_rotary(x, cos, sin, sign, out):
    turn_heads(x, cos, sin * 1.05, sign, out)


def wrong_dropout(x, dropped, seed, out, add=False):
    return drop_on_gpu(x, dropped, 7, out, add)  # one mask whatever the seed


turn_heads, drop_on_gpu = fused_kernels.turn_heads, dropout_kernel.drop_on_gpu
WRONG = {  # kernel: [(module, function, what stands in its place)]
    "norm": (fused_kernels, "rms_norm_backward"),
    "rotary": (fused_kernels, "turn_heads", wrong_rotary),
    "gate": (fused_kernels, "gated_forward"),
    "head": (head_loss_kernels, "exponentials"),
    "dropout": (dropout_kernel, "drop_on_gpu", wrong_dropout),
}


def replace(module, name, by=None):
    """Puts a wrong kernel into the right one's place; gives the function that puts it back."""
    right = getattr(module, name)
    setattr(module, name, by or (lambda *args: wrong(right(*args))))
    return lambda: setattr(module, name, right)


def train(checked: bool):
    """(losses, record) of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), model=tiny_model(), max_steps=2, samples_per_step=2)
        trainer.record = {}
        if checked:
            trainer.add_callback(self_tests.SelfTests(trainer, torch.float32))
        trainer.train()
        return losses(trainer), trainer.record


sizes = kernels.Sizes.of(tiny_model())
plain, _ = train(False)  # no kernel runs on a CPU
on_triton.refusal = lambda device: ""  # to the interpreter, the CPU will do
on_triton.obstacle_found.cache_clear()
told = {"right": {str(dtype): {v.kernel: v.why for v in kernels.check_all(CPU, dtype, sizes)} for dtype in kernels.TOLERANCES}, "wrong": {}}
for kernel, change in WRONG.items():
    back = replace(*change)
    told["wrong"][kernel] = {v.kernel: v.why for v in kernels.check_all(CPU, torch.float32, sizes) if v.why}
    back()
told["plain"], (told["good"], told["good record"]) = plain, train(True)
back = replace(*WRONG["gate"])
told["untested"], _ = train(False)
told["switched"], told["record"] = train(True)
told["off"] = list(on_triton.switched_off)
print(json.dumps(told))
