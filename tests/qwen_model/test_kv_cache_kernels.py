"""The kernels of the int8 KV cache: what they give, when they are not used and why, and that they travel with a model.

What they give is checked in interpreted_kernels.py, in Triton's interpreter, which needs a process of its own; on a real GPU
in test_gpu_kernels.py. Here are the choice, the cache's room, the saved folder, and the compilation for GPUs.
"""

import ast
import copy
import importlib.util
import logging
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers.cache_utils import DynamicCache

import qwen_model
from qwen_model import kv_cache
from qwen_model.kv_cache import LEAST_GROWTH, Int8Cache, kernel_obstacle, machine_obstacle

TESTS = Path(__file__).parent.parent
CHECKS = TESTS / "interpreted_kernels.py"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


# ---- in the interpreter


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """{check: its failures} of interpreted_kernels.py, run once."""
    report = tmp_path_factory.mktemp("kernels") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS), f"--junitxml={report}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for case in xml.parse(report).iter("testcase"):
        problems = [element.text for element in case if element.tag in ("failure", "error", "skipped")]
        found.setdefault(case.get("name").split("[")[0], []).extend(problems)
    return found


@needs_triton
@pytest.mark.parametrize(
    "check",
    [
        node.name
        for node in ast.parse(CHECKS.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ],
)
def test_interpreted(interpreted, check):
    assert interpreted[check] == [], "\n".join(map(str, interpreted[check]))


# ---- when it is not used, and why


def config(**changes):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "kv_channels": 64}
    return tiny_model(**sizes, use_cache_quantization=True, use_cache_kernel=True, **changes).config


@pytest.fixture
def a_gpu_would_do(monkeypatch):
    """The device is none that stands in the way."""
    monkeypatch.setattr(kv_cache, "machine_obstacle", lambda *args: "")


FLOAT_MASK = torch.zeros(1, 1, 1, 5)


@pytest.mark.parametrize(
    "changes, arguments, reason",
    [
        ({}, {}, ""),
        ({"use_cache_quantization": False}, {}, "use_cache_quantization is false in config.json"),
        ({}, {"cache": DynamicCache()}, "the cache is a DynamicCache, not an Int8Cache"),
        ({"_attn_implementation": "eager"}, {}, "attn_implementation is eager"),
        ({}, {"dtype": torch.float64}, "the model is in torch.float64"),
        ({"attn_dropout_prob": 0.1}, {"training": True}, "attention dropout is on"),
        ({"attn_dropout_prob": 0.1}, {"training": False}, ""),
        ({}, {"mask": FLOAT_MASK}, "the attention mask is not boolean"),
        ({}, {"mask": FLOAT_MASK > 0}, ""),
    ],
)
def test_obstacles_of_a_pass(a_gpu_would_do, changes, arguments, reason):
    settings = config()
    for key, value in changes.items():
        setattr(settings, key, value)
    arguments = {"cache": Int8Cache(), **arguments}
    x = torch.zeros(1, dtype=arguments.pop("dtype", torch.float32))
    with torch.no_grad():
        found = kernel_obstacle(settings, x_BTH=x, **arguments)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_gradients_are_an_obstacle(a_gpu_would_do):
    assert "gradients are on" in kernel_obstacle(config(), Int8Cache(), torch.zeros(1))


@needs_triton
def test_obstacles_of_the_machine(monkeypatch):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert "on cpu, not on CUDA" in machine_obstacle(cpu, torch.float32, 64)
    monkeypatch.setattr(kv_cache, "why_no_triton", lambda device: f"{device} is too old")
    assert machine_obstacle(cuda, torch.float16, 64) == "cuda:0 is too old"
    monkeypatch.setattr(kv_cache, "why_no_triton", lambda device: "")
    assert machine_obstacle(cuda, torch.float16, 64) == machine_obstacle(cuda, torch.bfloat16, 128) == ""
    assert "32 channels" in machine_obstacle(cuda, torch.float16, 32)
    monkeypatch.setattr(kv_cache, "triton", None)
    assert machine_obstacle(cuda, torch.float16, 64) == "triton is not installed"


def test_the_reason_is_said_once_and_the_cache_still_works(caplog):
    logging.Logger.warning_once.cache_clear()
    settings = {"hidden_size": 128, "num_attention_heads": 2, "kv_channels": 64, "use_cache_quantization": True}
    asked, plain = tiny_model(**settings, use_cache_kernel=True).eval(), tiny_model(**settings).eval()
    ids = torch.randint(1, 159, (2, 5))
    outputs = [model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (asked, plain)]
    assert torch.equal(*outputs)
    said = [record.getMessage() for record in caplog.records if "use_cache_kernel" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("use_cache_kernel has no effect: the model is on cpu, not on CUDA")


def test_nothing_is_said_where_the_kernel_is_not_asked_for(caplog):
    logging.Logger.warning_once.cache_clear()
    model = tiny_model(use_cache_quantization=True).eval()
    model.generate(torch.randint(1, 159, (1, 5)), max_new_tokens=2, pad_token_id=0)
    assert "use_cache_kernel" not in caplog.text


def test_training_does_not_go_through_the_int8_cache():
    """uint8 has no gradient: keys and values would get none, silently."""
    model = tiny_model(use_cache_quantization=True).train()
    ids = torch.randint(1, 159, (1, 9))
    model(ids, labels=ids).loss.backward()
    got = model.transformer.h[0].attn.c_attn.weight.grad
    exact = tiny_model().train()
    exact(ids, labels=ids).loss.backward()
    assert torch.equal(got, exact.transformer.h[0].attn.c_attn.weight.grad)


# ---- the cache's room


def test_tokens_are_written_in_place_until_the_room_is_used_up():
    cache, x = Int8Cache(), torch.randn(2, 3, 100, 8)
    cache.update(x, x, 0)
    (layer,) = cache.layers
    addresses = []
    for _ in range(4 * LEAST_GROWTH):
        cache.update(x[:, :, :1], x[:, :, :1], 0)
        addresses.append(layer.keys.data_ptr())
        empty = layer.key_room[0].shape[2] - layer.get_seq_length()
        assert 0 <= empty <= max(LEAST_GROWTH, layer.get_seq_length() // 16)
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.get_seq_length()
    moves = sum(a != b for a, b in zip(addresses, addresses[1:]))
    assert moves <= 4
    assert layer.get_seq_length() == 100 + 4 * LEAST_GROWTH
    back = kv_cache.dequantize(layer.keys, *layer.key_range, torch.float32)
    torch.testing.assert_close(back[:, :, :100], x, atol=0.02, rtol=0)
    torch.testing.assert_close(back[:, :, 100:], x[:, :, :1].expand(-1, -1, 4 * LEAST_GROWTH, -1), atol=0.02, rtol=0)


def test_a_copy_and_a_cropped_cache_are_their_own():
    cache, x = Int8Cache(), torch.randn(1, 2, 10, 8)
    cache.update(x, x, 0)
    other = copy.deepcopy(cache)
    before = other.layers[0].keys.clone()
    cache.crop(-5)
    cache.update(x[:, :, :5] * 9, x[:, :, :5] * 9, 0)
    assert torch.equal(other.layers[0].keys, before)
    assert other.layers[0].keys.data_ptr() == other.layers[0].key_room[0].data_ptr()
    other.crop(-20)  # more than there is
    assert other.get_seq_length() == 0
    cache.reset()
    cache.update(x.repeat(3, 1, 1, 1), x.repeat(3, 1, 1, 1), 0)  # another batch size
    assert cache.layers[0].keys.shape == (3, 2, 10, 8)


# ---- it travels

PROGRAM = """
import logging, sys
if "without" in sys.argv:
    sys.modules["triton"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
logging.basicConfig(level=logging.INFO)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
assert "qwen_model" not in sys.modules
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist())
"""


@needs_triton
def test_a_saved_folder_carries_the_kernels(tmp_path):
    """In a fresh Python without this toolkit: without triton it says so, with it the kernels run; the same answer."""
    qwen_model.register()
    sizes = {"hidden_size": 128, "num_attention_heads": 1, "kv_channels": 128}
    model = tiny_model(**sizes, use_cache_quantization=True, use_cache_kernel=True).eval()
    model.save_pretrained(tmp_path / "model")
    assert {"kv_cache_kernels.py", "on_triton.py"} <= {path.name for path in (tmp_path / "model").iterdir()}
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    model.config.use_cache_kernel = False
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    for how, said in (
        ("without", "use_cache_kernel has no effect: triton is not installed"),
        ("with", "int8 KV cache: read by the Triton kernels"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), how], cwd=tmp_path,
            env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0 and said in done.stderr, done.stderr
        assert done.stdout.splitlines()[-1] == str(expected[0].tolist())
