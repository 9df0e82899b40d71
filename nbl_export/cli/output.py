"""Where a command speaks: results on stdout, progress and notes on stderr, all of it in a log file; answers in JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from nbl_export.errors import os_error_in_words
from nbl_export.files import jsonable, printable, printable_lines
from nbl_export.records import to_json

if TYPE_CHECKING:
    from nbl_export.linearize.plan import Plan
    from nbl_export.rewrite.replace import RewriteResult

# Results go to stdout, progress and notes to stderr, so that output can be piped.
OUT = Console(highlight=False)
# Bound to the stream itself: while a library is kept quiet, sys.stderr is something else.
ERR = Console(file=sys.stderr, highlight=False)
_LOG_WIDTH = 120
ANSWER = "nbl-export/answer/1"


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
    answer(answer_of(command, facts))
    if text is not None:
        say(text)


def answer(value: dict[str, Any]) -> None:
    """Write the answer as JSON, if it is asked for: what is drawn then goes to the log file alone."""
    if answering.json:
        print(text_of(value))


def say(text: str) -> None:
    """One line of result."""
    OUT.print(drawable(text))
    log(text)


def drawable(text: str, style: str = "") -> Text:
    """``text`` as it is, not as markup, in one line that a terminal can show."""
    return Text(printable(text), style=style)


# answers in JSON ----------------------------------------------------------------------------------


def answer_of(command: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The object of a ``command`` that has no report: values, dataclasses and paths by name."""
    return {"schema": ANSWER, "command": command, **facts}


def text_of(value: Any) -> str:
    """``value`` as the text of a JSON document."""
    return json.dumps(_plain(value), indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    return jsonable(value)


def of_plan(plan: Plan) -> dict[str, Any]:
    """What was chosen, and how it was fitted; not W and b."""
    names = ("model", "criterion", "fit", "fit_input", "ridge", "repair", "rank", "calibration_tokens")
    return {
        "k": len(plan.chosen),
        "layers": plan.blocks,
        **{name: getattr(plan, name) for name in names},
        "ranks": {str(layer): rank for layer, rank in plan.ranks.items()},
    }


def of_rewrite(result: RewriteResult) -> dict[str, Any]:
    """The files that were written, the graph before and after, and the proof of each block."""
    from nbl_export.rewrite.replace import rewrite_summary

    return {"files": result.files, "graph": rewrite_summary(result)}
