"""What the command line draws: progress bars, tables, the verdict.

Names in it come from graphs, reports and paths that somebody else may have written: every text is drawn by
:func:`_text`, which leaves nothing that a terminal obeys.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Table as RichTable
from rich.text import Text

from nbl_export.blocks import attentions
from nbl_export.checks import Check
from nbl_export.cli import answers
from nbl_export.errors import os_error_in_words
from nbl_export.printable import printable
from nbl_export.progress import Task
from nbl_export.records import to_json
from nbl_export.report.drawing import Table
from nbl_export.report.schema import Report
from nbl_export.report.summary import verdict_line
from nbl_export.report.tables import engines_table, graph_table, report_tables, verdicts_table

if TYPE_CHECKING:
    from nbl_export.doctor.diagnosis import Diagnosis
    from nbl_export.engine.pair import EngineFile
    from nbl_export.report.bench import BenchReport
    from nbl_export.report.diff.values import Diff
    from nbl_export.report.evaluation import Evaluation
    from nbl_export.rewrite.replace import RewriteResult

# Results go to stdout, progress and notes to stderr, so that output can be piped.
_out = Console(highlight=False)
# Bound to the stream itself: while a library is kept quiet, sys.stderr is something else.
_err = Console(file=sys.stderr, highlight=False)
_TITLE = 23  # columns of a task's title
_COLOURS = {
    "passed": "green",
    "failed": "bold red",
    "skipped": "yellow",
    "works": "green",
    "broken": "bold red",
    "missing": "yellow",
}


@dataclass
class _Answering:
    """How the command of this process answers."""

    json: bool = False
    log: Console | None = None


_answering = _Answering()
_LOG_WIDTH = 120


def set_up(as_json: bool, quiet: bool, log_file: Path | None) -> None:
    """From now on the answer is one JSON object, notes and progress are left out, or everything is also in a file.

    Raises :class:`InputError` for a file that cannot be written.
    """
    _answering.json, _answering.log = as_json, None
    _out.quiet, _err.quiet = as_json, quiet
    if log_file is not None:
        try:
            # Until the process ends; line by line, so that it can be watched.
            opened = log_file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise os_error_in_words(error, f"opening --log-file {log_file}") from None
        _answering.log = Console(file=opened, width=_LOG_WIDTH, highlight=False, color_system=None)


def log(text: str) -> None:
    """Write a line into the log file, with the time, if there is one."""
    if _answering.log is not None:
        _answering.log.print(Text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}"), soft_wrap=True)


def _result(drawn: Any = "", soft_wrap: bool = False) -> None:
    """Draw a part of the results; with ``soft_wrap`` as one line, whatever the width."""
    _out.print(drawn, soft_wrap=soft_wrap)
    if _answering.log is not None:
        _answering.log.print(drawn, soft_wrap=soft_wrap)


def _note(text: str) -> None:
    _err.print(_text(text, "dim"))
    log(text)


def finish(command: str, text: str | None, **facts: Any) -> None:
    """The last line of a command, if it has one, or its JSON object: what it has made."""
    _answer(answers.answer(command, facts))
    if text is not None:
        say(text)
        log(text)


def finish_tables(command: str, tables: list[Table]) -> None:
    """A command whose results are ``tables``, or its JSON object with them."""
    _answer(answers.answer(command, {"tables": tables}))
    show_tables(tables)


def _answer(value: dict[str, Any]) -> None:
    """Write the answer as JSON, if it is asked for: what is drawn then goes to the log file alone."""
    if _answering.json:
        print(answers.text_of(value))


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


# Seconds between two lines of a task where no bar can be drawn, as in the log of a CI job.
_LINES = 10.0


class _Lines:
    """Says how far the innermost task is, every few seconds: in the log, and where the output is no terminal.

    There a bar is shown only when it ends. In a thread, since a task may be at work long before it moves.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._ended = progress, threading.Event()
        self._thread = threading.Thread(target=self._say, daemon=True)

    def __enter__(self) -> None:
        if _answering.log is not None or not _err.is_terminal:
            self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _say(self) -> None:
        while not self._ended.wait(_LINES):
            going = [task for task in self._progress.tasks if not task.finished]
            if going:
                line = _line(going[-1])
                log(line)
                if not _err.is_terminal:
                    _err.print(_text(f"· {line}", "dim"))


def _line(task: RichTask) -> str:
    return f"{task.description}: {_CountColumn().render(task)}, {_TimeColumn().render(task)}"


class _BarTask:
    """Moves a bar."""

    def __init__(self, progress: Progress, task_id: TaskID, title: str) -> None:
        self._progress, self._id, self._title = progress, task_id, title

    def advance(self, amount: int) -> None:
        self._progress.advance(self._id, amount)

    def end(self) -> None:
        """It is done, also where less than all was needed."""
        task = next(task for task in self._progress.tasks if task.id == self._id)
        self._progress.update(self._id, total=task.completed)
        log(_line(task))

    def part(self, number: int, count: int) -> None:
        # The title's column has a fixed width, and the number must not be what is cut off.
        where = f" {number}/{count}"
        self._progress.update(self._id, description=f"{self._title[: _TITLE - len(where)]}{where}")


class TerminalListener:
    """Draws one bar for each task, with rate and remaining time, and prints notes between them.

    A task within another is a bar below the other's.
    """

    def __init__(self) -> None:
        self._drawn: Progress | None = None

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        if self._drawn is not None:
            bar = self._bar(self._drawn, title, total, unit, done)
            yield bar
            bar.end()
            return
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn(f"{{task.description:<{_TITLE}.{_TITLE}}}", markup=False),
            BarColumn(bar_width=10),
            _CountColumn(),
            _TimeColumn(),
        )
        self._drawn = progress = Progress(*columns, console=_err, refresh_per_second=4)
        try:
            progress.start()
            with _Lines(progress):
                bar = self._bar(progress, title, total, unit, done)
                yield bar
                bar.end()
        finally:
            self._drawn = None
            _stop(progress)

    @staticmethod
    def _bar(progress: Progress, title: str, total: int, unit: str, done: int) -> _BarTask:
        task_id = progress.add_task(printable(title), total=total, completed=done, unit=unit)
        return _BarTask(progress, task_id, printable(title))

    def note(self, text: str) -> None:
        _note(f"· {text}")


def _stop(progress: Progress) -> None:
    """Stop drawing; what is said next begins a line, also where a second signal comes while it stops."""
    try:
        progress.stop()
    except KeyboardInterrupt:
        if not _err.is_terminal:
            _err.print()
        raise


def console() -> Console:
    """That of the results, for what is drawn elsewhere."""
    return _out


def say(text: str) -> None:
    """One line of result."""
    _out.print(_text(text))


def _text(text: str, style: str = "") -> Text:
    """``text`` as it is, not as markup, in one line that a terminal can show."""
    return Text(printable(text), style=style)


def show_tables(tables: list[Table]) -> None:
    for table in tables:
        _result(_drawn(table))
        if table.note:
            _result(_text(table.note, "dim"))
        for problem in table.problems:
            _result(_text(problem, "yellow"))
        _result()


def show_rewrite(result: RewriteResult) -> None:
    """The graph before and after."""
    show_tables([graph_table(result.before, result.after)])


def show_diagnosis(found: Diagnosis) -> None:
    """The machine, the packages, what is missing, and whether the main job runs."""
    from nbl_export.doctor.tables import diagnosis_tables, offers

    _answer(answers.answer("doctor", {"runs_here": found.runs_here, **to_json(found)}))
    for table in diagnosis_tables(found):
        drawn = _drawn(table)
        for column in drawn.columns:
            column.justify = "left"
        _result(drawn)
        _result()
    if missing := offers(found):
        _result(_text("What is missing, and what brings it", "bold"))
        for use, line in missing:
            _result(_text(use))
            _result(_text(f"    {line}", "cyan"), soft_wrap=True)  # a line that can be copied
        _result()
    for problem in found.problems:
        _result(_text(problem, "yellow"), soft_wrap=True)
    for sentence in found.lacking:
        _result(_text(sentence, "bold red"), soft_wrap=True)
    runs = "The main job runs here." if found.runs_here else "The main job does not run here."
    _result(_text(runs, "bold green" if found.runs_here else "bold red"))


def show_engines(engines: list[EngineFile]) -> None:
    """What was built, from the manifests."""
    show_tables([engines_table([engine.manifest for engine in engines])])


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(
        title=_text(table.title, "bold"),
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for number, column in enumerate(table.columns):
        drawn.add_column(_text(column), justify="left" if number == 0 else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(_text(cell, _COLOURS.get(cell, "")) for cell in row))
    return drawn


def show_report(report: Report, out: Path) -> None:
    """The summary of a run: tables, then checks, then the verdict and where to look next."""
    _answer(report.as_json())
    layers, name = report.selection.layers, Path(report.model.source).name
    show_tables(report_tables(report, brief=True))
    _show_checks(report.checks)
    every = [candidate.layer for candidate in report.selection.candidates]
    what = "attention layers" if len(attentions(every)) == len(every) else "blocks"
    text = f"      {len(layers)} of {len(report.selection.candidates)} {what} of {name} are now linear" + (
        f": {', '.join(map(str, layers))}" if layers else ""
    )
    _result(_verdict(report.passed) + _text(f"  {verdict_line(report)}"))
    _result(_text(text))
    if report.divergence:
        _result(_text(f"      {report.divergence}", "red"))
    _result(_text(f"      model {out / 'model.onnx'}   report {out / 'report' / 'report.html'}"))


def show_evaluation(value: Evaluation, out: Path) -> None:
    """The tables of an evaluation, its verdicts, and where to look next."""
    from nbl_export.report.evaluation import evaluation_tables

    _answer(value.as_json())
    _show_judged(value, evaluation_tables(value, brief=True))
    _result(_text(f"evaluation {out / 'report' / 'eval.md'}"))


def show_bench(value: BenchReport, out: Path) -> None:
    """The table of a bench, its verdicts, and where to look next."""
    from nbl_export.report.speed import BENCH, speed_tables

    _answer(value.as_json())
    _show_judged(value, speed_tables(BENCH, value.speed, brief=True))
    for note in value.notes:
        _result(_text(note))
    _result(_text(f"bench {out / 'report' / 'bench.md'}"))


def show_diff(value: Diff, as_markdown: bool) -> None:
    """What changed: its tables, its gates and its verdict, or all of it as Markdown."""
    from nbl_export.report.diff.drawing import headline_table, markdown, tables, verdict_line

    _answer(answers.answer("diff", to_json(value)))
    if as_markdown and not _answering.json:
        print(markdown(value), end="")
        return
    show_tables([*tables(value, brief=True), headline_table(value, brief=True)])
    for note in value.notes:
        _result(_text(note))
    if value.checks:
        _show_checks(value.checks)
        _result(_verdict(value.passed) + _text(f"  {verdict_line(value)}"))
    else:
        _result(_text(verdict_line(value)))


def _show_judged(value: Evaluation | BenchReport, tables: list[Table]) -> None:
    show_tables(tables)
    if value.checks:
        _show_checks(value.checks)
        _result(_verdict(value.passed))


def _show_checks(checks: Sequence[Check]) -> None:
    drawn = _drawn(verdicts_table(checks))
    drawn.columns[-1].justify = "left"
    _result(drawn)


def _verdict(passed: bool) -> Text:
    return Text("PASS", style="bold green") if passed else Text("FAIL", style="bold red")
