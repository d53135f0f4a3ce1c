"""What a run on the fake device does, by phase: operators and kernels with bytes and FLOP, waits of the host, memory that lives."""

import collections
import traceback
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATED = 512  # bytes: what the allocator of CUDA rounds up to
# they start nothing on a device
VIEWS = frozenset(
    "device view _unsafe_view transpose t permute slice select unsqueeze squeeze expand alias detach unbind split as_strided "
    "reshape unflatten flatten split_with_sizes _reshape_alias lift_fresh empty empty_like new_empty empty_strided "
    "new_empty_strided set_ is_same_size resize_ view_as_real is_pinned".split()
)
FILLS = frozenset("zeros zeros_like new_zeros ones full fill_ zero_ arange full_like ones_like".split())  # they read nothing
GRIDS = (2**31 - 1, 65535, 65535)  # CUDA's limits


@dataclass
class Work:
    """Of one operator in one phase."""

    launches: int = 0
    bytes: int = 0
    flop: int = 0


class Recorder(TorchDispatchMode):
    """phase: set by whoever drives the run; everything is counted under it."""

    def __init__(self):
        super().__init__()
        self.phase = "load"
        self.work = collections.defaultdict(Work)  # by (phase, operator)
        self.waits = collections.Counter()  # by (phase, what, where)
        self.live = 0
        self.peaks = collections.Counter()  # bytes, by phase
        self.alive = {}  # bytes of each storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        outs, given = tensors_of(out), tensors_of((args, kwargs))
        for tensor in outs:
            self.follow(tensor)
        if name not in VIEWS and any(x.is_cuda for x in outs + given):
            work = self.work[self.phase, name]
            work.launches += 1
            work.bytes += bytes_of(outs) + (0 if name in FILLS else bytes_of(outs) if name in ("index", "embedding") else bytes_of(given))
            # in place, a product is not in torch's table
            packet = torch.ops.aten.addmm if name == "addmm_" else function.overloadpacket
            if count := flop_registry.get(packet):
                work.flop += count(*args, **(kwargs or {}), out_val=out)
            # non_blocking is the third of copy_'s words, and a keyword of _to_copy
            self.check_copies(name, outs, given, [*args[2:], (kwargs or {}).get("non_blocking")])
        return out

    def follow(self, tensor) -> None:
        """Counts a storage from its first tensor to its end."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage._cdata in self.alive:
            return
        size = -(-storage.nbytes() // ALLOCATED) * ALLOCATED
        self.alive[storage._cdata] = size
        self.live += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)
        weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key) -> None:
        self.live -= self.alive.pop(key, 0)

    def check_copies(self, name: str, outs, given, words) -> None:
        """The host waits for a copy between it and the device, unless it says non_blocking."""
        sides = {x.device.type for x in outs + given}
        if name in ("_to_copy", "copy_") and {"cpu", "cuda"} <= sides and True not in words:
            self.wait(f"{name} {tuple(outs[0].shape)} between host and device")

    # ---- waits

    def wait(self, what: str) -> None:
        self.waits[self.phase, what, where()] += 1

    def watch_tensors(self) -> None:
        """Every way to read a number of a tensor. What is read is 1, or False: no overflow, nothing that is no number."""
        one = {"item": lambda x: one_of(x), "__bool__": lambda x: False, "__float__": lambda x: 1.0, "__int__": lambda x: 1,
               "__index__": lambda x: 1, "tolist": lambda x: nested(one_of(x), x.shape)}  # fmt: skip
        for name, answer in one.items():
            setattr(torch.Tensor, name, self.reading(name, getattr(torch.Tensor, name), answer))

    def reading(self, name: str, usual, answer):
        def read(tensor, *args, **kwargs):
            if not isinstance(tensor, FakeTensor):
                return usual(tensor, *args, **kwargs)
            if tensor.is_cuda:
                self.wait(f"Tensor.{name} {tuple(tensor.shape)} {tensor.dtype}")
            return answer(tensor)

        return read

    # ---- Triton

    def watch_kernels(self) -> None:
        """Launches are checked and recorded, not compiled."""
        from triton.runtime.jit import JITFunction

        recorder = self

        def run(kernel, *args, grid, warmup=False, **kwargs):
            names = [parameter.name for parameter in kernel.params]
            bound = dict(zip(names, args)) | {key: value for key, value in kwargs.items() if key in names}
            grid = grid(bound) if callable(grid) else tuple(grid)
            name = kernel.fn.__name__
            assert all(0 < size <= limit for size, limit in zip(grid, GRIDS)), f"{name}: grid {grid}"
            given = [value for value in bound.values() if isinstance(value, torch.Tensor)]
            assert all(x.is_cuda for x in given), f"{name}: a tensor of the host"
            work = recorder.work[recorder.phase, f"triton {name}"]
            work.launches, work.bytes = work.launches + 1, work.bytes + bytes_of(given)

        JITFunction.run = run

    # ---- the result

    def as_json(self) -> dict:
        work, waits = collections.defaultdict(dict), collections.defaultdict(list)
        for (phase, name), done in self.work.items():
            work[phase][name] = vars(done)
        for (phase, what, place), times in self.waits.items():
            waits[phase].append(f"{times} x {what} in {place}")
        return {"work": work, "waits": waits, "peaks": self.peaks}


def tensors_of(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def bytes_of(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x.is_cuda)


def one_of(tensor):
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def nested(value, shape):
    for length in reversed(shape):
        value = [value] * length
    return value


def where() -> str:
    """The innermost lines that are neither torch's nor of this folder, innermost first."""
    frames = [f for f in reversed(traceback.extract_stack()) if "/torch/" not in f.filename and __file__ not in f.filename]
    return " <- ".join(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno} {f.line}" for f in frames[:3])
