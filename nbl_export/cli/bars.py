"""Progress on stderr: a bar for each task, lines where no bar can be drawn, and notes between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

from nbl_export.cli import output, process
from nbl_export.files import printable
from nbl_export.progress import Task

_TITLE = 23  # columns of a task's title


class _CountColumn(ProgressColumn):
    """Done, total and rate: ``12.3k/65.5k tokens, 412/s``."""

    def render(self, task: RichTask) -> Text:
        rate = task.finished_speed or task.speed
        per_second = f", {_short(rate)}/s" if rate and task.total and task.total > 1 else ""
        return Text(f"{_short(task.completed)}/{_short(task.total or 0)} {task.fields['unit']}{per_second}")


class _TimeColumn(TimeRemainingColumn):
    """The remaining time, marked as such; once finished, the time it took."""

    def render(self, task: RichTask) -> Text:
        if task.finished:
            return Text("in ") + TimeElapsedColumn().render(task)
        return Text("eta ") + super().render(task)


def _short(number: float) -> str:
    if number >= 1e6:
        return f"{number / 1e6:.2f}M"
    return (
        f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:,.0f}" if number >= 10 else f"{number:.3g}"
    )


_LINES = 10.0  # seconds between two lines of a task where no bar can be drawn, as in the log of a CI job


class _BarTask:
    """Moves a bar, and says how far it is every few seconds: in the log, and where the output is no terminal."""

    def __init__(self, progress: Progress, title: str, total: int, unit: str, done: int) -> None:
        self._progress, self._title = progress, printable(title)
        self._id = progress.add_task(self._title, total=total, completed=done, unit=unit)
        self._said = time.monotonic()

    def advance(self, amount: int) -> None:
        self._progress.advance(self._id, amount)
        if time.monotonic() - self._said > _LINES:
            self._said, line = time.monotonic(), self._line()
            output.log(line)
            if not output.ERR.is_terminal:
                output.ERR.print(output.drawable(f"· {line}", "dim"))
        process.stop_if_asked()

    def end(self, shown: bool = True) -> None:
        """It is done, also where less than all was needed; it is still ``shown``, or goes."""
        self._progress.update(self._id, total=self._task.completed, visible=shown)
        output.log(self._line())

    def part(self, number: int, count: int) -> None:
        # The title's column has a fixed width, and the number must not be what is cut off.
        where = f" {number}/{count}"
        self._progress.update(self._id, description=f"{self._title[: _TITLE - len(where)]}{where}")

    @property
    def _task(self) -> RichTask:
        return next(task for task in self._progress.tasks if task.id == self._id)

    def _line(self) -> str:
        task = self._task
        return f"{task.description}: {_CountColumn().render(task)}, {_TimeColumn().render(task)}"


class TerminalListener:
    """Draws one bar for each task, with rate and remaining time, and prints notes between them.

    A task within another is a bar below the other's, as long as it is going on.
    """

    def __init__(self) -> None:
        self._drawn: Progress | None = None

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        process.stop_if_asked()
        if self._drawn is not None:
            bar = _BarTask(self._drawn, title, total, unit, done)
            yield bar
            bar.end(shown=False)
            return
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn(f"{{task.description:<{_TITLE}.{_TITLE}}}", markup=False),
            BarColumn(bar_width=10),
            _CountColumn(),
            _TimeColumn(),
        )
        self._drawn = progress = Progress(*columns, console=output.ERR, refresh_per_second=4)
        try:
            progress.start()
            bar = _BarTask(progress, title, total, unit, done)
            yield bar
            bar.end()
        finally:
            self._drawn = None
            _stop(progress)

    def note(self, text: str) -> None:
        output.note(f"· {text}")


def _stop(progress: Progress) -> None:
    """Stop drawing; what is said next begins a line.

    Also where a second signal comes while it stops, and where another process of several says it meanwhile: the bar and
    the end of its line are written at once.
    """
    try:
        with output.ERR:
            progress.stop()
    except KeyboardInterrupt:
        if not output.ERR.is_terminal:
            output.ERR.print()
        raise
