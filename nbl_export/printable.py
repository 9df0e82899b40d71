"""Text from files that somebody else may have written, as text that can be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` on one line, with every character that a terminal obeys, or that is no character, as U+FFFD."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
