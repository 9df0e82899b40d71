"""Say and draw what a command does: results on stdout, progress and notes on stderr, all of it in a log file, answers
in JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

from nbl_export.cli import process
from nbl_export.errors import os_error_in_words
from nbl_export.files import jsonable, printable, printable_lines
from nbl_export.progress import Task
from nbl_export.records import to_json

OUT = Console(highlight=False)
# Bound to the stream itself: while a library is kept quiet, sys.stderr is something else.
ERR = Console(file=sys.stderr, highlight=False)
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
        answering.log = Console(file=opened, width=120, highlight=False, color_system=None)


def log(text: str, stamped: bool = True) -> None:
    """Write a line into the log file, with the time, or text of several lines as it is, if there is one."""
    if answering.log is not None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}" if stamped else printable_lines(text)
        answering.log.print(Text(line), soft_wrap=True)


def result(drawn: Any = "", soft_wrap: bool = False) -> None:
    """Draw a part of the results; with ``soft_wrap`` as one line, whatever the width."""
    for console in (OUT, answering.log):
        if console is not None:
            console.print(drawn, soft_wrap=soft_wrap)


def note(text: str) -> None:
    ERR.print(drawable(text, "dim"))
    log(text)


def say(text: str) -> None:
    """One line of result."""
    OUT.print(drawable(text))
    log(text)


def drawable(text: str, style: str = "") -> Text:
    """``text`` as it is, not as markup, in one line that a terminal can show."""
    return Text(printable(text), style=style)


def finish(command: str, text: str | None, **facts: Any) -> None:
    """The last line of a command, if it has one, or its JSON object: what it has made."""
    answer(command, facts)
    if text is not None:
        say(text)


def answer(command: str, facts: Mapping[str, Any]) -> None:
    """Write what a ``command`` found as JSON, if it is asked for: what is drawn then goes to the log file alone.

    Values, dataclasses and paths stand there by name; a report has a ``schema`` of its own.
    """
    if answering.json:
        value = facts if "schema" in facts else {"schema": ANSWER, "command": command, **facts}
        print(json.dumps(_plain(value), indent=1))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    return str(value) if isinstance(value, Path) else jsonable(value)


# progress ------------------------------------------------------------------------------------------

_TITLE = 23  # columns of a task's title
_LINES = 10.0  # seconds between two lines of a task where no bar can be drawn, as in the log of a CI job


class _CountColumn(ProgressColumn):
    """Done, total and rate: ``12.3k/65.5k tokens, 412/s``."""

    def render(self, task: RichTask) -> Text:
        rate = task.finished_speed or task.speed
        per_second = f", {_short(rate)}/s" if rate and task.total and task.total > 1 else ""
        return Text(f"{_short(task.completed)}/{_short(task.total or 0)} {task.fields['unit']}{per_second}")


class _TimeColumn(TimeRemainingColumn):
    """The remaining time, marked as such; once finished, the time it took."""

    def render(self, task: RichTask) -> Text:
        return Text("in " if task.finished else "eta ") + super().render(task)


def _short(number: float) -> str:
    if number >= 10_000:
        return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1000:.1f}k"
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"


_COUNT, _TIME = _CountColumn(), _TimeColumn(elapsed_when_finished=True)


class _Bar:
    """Moves a bar, and says how far it is every few seconds: in the log, and where the output is no terminal."""

    def __init__(self, progress: Progress, title: str, total: int, unit: str, done: int) -> None:
        self._progress, self._title = progress, printable(title)
        self._id = progress.add_task(self._title, total=total, completed=done, unit=unit)
        self._task = next(task for task in progress.tasks if task.id == self._id)
        self._said = time.monotonic()

    def advance(self, amount: int) -> None:
        self._progress.advance(self._id, amount)
        if time.monotonic() - self._said > _LINES:
            self._said, line = time.monotonic(), self._line()
            log(line)
            if not ERR.is_terminal:
                ERR.print(drawable(f"· {line}", "dim"))
        process.stop_if_asked()

    def part(self, number: int, count: int) -> None:
        # The title's column has a fixed width, and the number must not be what is cut off.
        where = f" {number}/{count}"
        self._progress.update(self._id, description=f"{self._title[: _TITLE - len(where)]}{where}")

    def end(self, shown: bool) -> None:
        """It is done, also where less than all was needed; it is still ``shown``, or goes."""
        self._progress.update(self._id, total=self._task.completed, visible=shown)
        log(self._line())

    def _line(self) -> str:
        return f"{self._task.description}: {_COUNT.render(self._task)}, {_TIME.render(self._task)}"


class TerminalListener:
    """Draws one bar for each task, with rate and remaining time, and prints notes between them.

    A task within another is a bar below the other's, as long as it is going on.
    """

    def __init__(self) -> None:
        self._drawn: Progress | None = None

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        process.stop_if_asked()
        outer = self._drawn
        words = TextColumn(f"{{task.description:<{_TITLE}.{_TITLE}}}", markup=False)
        columns = (SpinnerColumn(finished_text="[green]✓"), words, BarColumn(bar_width=10), _COUNT, _TIME)
        self._drawn = progress = outer or Progress(*columns, console=ERR, refresh_per_second=4)
        try:
            if outer is None:
                progress.start()
            bar = _Bar(progress, title, total, unit, done)
            yield bar
            bar.end(shown=outer is None)
        finally:
            self._drawn = outer
            if outer is None:
                _stop(progress)

    def note(self, text: str) -> None:
        note(f"· {text}")


def _stop(progress: Progress) -> None:
    """Stop drawing; what is said next begins a line.

    Also where a second signal comes while it stops, and where another process of several says it meanwhile: the bar and
    the end of its line are written at once.
    """
    try:
        with ERR:
            progress.stop()
    except KeyboardInterrupt:
        if not ERR.is_terminal:
            ERR.print()
        raise
