"""The headers of safetensors files: names, types and shapes of the tensors, checked as strictly as the format asks."""

import json
import math
from pathlib import Path

from ..errors import UserError, shortened

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def tensors_of(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file, from its header; {} for .bin. UserError if the file is damaged.

    Damaged: cut, or a header that is none: not JSON, tensors of an unknown type, that overlap, leave a gap, or whose
    bytes are not as many as type and shape say.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors" and size:
        return {}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if 0 < length <= min(size, MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}) - change whose it is or its modes, or copy it anew") from error
    try:
        whole = json.loads(header)
        tensors = {name: entry for name, entry in whole.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        fault = metadata_fault(whole.get("__metadata__")) or layout_fault(tensors)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({size:,} bytes) - download it again") from error
    if fault:
        raise UserError(f"{path}: its header is damaged ({fault}) - download it again")
    if size != end:
        raise UserError(f"{path}: incomplete: {size:,} bytes of {end:,} - download it again")
    return {name: entry["shape"] for name, entry in tensors.items()}


def metadata_fault(metadata) -> str:
    """What is wrong with __metadata__, which holds texts; "" where nothing is."""
    texts = metadata is None or isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    return "" if texts else "__metadata__ holds more than texts"


def layout_fault(tensors: dict[str, dict]) -> str:
    """The first fault in types, shapes and places; "" where each tensor begins where the one before it ends."""
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, end), shape, bits = entry["data_offsets"], entry["shape"], BITS.get(entry["dtype"])
        name = shortened(name)
        if bits is None:
            return f"{name} is of the unknown type {shortened(entry['dtype'])}"
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            return f"{name} has the shape {shortened(shape)}"
        if begin != at:
            return f"{name} {'overlaps the tensor before it' if begin < at else 'leaves a gap before it'}"
        if (end - begin) * 8 != math.prod(shape) * bits:
            return f"{name} takes {end - begin:,} bytes, which is not {shape} of {entry['dtype']}"
        at = end
    return ""
