"""Text from files that somebody else may have written, as text that can be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` on one line, with every character that a terminal obeys, or that is no character, as U+FFFD."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def printable_lines(text: str) -> str:
    """``text`` with its lines, each as :func:`printable` has it; a tab is four spaces, other white space is one."""
    return "".join(
        "\n" if c == "\n" else "    " if c == "\t" else " " if c.isspace() else printable(c) for c in text
    )
