"""What `generate` reads and writes: a prompt from words, a file or the standard input, and text as it is generated."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import printable_lines, read_bytes
from nbl_export.settings.definition import UsageError
from nbl_export.settings.measuring import BOTH

if TYPE_CHECKING:
    from nbl_export.generate.answer import Generated

_MOST = 64 << 20  # bytes of a prompt
_STDIN = Path("-")
_WHY = {
    "max-tokens": "cut at --max-tokens",
    "positions": "cut at the model's last position",
    "stopped": "stopped",
}


def prompt_of(words: str | None, file: Path | None) -> str:
    """The prompt, without the line end that closes a file; raises :class:`InputError` if there is none."""
    if words is not None and file is not None:
        raise UsageError("--prompt and --prompt-file are two prompts: give one of them.")
    where = "--prompt" if words is not None else f"--prompt-file {file}" if file else "The standard input"
    try:
        if words is not None:
            text = words
            text.encode("utf-8")
        elif file is None or file == _STDIN:
            if sys.stdin is None or sys.stdin.isatty():
                raise UsageError(
                    "There is no prompt: give --prompt TEXT, --prompt-file FILE, or text on the standard input."
                )
            text = _decoded(sys.stdin.buffer.read())
        else:
            text = _decoded(read_bytes(file, _MOST))
    except UnicodeError:
        raise InputError(f"{where} is not UTF-8: convert it.") from None
    except FileNotFoundError:
        raise InputError(f"{where}: there is no such file.") from None
    except OSError as error:
        raise os_error_in_words(error, f"reading {where}") from None
    if not text.strip():
        raise InputError(f"{where} has no text: give a prompt.")
    return text


def _decoded(content: bytes) -> str:
    return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")


def is_typed(words: str | None, file: Path | None) -> bool:
    """Whether somebody types the prompts."""
    return words is None and file is None and sys.stdin is not None and sys.stdin.isatty()


def typed() -> Iterator[str]:
    """The lines that are typed, until the end (Ctrl-D)."""
    with contextlib.suppress(EOFError):
        while True:
            if (line := input("> ")).strip():
                yield line.encode("utf-8", "replace").decode("utf-8")  # bytes that are no text


class Written:
    """Writes pieces of text to the standard output as they come: as they are into a file or a pipe, printable to a
    terminal. Of two graphs, the name of each stands above its text. Nothing is written unless it is ``heard``.
    """

    def __init__(self, graph: str, heard: bool = True) -> None:
        self._heard = heard
        self._named, self._name, self._last = graph == BOTH, "", ""
        self._terminal = sys.stdout.isatty()
        if not self._terminal:
            with contextlib.suppress(AttributeError, io.UnsupportedOperation, ValueError):
                sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]

    def piece(self, graph: str, piece: str) -> bool:
        """Write a piece of a graph's text; False once nobody reads it."""
        if self._named and graph != self._name:
            self._write(f"{self._between}{graph}:\n")
        self._name = graph
        self._write(printable_lines(piece) if self._terminal else piece)
        sys.stdout.flush()
        return getattr(sys.stdout, "lost", None) is None

    def end(self) -> None:
        """End the last line where somebody looks at it, or another text could stand before it."""
        if (self._terminal or self._named) and not self._last.endswith("\n"):
            self._write("\n")
            sys.stdout.flush()

    @property
    def _between(self) -> str:
        return "" if not self._name else "\n" if self._last.endswith("\n") else "\n\n"

    def _write(self, text: str) -> None:
        if self._heard:
            sys.stdout.write(text)
        self._last = text[-1:] or self._last


def figures_line(answer: Generated) -> str:
    """Which graph answered, what that took, and why it ended where the model did not end it."""
    figures = answer.figures
    read = (
        f"{what} {count:,} tokens{_rate(rate)}"
        for what, count, rate in (
            ("prefill", figures.prompt_tokens, figures.prefill_rate),
            ("decode", figures.decoded_tokens, figures.decode_rate),
        )
        if count
    )
    return f"{answer.graph}: " + " · ".join([*read, *filter(None, [_WHY.get(answer.why, "")])])


def _rate(rate: float | None) -> str:
    return "" if rate is None else f" {rate:,.0f}/s" if rate >= 10 else f" {rate:.2g}/s"
