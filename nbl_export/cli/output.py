"""Where a command speaks: results on stdout, progress and notes on stderr, all of it in a log file; answers in JSON."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nbl_export.cli import answers
from nbl_export.errors import os_error_in_words
from nbl_export.printable import printable, printable_lines

# Results go to stdout, progress and notes to stderr, so that output can be piped.
OUT = Console(highlight=False)
# Bound to the stream itself: while a library is kept quiet, sys.stderr is something else.
ERR = Console(file=sys.stderr, highlight=False)
_LOG_WIDTH = 120


@dataclass
class _Answering:
    """How the command of this process answers."""

    json: bool = False
    log: Console | None = None


answering = _Answering()


def set_up(as_json: bool, quiet: bool, log_file: Path | None) -> None:
    """From now on the answer is one JSON object, notes and progress are left out, or everything is also in a file.

    Raises :class:`InputError` for a file that cannot be written.
    """
    answering.json, answering.log = as_json, None
    OUT.quiet, ERR.quiet = as_json, quiet
    if log_file is not None:
        try:
            # Until the process ends; line by line, so that it can be watched.
            opened = log_file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise os_error_in_words(error, f"opening --log-file {log_file}") from None
        answering.log = Console(file=opened, width=_LOG_WIDTH, highlight=False, color_system=None)


def log(text: str) -> None:
    """Write a line into the log file, with the time, if there is one."""
    if answering.log is not None:
        answering.log.print(Text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}"), soft_wrap=True)


def log_text(text: str) -> None:
    """Write text of several lines into the log file as it is, if there is one."""
    if answering.log is not None:
        answering.log.print(Text(printable_lines(text)), soft_wrap=True)


def result(drawn: Any = "", soft_wrap: bool = False) -> None:
    """Draw a part of the results; with ``soft_wrap`` as one line, whatever the width."""
    OUT.print(drawn, soft_wrap=soft_wrap)
    if answering.log is not None:
        answering.log.print(drawn, soft_wrap=soft_wrap)


def note(text: str) -> None:
    ERR.print(drawable(text, "dim"))
    log(text)


def finish(command: str, text: str | None, **facts: Any) -> None:
    """The last line of a command, if it has one, or its JSON object: what it has made."""
    answer(answers.answer(command, facts))
    if text is not None:
        say(text)


def answer(value: dict[str, Any]) -> None:
    """Write the answer as JSON, if it is asked for: what is drawn then goes to the log file alone."""
    if answering.json:
        print(answers.text_of(value))


def say(text: str) -> None:
    """One line of result."""
    OUT.print(drawable(text))
    log(text)


def drawable(text: str, style: str = "") -> Text:
    """``text`` as it is, not as markup, in one line that a terminal can show."""
    return Text(printable(text), style=style)
