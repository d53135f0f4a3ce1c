"""What a user gave that cannot work: a line per finding, all findings of a run together, exit code 2, no traceback."""

import argparse
import contextlib
import difflib
import errno
import json
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qwen_model.versions import too_old

NEEDED = ("torch", "transformers", "accelerate", "peft", "tiktoken")  # and launch.sh's `needed`: the same
# a run in training that gets one of these saves and ends with STOPPED
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME_SECONDS = 1  # a Ctrl-C reaches the launcher and its processes, to which the launcher hands it on: within that time it is one
STOPPED = 75  # the exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, "try again later"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # a line's end and a tab are text
LONGEST = 3000  # characters of a line that is printed
# what a rank says that misses another one
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")


class UserError(ValueError):
    """One or more findings, each a line "what - where - what to do"."""

    def __init__(self, *findings: str):
        super().__init__("\n".join(findings))
        self.findings = list(findings)


class Stopped(Exception):
    """A run that was asked to stop, has saved, and can go on: no error. Its exit code is STOPPED."""


class Failed(RuntimeError):
    """What cannot go on, and is not to be mended by another command: one line, exit code 1."""


class DiskFull(OSError):
    """A disk that was full while something was saved: one line, exit code 1."""


class Findings:
    """Collects the UserErrors of several checks, so that a user sees all of them at once.

    >>> findings = Findings()
    >>> with findings: check_flags()
    >>> with findings: check_data()
    >>> findings.raise_if_any()
    """

    def __init__(self):
        self.findings: list[str] = []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if isinstance(error, UserError):
            self.findings += [finding for finding in error.findings if finding not in self.findings]
            return True
        return False

    def raise_if_any(self) -> None:
        """Raises one UserError with every finding collected so far."""
        if self.findings:
            raise UserError(*self.findings)


def on_first_rank() -> bool:
    """True on the one process that speaks to the user (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def note(line: str) -> None:
    """Prints something worth knowing."""
    say(f"note: {line}")


def warn(line: str) -> None:
    """Prints something that the user probably wants to change."""
    say(f"warning: {line}")


def say(line: str) -> None:
    """Prints on the first rank; within each_line_once(), nothing that has been printed there."""
    if held is not None:
        held.append(line)
        return
    if on_first_rank() and (said is None or line not in said):
        put(barred(line))
    if said is not None:
        said.add(line)


def put(text: str) -> None:
    """Writes a line, or some, to standard error in one piece.

    torchrun's processes have no buffer: each part of a print would be written by itself, and another process in between.
    """
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def printable(line: str) -> str:
    """Without characters that a terminal would obey: the last barrier for text of files, paths and other programs."""
    return line if line.isprintable() else "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in line)


def visible(text: str) -> str:
    """What a model has written, with all its characters but those that a terminal would obey: they are shown as \\x1b."""
    return OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def barred(line: str) -> str:
    """A line that may be printed: of an endless one, which some value of a file or a flag has made, the beginning and the end."""
    line = printable(line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 300]} ... {line[-295:]}"


def shortened(value, most: int = 100) -> str:
    """A value of a file, a flag or another program for a line that is printed: on one line, of at most `most` characters."""
    text = " ".join(printable(str(value)).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(items: Sequence, most: int, what: str = "more") -> str:
    """The first `most` of some names or numbers for a line that is printed, and how many there are beside them: "a, b and 3 more"."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} {what}" if len(items) > most else "")


said: set[str] | None = None  # within each_line_once()


@contextlib.contextmanager
def each_line_once():
    """A context for checks that run twice: each of their notes and warnings is printed once."""
    global said
    said = set()
    try:
        yield
    finally:
        said = None


held: list[str] | None = None  # within first_of_two()


@contextlib.contextmanager
def first_of_two():
    """A context for checks that run again if they find nothing: their notes are printed only if they do find something."""
    global held
    held = lines = []
    try:
        yield
    except UserError:
        held = None
        for line in lines:
            say(line)
        raise
    finally:
        held = None


def run(job, when_stopped: str = "stopped", speak=lambda line, say: say()) -> None:
    """Runs a program's main function. What a user gave wrong ends in a line per finding and exit code 2, no traceback.

    speak(line, say): calls say(), which prints the error that `line` sums up - in one of several processes that fail together.
    """
    try:
        check_transformers()
        job()
    except KeyboardInterrupt:
        if on_first_rank() and sys.stderr.isatty():
            print(file=sys.stderr)  # off the progress bar's line
        note(when_stopped)
        sys.exit(130)  # as a program that Ctrl-C ended
    except Stopped as stopped:
        note(str(stopped))
        sys.exit(STOPPED)
    except UserError as error:
        findings = error.findings
        speak(findings[0], lambda: tell(*findings))
        sys.exit(2)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (line := wrong_python()):
            speak(line, lambda: tell(line))
            sys.exit(2)
        failure, line = error, explained(error)
        speak(line or f"{type(error).__name__}: {error}", lambda: tell(line) if line else put(in_full(failure)))
        sys.exit(2 if getattr(error, "errno", None) in NO_PATH else 1)


def in_full(failure: Exception) -> str:
    """A fault of ours, with its traceback."""
    return "".join(traceback.format_exception(failure)).rstrip("\n")


def check_transformers() -> None:
    """Raises UserError for a transformers that is too old, before anything of it is imported."""
    if line := too_old():
        raise UserError(line)


def wrong_python() -> str | None:
    """The line of launch.sh for a Python without the packages that every run needs; None where it has them all."""
    missing = ", ".join(name for name in NEEDED if name not in sys.modules and find_spec(name) is None)
    if not missing:
        return None
    setup = shlex.quote(str(Path(__file__).resolve().parent.parent / "setup_env.sh"))
    remedy = f"bash {setup} makes an environment with all that is needed, and prints the path of its Python"
    return f"{sys.executable} has no {missing} - {remedy}"


NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)  # which no check of a path expects: only what was typed can have it
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors says it in Rust's words, torch's writer only that a write failed
WORDS_OF_FULL = ("No space left on device", "os error 28", "os error 122", "Disk quota exceeded", "PytorchStreamWriter failed", "unexpected pos")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, says that a disk or a quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(word in str(error) for word in WORDS_OF_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def explained(error: Exception) -> str | None:
    """A line for what can go wrong in training without being a fault of the program; None for anything else."""
    if isinstance(error, (FloatingPointError, DiskFull, Failed)):
        return str(error)
    if is_full(error):
        return f"{getattr(error, 'filename', None) or 'a file'}: could not be written, the disk or its quota is full - make room, and start again"
    if isinstance(error, OSError) and error.filename is not None and error.errno in (*NO_PATH, *NOT_ALLOWED):
        remedy = "give another path" if error.errno in NO_PATH else "change whose it is or its modes, or give another path"
        return f"{shortened(error.filename, 300)}: {error.strerror} - {remedy}"
    if os.environ.get("WORLD_SIZE", "1") != "1" and any(word in str(error) for word in PEER_GONE):
        return f"the connection to another process is lost ({' '.join(str(error).split())[:120]}) - see what ended that one"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return f"out of GPU memory ({error}) - lower --max_tokens_per_pass, or add --gradient_checkpointing True"
    if "no kernel image is available" in str(error):
        return "the installed torch has no code for this GPU - https://pytorch.org/get-started says which one has, or hide it: CUDA_VISIBLE_DEVICES= "
    return None


class Options(argparse.ArgumentParser):
    """A program's command line, of which a mistake is one line, as everything else that a user gave wrong."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        """Ends with exit code 2, and for an unknown option says which one may have been meant."""
        unknown = re.search(r"unrecognized arguments: (-\S+)", message)
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        close = difflib.get_close_matches(unknown[1].partition("=")[0], known, 1) if unknown else []
        tell(f"{shortened(message, 300)} - {f'did you mean {close[0]}?' if close else f'{self.prog} --help lists the options'}")
        sys.exit(2)


def tell(*findings: str) -> None:
    """Prints errors, a line each."""
    lines = [barred(" ".join(line.split())) for line in findings]
    for line in lines:
        put(f"error: {line}")
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # the agent hands it on to the other machines
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": "; ".join(lines)}, file, allow_nan=False)
