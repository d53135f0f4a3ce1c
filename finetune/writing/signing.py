"""What this user's runs have written is signed, so that a run reads by unpickling only what it may trust.

The key is made once: ${XDG_STATE_HOME:-~/.local/state}/qwen-finetune/key, readable by its user alone; the machines of a cluster
with a shared home have the same. Where a home cannot be written to, each output folder has a key of its own. That one counts together
with the number that the file system gave its file: a folder that was copied or unpacked from elsewhere brings a key that signs nothing.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

KEY_BYTES = 32
OWN_KEY = ".finetune-key"  # in an output folder


def sign(content: bytes, out: Path) -> dict[str, str]:
    """{"key": which one, "hmac": of the content}. out: the run's output folder."""
    key = key_of_user(make=True) or key_of_folder(out, make=True)
    return {"key": name_of(key), "hmac": hmac.new(key, content, hashlib.sha256).hexdigest()} if key else {}


def is_signed(content: bytes, signature: dict, out: Path) -> bool:
    """Whether a run of this user has signed the content. Makes no key."""
    for key in filter(None, (key_of_user(make=False), key_of_folder(out, make=False))):
        if hmac.compare_digest(hmac.new(key, content, hashlib.sha256).hexdigest(), str(signature.get("hmac"))):
            return True
    return False


def name_of(key: bytes) -> str:
    """Tells keys apart without telling them."""
    return hashlib.sha256(b"name of a key" + key).hexdigest()[:16]


def key_of_user(make: bool) -> bytes | None:
    """The key in the user's home; None where there is none, and none can be made."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home at all
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return key_at(Path(state, "qwen-finetune", "key"), make)
    return None


def key_of_folder(out: Path, make: bool) -> bytes | None:
    """The key of an output folder, mixed with the number of its file."""
    with contextlib.suppress(OSError):
        if key := key_at(out / OWN_KEY, make):
            return hashlib.sha256(key + str((out / OWN_KEY).stat().st_ino).encode()).digest()
    return None


def key_at(path: Path, make: bool) -> bytes | None:
    """Reads a key; with `make`, of several processes that want a new one, all get the same. OSError where that cannot be."""
    if not path.exists():
        if not make:
            return None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, written = tempfile.mkstemp(prefix=".key-", dir=path.parent)  # 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(descriptor)
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(written, path)
        finally:
            os.unlink(written)
    stat = path.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        return None  # others may have read or written it
    key = path.read_bytes()
    return key if len(key) == KEY_BYTES else None
