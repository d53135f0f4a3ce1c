"""Special-token text inside a conversation, kept apart from the control tokens that a chat template writes.

Before the template runs, each special token in a text gives its place to a placeholder, which no template knows. So every
special token in what the template returns is the template's own: turns begin and end there, whatever people have written.
Afterwards the placeholders become what stood there.
"""

import os
import re

OPEN, CLOSE = "\ue000", "\ue001"  # from a private area of Unicode


class ControlText:
    """tokens: the special tokens of a tokenizer, as text."""

    def __init__(self, tokens: list[str]):
        longest_first = sorted(tokens, key=len, reverse=True)
        self.texts = [OPEN, *longest_first]  # the placeholder's own character is replaced, too
        self._beginning = os.path.commonprefix(longest_first)  # "<|": a text without it is let through at once
        self._number = {text: number for number, text in enumerate(self.texts)}
        self._in_data = re.compile("|".join(map(re.escape, self.texts)))
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._in_rendered = re.compile(f"{OPEN}([0-9]+){CLOSE}|({self.special.pattern})")

    def is_suspect(self, text: str) -> bool:
        """Whether a text must be looked at: quick, and nearly always False."""
        return self._beginning in text or OPEN in text

    def holds(self, value: object, but: frozenset[str] = frozenset()) -> bool:
        """Is there a special token, other than those of `but`, in a text, or anywhere in a JSON value?"""
        if isinstance(value, str):
            return self._beginning in value and any(match[0] not in but for match in self.special.finditer(value))
        if isinstance(value, dict):
            return any(self.holds(key, but) or self.holds(each, but) for key, each in value.items())
        return isinstance(value, list) and any(self.holds(each, but) for each in value)

    def hide(self, value: object) -> object:
        """The text or JSON value with placeholders in place of special tokens; the same object where there are none."""
        if isinstance(value, str):
            return self._in_data.sub(self._placeholder, value) if self.is_suspect(value) else value
        if isinstance(value, dict):
            return {self.hide(key): self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, list) else value

    def _placeholder(self, match: re.Match) -> str:
        return f"{OPEN}{self._number[match[0]]}{CLOSE}"

    def split(self, rendered: str):
        """Cuts what a template returned into (begin, end, text, whose): whose is "" for plain text, "data" for a special
        token that people wrote, "frame" for one of the template's. begin and end are places in `rendered`."""
        at = 0
        for match in self._in_rendered.finditer(rendered):
            if at < match.start():
                yield at, match.start(), rendered[at : match.start()], ""
            if match[2] is not None:
                yield *match.span(), match[2], "frame"
            else:
                text = self.texts[int(match[1])]
                yield *match.span(), text, "" if text == OPEN else "data"
            at = match.end()
        if at < len(rendered):
            yield at, len(rendered), rendered[at:], ""

    def restore(self, text: str) -> str:
        """A text as it was before hide()."""
        return re.sub(f"{OPEN}([0-9]+){CLOSE}", lambda match: self.texts[int(match[1])], text)
