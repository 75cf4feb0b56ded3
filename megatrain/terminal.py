"""Text of others, such as a document's or a file's name, made fit to be shown on a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but tab and newline, DEL, C1, what changes the direction of text, lone surrogates."""


def printable(text: str) -> str:
    r"""The text with each character that would command a terminal as `\u001b`, as JSON spells it."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
