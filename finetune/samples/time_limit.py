"""What a model's chat template and tokenizer may take of time and memory: they are programs, and may come from anybody."""

import contextlib
import resource
import signal
import threading

from ..errors import UserError, shortened
from .hard_limit import hard_limit

FIRST, EACH = 20.0, 1.0  # seconds for a call, and for each conversation of it; a published template takes a thousandth
OPENING = 120.0  # seconds for a tokenizer's files, which may lie on a slow disk
PACE = 10_000  # characters that a tokenizer encodes in a second; published ones do a million
HARD = 3.0  # what is one operation in C, and so cannot be interrupted, may take so much longer: then the process ends
WHOLE_TOKENIZER = "take all of the tokenizer's files from the published checkpoint"
ROOM = 2 * 10**9  # bytes that a template may take; a batch has a million characters


class TimeUp(BaseException):
    """No Exception: what runs within the limit may catch those."""


@contextlib.contextmanager
def time_limit(seconds: float, line: str):
    """A context that ends in UserError(line) when it takes longer than `seconds`, and at HARD times that ends the process with it.

    What Python interprets is interrupted, as a template's loops are, in the main thread and where nobody else uses SIGALRM. One
    single operation in C, as a power of large numbers or a regular expression that tries everything, only the second ends.
    """
    with hard_limit(HARD * seconds, line):
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
            yield
            return

        def end(*_):
            raise TimeUp

        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        except TimeUp:
            raise UserError(line) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)


@contextlib.contextmanager
def memory_limit(size: float, line: str):
    """A context that ends in UserError(line) where it takes more than about `size` bytes: of all threads, so no others should be at work."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + int(size)
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *others]), hard))
    try:
        yield
    except MemoryError:
        raise UserError(line) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def of_template(tokenizer, conversations: int = 1):
    """The limits for rendering so many conversations with a tokenizer's chat template."""
    seconds, what = FIRST + EACH * conversations, f"{tokenizer.name_or_path}: its chat template"
    remedy = "take the template of the published checkpoint (chat_template.jinja, tokenizer_config.json)"
    with time_limit(seconds, f"{what} is not done after {seconds:.0f} seconds - {remedy}"):
        with memory_limit(ROOM, f"{what} takes more than {ROOM / 1e9:.1f} GB of memory - {remedy}"):
            yield


@contextlib.contextmanager
def of_tokenizer(name: str, seconds: float):
    """The limit for what a tokenizer does. name: its folder."""
    with time_limit(seconds, f"{name}: its tokenizer is not done after {seconds:.0f} seconds - {WHOLE_TOKENIZER}"), without_panic(name):
        yield


@contextlib.contextmanager
def without_panic(name: str):
    """A context in which a tokenizer's panic, as of a pattern that tries too much, is a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3: no Exception, and of no module
            raise
        raise UserError(f"{name}: its tokenizer fails ({shortened(error)}) - {WHOLE_TOKENIZER}") from None


def of_texts(tokenizer, texts: list[str]):
    """The limit for encoding texts."""
    return of_tokenizer(getattr(tokenizer, "name_or_path", ""), FIRST + sum(map(len, texts)) / PACE)
