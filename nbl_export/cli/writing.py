"""Read prompts from words, a file, the standard input or whoever types, and write text as it is generated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.cli.output import log
from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import printable_lines, read_bytes
from nbl_export.progress import Listener
from nbl_export.settings.definition import UsageError
from nbl_export.settings.measuring import BOTH

if TYPE_CHECKING:
    from nbl_export.generate.answer import Generated

_MOST = 64 << 20  # bytes of a prompt
_WHY = {
    "max-tokens": "cut at --max-tokens",
    "positions": "cut at the model's last position",
    "stopped": "stopped",
}


def prompts(words: str | None, file: Path | None, asked: bool) -> str | Iterator[str]:
    """The prompt, without the line end that closes a file, or lines as they are typed, unless one is ``asked`` for.

    Raises :class:`InputError` if there is none.
    """
    if words is not None and file is not None:
        raise UsageError("--prompt and --prompt-file are two prompts: give one of them")
    where = "--prompt" if words is not None else f"--prompt-file {file}" if file else "The standard input"
    try:
        if words is not None:
            text = words.encode("utf-8").decode("utf-8")
        elif file and file != Path("-"):
            text = _decoded(read_bytes(file, _MOST))
        elif sys.stdin is not None and not sys.stdin.isatty():
            text = _decoded(sys.stdin.buffer.read())
        elif sys.stdin is not None and not asked and file is None:
            return _typed()
        else:
            raise UsageError(
                "There is no prompt: give --prompt TEXT, --prompt-file FILE, or a standard input"
            )
    except UnicodeError:
        raise InputError(f"{where} is not UTF-8: convert it.") from None
    except OSError as error:
        raise os_error_in_words(error, f"reading {where}") from None
    if not text.strip():
        raise InputError(f"{where} has no text: give a prompt.")
    return text


def _decoded(content: bytes) -> str:
    return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")


def _typed() -> Iterator[str]:
    """The lines that are typed, until the end (Ctrl-D)."""
    with contextlib.suppress(EOFError):
        while True:
            if (line := input("> ")).strip():
                yield line.encode("utf-8", "replace").decode("utf-8")  # bytes that are no text


class Written:
    """Writes pieces of text to the standard output as they come: as they are into a file or a pipe, printable to a
    terminal. Of two graphs, the name of each stands above its text. Nothing is written unless it is ``heard``.
    """

    def __init__(self, graph: str, listener: Listener, heard: bool = True) -> None:
        self._both, self._listener, self._heard = graph == BOTH, listener, heard
        self._name, self._last, self._terminal = "", "", sys.stdout.isatty()
        if not self._terminal:
            with contextlib.suppress(AttributeError, ValueError):
                sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]

    def piece(self, graph: str, piece: str) -> bool:
        """Write a piece of a graph's text; False once nobody reads it."""
        if self._both and graph != self._name:
            self._write("\n" * bool(self._name) + f"{graph}:\n")
        self._name = graph
        self._write(printable_lines(piece) if self._terminal else piece)
        return getattr(sys.stdout, "lost", None) is None

    def answered(self, answer: Generated) -> None:
        """End the last line where somebody looks at it, or another text could stand before it; note the figures."""
        if (self._terminal or self._both) and not self._last.endswith("\n"):
            self._write("\n")
        self._listener.note(figures_line(answer))
        log(answer.text, stamped=False)

    def _write(self, text: str) -> None:
        if self._heard:
            sys.stdout.write(text)
            sys.stdout.flush()
        self._last = text or self._last


def figures_line(answer: Generated) -> str:
    """Which graph answered, what that took, and why it ended where the model did not end it."""
    f = answer.figures
    read = (("prefill", f.prompt_tokens, f.prefill_seconds), ("decode", f.decoded_tokens, f.decode_seconds))
    rates = [(what, count, count / seconds if seconds else 0.0) for what, count, seconds in read if count]
    said = [f"{what} {count:,} tokens {rate:,.{0 if rate >= 10 else 1}f}/s" for what, count, rate in rates]
    return f"{answer.graph}: " + " · ".join([*said, *filter(None, [_WHY.get(answer.why, "")])])
