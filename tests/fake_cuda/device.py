"""A CUDA device without a GPU: tensors have sizes and no values (torch's FakeTensorMode), kernels are recorded and not run.

build() compiles device.cpp, which makes a CPU build of torch accept "cuda" where it is loaded before torch is; install() adds, for
good, what torch.cuda answers about the device. So a real training loop runs through its CUDA branches, at any size, on any machine.
What is not real: values (every number that is read is 1), time, and what a library asks of CUDA behind torch's back.
"""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

GPUS = {  # compute capability: name, bytes, streaming multiprocessors, bytes of shared memory that a kernel may ask for
    (7, 5): ("Tesla T4", 15.6e9, 40, 64 << 10),
    (8, 0): ("NVIDIA A100-SXM4-80GB", 84.9e9, 108, 163 << 10),
    (9, 0): ("NVIDIA H100 80GB HBM3", 84.9e9, 132, 227 << 10),
    (12, 0): ("NVIDIA GeForce RTX 5090", 33.6e9, 170, 99 << 10),
}


def build(folder: Path) -> Path:
    """Compiles the library for the torch that is installed: some seconds of g++."""
    from torch.utils import cpp_extension

    library, [where] = folder / "device.so", cpp_extension.library_paths()[:1]
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    link = [f"-L{where}", f"-Wl,-rpath,{where}", "-lc10", "-ltorch_cpu"]
    source = Path(__file__).with_name("device.cpp")
    subprocess.run(["g++", "-shared", "-fPIC", "-O0", "-std=c++20", *include, source, "-o", library, *link], check=True)
    return library


def install(capability: tuple[int, int], waited) -> FakeTensorMode:
    """The mode in which tensors of the device live. waited(what) is called where the host would wait for the device."""
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    name, memory, processors, shared = GPUS[capability]
    answer(name, int(memory), processors, shared, capability, waited)
    torch.nn.Module._apply = apply_by_assigning
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.compiler.set_stance("force_eager")  # of an optimizer's step: there is nothing to compile for
    return FakeTensorMode(allow_non_fake_inputs=True)


def answer(name, memory, processors, shared, capability, waited) -> None:
    """What torch.cuda says of the device, and does with it: nothing."""
    properties = SimpleNamespace(
        name=name, total_memory=memory, major=capability[0], minor=capability[1], multi_processor_count=processors,
        shared_memory_per_block_optin=shared, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        warp_size=32, gcnArchName="",
    )  # fmt: skip
    of_device = {
        "get_device_capability": capability, "get_device_name": name, "get_device_properties": properties,
        "mem_get_info": (memory, memory), "max_memory_allocated": 0, "max_memory_reserved": 0, "memory_allocated": 0,
        "memory_reserved": 0, "reset_peak_memory_stats": None, "device_count": 1, "current_device": 0, "set_device": None,
        "is_available": True, "is_initialized": True, "is_current_stream_capturing": False, "empty_cache": None,
        "is_bf16_supported": capability >= (8, 0), "_lazy_init": None, "manual_seed": None, "manual_seed_all": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "set_rng_state_all": None,
        "get_arch_list": ["sm_75", "sm_80", "sm_90", "sm_120"],
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)],
    }  # fmt: skip
    for function, value in of_device.items():
        setattr(torch.cuda, function, lambda *args, value=value, **kwargs: value)
    torch.cuda.synchronize = lambda device=None: waited("torch.cuda.synchronize")
    torch.cuda.device = Inside
    torch.cuda.Event = type("Event", (Happened,), {"waited": staticmethod(waited)})
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.version.cuda = "13.0"
    for module in (torch.amp.autocast_mode, torch.cuda.amp.common):
        module.amp_definitely_not_available = lambda: False


class Inside:
    """torch.cuda.device: there is one."""

    def __init__(self, device):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Happened:
    """torch.cuda.Event. To wait for one is no wait for the device: what was enqueued behind it goes on."""

    def __init__(self, *args, **kwargs):
        self.recorded = False

    def record(self, stream=None):
        self.recorded = True

    def synchronize(self):
        assert self.recorded, "an event that was never recorded is no wait at all"


def apply_by_assigning(self, fn, recurse=True):
    """nn.Module._apply, which would give a real parameter the storage of a fake one."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                new = fn(parameter)
            if (new.dtype, new.device) != (parameter.dtype, parameter.device):
                self._parameters[name] = torch.nn.Parameter(new, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention by the kernel that every GPU since Volta has: a CPU build of torch would spell it out."""
    assert attn_mask is None and not enable_gqa
    work = torch.ops.aten._scaled_dot_product_efficient_attention
    return work(query, key, value, None, True, dropout_p, is_causal, scale=scale)[0]
