"""The kernel that unpacks GPTQ's weights against the format's plain-torch definition, and the layer that calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantizing import numbers
from tiny import tiny_gptq

import qwen_model
from finetune.folders import gptq_format, quant_settings
from finetune.quantized import quantized_model

ROOT = Path(__file__).parent.parent.parent
CASES = [(bits, I, O) for bits in (2, 4, 8) for I, O in ((64, 32), (48, 560), (52, 1040))]


def packed(bits: int, I: int, O: int, seed: int = 0, scales=torch.float16) -> dict[str, torch.Tensor]:
    """A layer's tensors with every number and zero point there is, and groups in no order, as desc_act leaves them."""
    random = torch.Generator().manual_seed(seed)
    groups = 5
    rows = -(-I * bits // 32) * 32 // bits  # whole words
    codes = torch.randint(2**bits, (rows, O), generator=random)
    zeros = torch.randint(2**bits, (O, groups), generator=random)
    return {
        "qweight": gptq_format.pack(codes, bits),
        "qzeros": gptq_format.pack(zeros, bits).T.contiguous(),
        "scales": (torch.randn(groups, O, generator=random) / 100).to(scales),
        "g_idx": torch.randint(groups, (I,), generator=random, dtype=torch.int32),
    }


def expected(tensors: dict, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """(I, O), with numpy's bits: rounded once to the precision of the scales, then to `dtype`."""
    groups = tensors["g_idx"].long()
    codes = numbers(tensors["qweight"], bits)[: len(groups)]
    zeros = numbers(tensors["qzeros"].T.contiguous(), bits).T[groups]
    return ((codes - zeros).float() * tensors["scales"].float()[groups]).to(tensors["scales"].dtype).to(dtype)


INTERPRETED = """
import torch
from test_gptq_kernel import CASES, expected, packed
from finetune.quantized.gptq_kernel import unpack
for seed, (bits, I, O) in enumerate(CASES):
    for scales, dtype in ((torch.float16, torch.float16), (torch.float16, torch.bfloat16), (torch.float32, torch.float32)):
        tensors = packed(bits, I, O, seed, scales)
        got = unpack(**tensors, bits=bits, dtype=dtype)
        step = 2**-7 if dtype == torch.bfloat16 else 0  # which the interpreter rounds towards zero
        torch.testing.assert_close(got, expected(tensors, bits, dtype), rtol=step, atol=0)
print("alike")
"""


def test_the_kernel_in_tritons_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout == "alike\n", done.stderr[-2000:]


def layer_of(folder: Path, bits: int, dtype: torch.dtype, device: str):
    qwen_model.register()
    tiny_gptq(folder, bits)
    model = quantized_model.load(folder, quant_settings.of_folder(folder), dtype, torch.device(device))
    return model.transformer.h[1].mlp.w1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("obstacle", ["", "no CUDA device"])
def test_a_layer_takes_the_kernel_where_it_runs_and_bits_do_not_cross_words(tmp_path, monkeypatch, bits, obstacle):
    from finetune.quantized import gptq_layers

    layer, calls = layer_of(tmp_path / "q", bits, torch.bfloat16, "cpu"), []

    def unpack(qweight, qzeros, scales, g_idx, bits, dtype):
        calls.append(bits)
        weight = gptq_format.dequantize(qweight, qzeros, scales, g_idx, bits, "gptq_v2").T
        return weight.to(scales.dtype).to(dtype)

    plain = layer.unpack(torch.bfloat16)
    monkeypatch.setattr(gptq_layers, "why_no_triton", lambda device, kernel="": obstacle)
    monkeypatch.setitem(sys.modules, "finetune.quantized.gptq_kernel", type("kernel", (), {"unpack": staticmethod(unpack)}))
    assert torch.equal(layer.unpack(torch.bfloat16), plain)
    assert calls == ([bits] if bits != 3 and not obstacle else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kernel_on_a_gpu(bits):
    from finetune.quantized.gptq_kernel import unpack

    for shape in ((4096, 11008), (11008, 4096)):
        tensors = packed(bits, *shape)
        got = unpack(**{name: tensor.cuda() for name, tensor in tensors.items()}, bits=bits, dtype=torch.bfloat16)
        assert torch.equal(got.cpu(), expected(tensors, bits, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_on_a_gpu_has_the_weights_it_has_on_the_cpu(tmp_path, bits):
    pytest.importorskip("gptqmodel")
    layers = [layer_of(tmp_path / device, bits, torch.bfloat16, device) for device in ("cpu", "cuda")]
    here, there = (layer.unpack(torch.bfloat16) for layer in layers)
    assert torch.equal(here, there.cpu())
