"""The hash of a file, read in pieces."""

import hashlib
from pathlib import Path

PIECE = 1 << 20  # bytes


def sha256_of_file(path: Path) -> str:
    """SHA-256 in hexadecimal. Memory holds a piece, never the file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
