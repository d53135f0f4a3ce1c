"""Where versions of transformers differ: the one place of the model that knows.

A transformers that is too old ends here, a newer one than was tested gives a warning; both say what to do. What a newer one may have
renamed is asked for by name (cache_name, overrides, refuse_unknown), so that it ends in an error and not in another answer:
transformers 5.24 renamed past_key_values to cache, and a forward that swallowed the new word answered nonsense.

This file is saved with every model, as the others of this folder are.
"""

import dataclasses
import inspect

from transformers.utils import logging

from .versions import CHANGED, not_tested, too_old, words

if too_old():
    raise ImportError(too_old())
if not_tested():
    # one logger for all copies of this file, so that several models give one line
    logging.get_logger("transformers.qwen").warning_once(not_tested())

CACHE_NAMES = ("cache", "past_key_values")
# what `generate` lets pass to forward, and reads itself (stop_strings)
FOR_GENERATE = ("tokenizer", "assistant_tokenizer")


def cache_name(output: type) -> str:
    """What a class of model outputs calls the cache, and `generate` when it hands it on: past_key_values up to 5.23, then cache."""
    fields = [field.name for field in dataclasses.fields(output)]
    for name in CACHE_NAMES:
        if name in fields:
            return name
    raise ImportError(words(CHANGED, what=f"{output.__name__} has no cache, but {', '.join(fields)}"))


def one_cache(cache, past_key_values):
    """The one cache that a caller gave, by either name. TypeError for both, and for what is no transformers Cache."""
    from transformers import Cache

    if cache is not None and past_key_values is not None:
        raise TypeError(
            "cache and past_key_values are two names of the same: give one of them (peft's prefix tuning gives both under "
            "transformers 5.24: take 5.23 for it)"
        )
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, Cache):
        raise TypeError(
            f"the cache is a {type(found).__name__}, and must be a transformers Cache (DynamicCache, StaticCache, Int8Cache ...)"
        )
    return found


def refuse_unknown(where: str, keywords: dict, known=()) -> None:
    """TypeError for keywords with a value that `where` neither reads nor hands on. None asks for nothing."""
    unknown = sorted(name for name, value in keywords.items() if value is not None and name not in known)
    if unknown:
        text = "{where} does not know {names}: it is made for transformers {oldest} to {newest}, and {installed} is installed"
        raise TypeError(words(text, where=where, names=", ".join(unknown)))


def overrides(base: type, *parameters: str):
    """Marks a method that `base` is expected to call: ImportError where it has no such method, or it takes no such parameters.

    A hook that was renamed would otherwise never be called again, in silence.
    """

    def check(method):
        require(base, getattr(method, "__func__", method).__name__, *parameters)
        return method

    return check


def require(base: type, name: str, *parameters: str) -> None:
    """ImportError unless a class of another package has this method or property, and the method takes these parameters."""
    if not hasattr(base, name):
        raise ImportError(changed(base, f"{base.__name__}.{name} is gone"))
    taken = inspect.signature(getattr(base, name)).parameters if parameters else ()
    if missing := [parameter for parameter in parameters if parameter not in taken]:
        raise ImportError(changed(base, f"{base.__name__}.{name} takes no {', '.join(missing)}"))


def changed(base: type, what: str) -> str:
    """What to tell the user of a package that is not as it was."""
    package = base.__module__.partition(".")[0]
    if package == "transformers":
        return words(CHANGED, what=what)
    return f"{package} has changed what this code builds on ({what}) - pip install the version of requirements.txt"


def check_generation_inputs(inputs: dict, length: int) -> None:
    """That `generate` does not hand the model the end of a row alone, without the cache that holds its beginning.

    inputs: what forward is given; length: tokens of the row so far. RuntimeError, where the answer would be nonsense.
    """
    given = inputs.get("input_ids")
    if given is None or given.shape[1] >= length:
        return
    cache = next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)
    # of a StaticCache it is a tensor, which a GPU would have to be waited for
    cached = cache.get_seq_length() if cache is not None else 0
    if isinstance(cached, int) and given.shape[1] + cached < length:
        what = f"generate gives the last {given.shape[1]} of {length} tokens, and a cache that holds {cached}"
        raise RuntimeError(words(CHANGED, what=what))
