"""Text from files, shown on a terminal: control characters are shown, not sent."""

from __future__ import annotations

import regex

# Controls, and the format characters that turn or hide text: a passage may hold a terminal's escape sequences.
_UNSAFE = regex.compile(r"[\p{Cc}\p{Cs}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""The text with each control character as Python writes it.

    >>> print(visible("red \x1b[31m alert"))
    red \x1b[31m alert
    """
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)
