"""A limit on the time that a model's chat template takes: it is a program, and may come from anybody."""

import contextlib
import signal
import threading

from ..errors import UserError

FIRST, EACH = 20.0, 1.0  # seconds for a call, and for each conversation of it; a published template takes a thousandth


class TimeUp(BaseException):
    """No Exception: what runs within the limit may catch those."""


@contextlib.contextmanager
def time_limit(seconds: float, line: str):
    """A context that ends in UserError(line) when it takes longer than `seconds`.

    Works in the main thread alone, and where nobody else uses SIGALRM; elsewhere there is no limit. What Python interprets
    is interrupted, as a template's loops are; one single operation in C, as a power of large numbers, goes on to its end.
    """
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


def of_template(tokenizer, conversations: int = 1):
    """The limit for rendering so many conversations with a tokenizer's chat template."""
    seconds = FIRST + EACH * conversations
    what = f"{tokenizer.name_or_path}: its chat template is not done after {seconds:.0f} seconds"
    return time_limit(seconds, f"{what} - take the template of the published checkpoint (chat_template.jinja, tokenizer_config.json)")
