"""Say and draw what a command does: results on stdout, progress and notes on stderr, all of it in a log file, answers
in JSON; and what this process is to whoever started it.

1. SIGTERM and SIGHUP end it as Ctrl-C does: what is unfinished is cleaned up, one sentence is said, and the exit code
   is the shell's, 128 + the signal's number. A library may swallow what a signal raises within it (torch.export has
   such places): it is raised again at the next step of the work (:func:`stop_if_asked`). Or it makes another error of
   it, as C++ does that calls Python: whatever fails after a signal came is told as the interrupt, and what the library
   logs of it is not.
2. A stream that nobody reads ends the output, never the work. Where the results could not be written for another
   reason, that is said at the end, and the exit code is not 0.
3. Of several processes (:mod:`nbl_export.ranks`), the first alone writes to its streams, but for the sentence of an
   error, which one of them says.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.table import Table as RichTable
from rich.text import Text

from nbl_export.errors import Interrupted, os_error_in_words
from nbl_export.files import jsonable, printable, printable_lines
from nbl_export.processes import in_main_thread, on_signals
from nbl_export.progress import Task
from nbl_export.ranks import place

if TYPE_CHECKING:
    from nbl_export.doctor import Diagnosis
    from nbl_export.report.drawing import Table

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)
LOG = Console(quiet=True, width=120, highlight=False, color_system=None)
ANSWER = "nbl-export/answer/1"


def set_up(as_json: bool, quiet: bool, log_file: Path | None) -> None:
    """From now on the answer is one JSON object, notes and progress are left out, or everything is also in a file.

    Raises :class:`InputError` for a file that cannot be written.
    """
    OUT.quiet, ERR.quiet, LOG.quiet = as_json, quiet, log_file is None
    if log_file is not None:
        try:
            # Until the process ends; line by line, so that it can be watched.
            LOG.file = log_file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise os_error_in_words(error, f"opening --log-file {log_file}") from None


def log(text: str, stamped: bool = True) -> None:
    """Write a line into the log file, with the time, or text of several lines as it is, if there is one."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}" if stamped else printable_lines(text)
    LOG.print(Text(line), soft_wrap=True)


def result(drawn: Any = "", soft_wrap: bool = False) -> None:
    """Draw a part of the results; with ``soft_wrap`` as one line, whatever the width."""
    for console in (OUT, LOG):
        console.print(drawn, soft_wrap=soft_wrap)


def drawable(text: str, style: str = "") -> Text:
    """``text`` as it is, not as markup, in one line that a terminal can show."""
    return Text(printable(text), style=style)


def finish(command: str, text: str | None, **facts: Any) -> None:
    """The last line of a command, if it has one, or its JSON object: what it has made."""
    answer(command, facts)
    if text is not None:
        result(drawable(text))


def answer(command: str, facts: Mapping[str, Any]) -> None:
    """Write what a ``command`` found as JSON, if it is asked for: what is drawn then goes to the log file alone.

    Values, dataclasses and paths stand there by name; a report has a ``schema`` of its own.
    """
    if OUT.quiet:
        value = facts if "schema" in facts else {"schema": ANSWER, "command": command, **facts}
        print(json.dumps(jsonable(value), indent=1))


# tables --------------------------------------------------------------------------------------------

_COLOURS = {
    "passed": "green",
    "failed": "bold red",
    "skipped": "yellow",
    "works": "green",
    "broken": "bold red",
    "missing": "yellow",
}


def show_tables(tables: Sequence[Table]) -> None:
    for table in tables:
        result(drawn(table))
        for line, colour in [(table.note, "dim"), *((problem, "yellow") for problem in table.problems)]:
            if line:
                result(drawable(line, colour))
        result()


def drawn(table: Table, left: bool = False) -> RichTable:
    found = RichTable(
        title=drawable(table.title, "bold"),
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for number, column in enumerate(table.columns):
        found.add_column(
            drawable(column), justify="left" if left or number == 0 else "right", overflow="fold"
        )
    for row in table.rows:
        found.add_row(*(drawable(cell, _COLOURS.get(cell, "")) for cell in row))
    return found


def show_diagnosis(found: Diagnosis) -> None:
    """The machine, the packages, what is missing, and whether the main job runs."""
    answer("doctor", {"runs_here": found.runs_here, **vars(found)})
    for table in found.tables:
        result(drawn(table, left=True))
        result()
    if missing := found.offers:
        result(drawable("What is missing, and what brings it", "bold"))
        for use, line in missing:
            result(drawable(use))
            result(drawable(f"    {line}", "cyan"), soft_wrap=True)  # a line that can be copied
        result()
    runs = "The main job runs here." if found.runs_here else "The main job does not run here."
    said = [(problem, "yellow") for problem in found.problems]
    said += [(sentence, "bold red") for sentence in found.lacking]
    for line, colour in [*said, (runs, "bold green" if found.runs_here else "bold red")]:
        result(drawable(line, colour), soft_wrap=True)


# progress ------------------------------------------------------------------------------------------

_TITLE = 23  # columns of a task's title
_LINES = 60.0  # seconds between two lines of a task where no bar can be drawn, as in the log of a CI job


class _CountColumn(ProgressColumn):
    """Done, total and rate: ``12.3k/65.5k tokens, 412/s``."""

    def render(self, task: RichTask) -> Text:
        rate = task.finished_speed or task.speed
        per_second = f", {_short(rate)}/s" if rate and task.total and task.total > 1 else ""
        return Text(f"{_short(task.completed)}/{_short(task.total or 0)} {task.fields['unit']}{per_second}")


class _TimeColumn(TimeRemainingColumn):
    """The remaining time, marked as such, if it is known; once finished, the time it took."""

    def render(self, task: RichTask) -> Text:
        if not task.finished and task.time_remaining is None:
            return Text()
        return Text("in " if task.finished else "eta ") + super().render(task)


def _short(number: float) -> str:
    if number >= 10_000:
        return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1000:.1f}k"
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"


_COUNT, _TIME = _CountColumn(), _TimeColumn(elapsed_when_finished=True)


class _Bar:
    """Moves a bar, and says how far it has come, once a minute: in the log, and where the output is no terminal."""

    def __init__(self, progress: Progress, title: str, total: int, unit: str, done: int) -> None:
        self._progress, self._title = progress, printable(title)
        self._id = progress.add_task(self._title, total=total, completed=done, unit=unit)
        self._task = next(task for task in progress.tasks if task.id == self._id)
        self._said, self._done = time.monotonic(), done

    def advance(self, amount: int) -> None:
        self._progress.advance(self._id, amount)
        if time.monotonic() - self._said > _LINES and self._task.completed > self._done:
            self._said, self._done, line = time.monotonic(), int(self._task.completed), self._line()
            log(line)
            if not ERR.is_terminal:
                ERR.print(drawable(f"· {line}", "dim"))
        stop_if_asked()

    def part(self, number: int, count: int) -> None:
        # The title's column has a fixed width, and the number must not be what is cut off.
        where = f" {number}/{count}"
        self._progress.update(self._id, description=f"{self._title[: _TITLE - len(where)]}{where}")

    def end(self, shown: bool) -> None:
        """It is done, also where less than all was needed; it is still ``shown``, or goes."""
        self._progress.update(self._id, total=self._task.completed, visible=shown)
        log(self._line())

    def _line(self) -> str:
        figures = (_COUNT.render(self._task), _TIME.render(self._task))
        return f"{self._task.description}: {', '.join(figure.plain for figure in figures if figure)}"


class TerminalListener:
    """Draws one bar for each task, with rate and remaining time, and prints notes between them.

    A task within another is a bar below the other's, as long as it is going on.
    """

    def __init__(self) -> None:
        self._drawn: Progress | None = None

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        stop_if_asked()
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
        ERR.print(drawable(f"· {text}", "dim"))
        log(f"· {text}")


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


# signals and streams --------------------------------------------------------------------------------

asked: list[int] = []  # the signals that came


class Stream:
    """The stream ``to``, but writing never fails: ``lost`` is the first error, after which nothing is written.

    ``to`` is None for a stream that was closed from the start. What is written while it is not ``heard`` is dropped.
    """

    def __init__(self, to: TextIO | None) -> None:
        self.heard = place().first
        self.lost = None if to else OSError(errno.EBADF, "it is closed")
        self._to = to or Path(os.devnull).open("w")  # noqa: SIM115, since it is a stream

    def write(self, text: str) -> int:
        self._do(lambda: self._to.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._to.flush)

    def _do(self, what: Callable[[], object]) -> None:
        if self.heard and self.lost is None:
            try:
                what()
            except OSError as error:
                self.lost = error
                # What it still holds is written when it is closed, and must not fail again then.
                with suppress(OSError, ValueError), Path(os.devnull).open("w") as nothing:
                    os.dup2(nothing.fileno(), self._to.fileno())

    def isatty(self) -> bool:
        return self.heard and self._to.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_to"], name)


@contextmanager
def streams() -> Iterator[Stream]:
    """The standard output within the block, in which it and the standard error are :class:`Stream`."""
    before = sys.stdout, sys.stderr
    for number in range(3):  # the next file would take the number of a closed stream, and get its output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):  # shows another sign for what its encoding does not have
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = Stream(before[0]), Stream(before[1])  # type: ignore[assignment]
    ERR.file = sys.stderr  # type: ignore[assignment]  # bound to it: libraries are kept quiet by another one
    try:
        yield sys.stdout  # type: ignore[misc]
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before
        ERR.file = None  # type: ignore[assignment]


@contextmanager
def signals() -> Iterator[None]:
    """Within the block, SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`."""

    def end(signum: int) -> None:
        asked.append(signum)
        logging.disable()
        raise Interrupted(signum)

    try:
        with on_signals(end):
            yield
    finally:
        asked.clear()
        logging.disable(logging.NOTSET)


def stop_if_asked() -> None:
    """Raises :class:`Interrupted` if a signal asked this process to end and it still works."""
    if asked and in_main_thread():
        raise Interrupted(asked[-1])
