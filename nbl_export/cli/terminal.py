"""What the command line draws: tables, reports, the verdict.

Names in it come from graphs, reports and paths that somebody else may have written: every text is drawn by
:func:`.output.drawable`, which leaves nothing that a terminal obeys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from nbl_export.cli.bars import TerminalListener
from nbl_export.cli.output import (
    answer,
    answer_of,
    answering,
    drawable,
    finish,
    of_plan,
    of_rewrite,
    result,
    say,
    set_up,
)
from nbl_export.records import Check, to_json
from nbl_export.report.drawing import Table
from nbl_export.report.schema import Report
from nbl_export.report.summary import loss_in_words, numbered, replaced, verdict_line
from nbl_export.report.tables import engines_table, graph_table, report_tables, verdicts_table

if TYPE_CHECKING:
    from nbl_export.doctor import Diagnosis
    from nbl_export.engine.build import EngineFile
    from nbl_export.report.diff import Diff
    from nbl_export.report.evaluation import Evaluation
    from nbl_export.report.schema import BenchReport, Conversion
    from nbl_export.rewrite.replace import RewriteResult
    from nbl_export.stages.dry_run import DryRun
    from nbl_export.stages.package import Package, Verified

__all__ = ["TerminalListener", "finish", "of_plan", "of_rewrite", "say", "set_up"]

_COLOURS = {
    "passed": "green",
    "failed": "bold red",
    "skipped": "yellow",
    "works": "green",
    "broken": "bold red",
    "missing": "yellow",
}


def finish_tables(command: str, tables: list[Table]) -> None:
    """A command whose results are ``tables``, or its JSON object with them."""
    answer(answer_of(command, {"tables": tables}))
    show_tables(tables)


def show_dry_run(ahead: DryRun) -> None:
    """What a run would do, or its JSON object."""
    answer(answer_of("dry-run", to_json(ahead)))
    show_tables(ahead.tables)


def show_tables(tables: list[Table]) -> None:
    for table in tables:
        result(_drawn(table))
        if table.note:
            result(drawable(table.note, "dim"))
        for problem in table.problems:
            result(drawable(problem, "yellow"))
        result()


def show_rewrite(result: RewriteResult) -> None:
    """The graph before and after."""
    show_tables([graph_table(result.before, result.after)])


def show_diagnosis(found: Diagnosis) -> None:
    """The machine, the packages, what is missing, and whether the main job runs."""
    answer(answer_of("doctor", {"runs_here": found.runs_here, **to_json(found)}))
    for table in found.tables:
        drawn = _drawn(table)
        for column in drawn.columns:
            column.justify = "left"
        result(drawn)
        result()
    if missing := found.offers:
        result(drawable("What is missing, and what brings it", "bold"))
        for use, line in missing:
            result(drawable(use))
            result(drawable(f"    {line}", "cyan"), soft_wrap=True)  # a line that can be copied
        result()
    for problem in found.problems:
        result(drawable(problem, "yellow"), soft_wrap=True)
    for sentence in found.lacking:
        result(drawable(sentence, "bold red"), soft_wrap=True)
    runs = "The main job runs here." if found.runs_here else "The main job does not run here."
    result(drawable(runs, "bold green" if found.runs_here else "bold red"))


def show_engines(engines: list[EngineFile]) -> None:
    """What was built, from the manifests."""
    show_tables([engines_table([engine.manifest for engine in engines])])


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(
        title=drawable(table.title, "bold"),
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for number, column in enumerate(table.columns):
        drawn.add_column(drawable(column), justify="left" if number == 0 else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(drawable(cell, _COLOURS.get(cell, "")) for cell in row))
    return drawn


def show_report(report: Report, out: Path) -> None:
    """The summary of a run: tables, then checks, then the verdict and where to look next."""
    answer(report.as_json())
    layers, name = report.selection.layers, Path(report.model.source).name
    show_tables(report_tables(report, brief=True))
    _show_checks(report.checks)
    now = "left out" if report.selection.fit == "drop" else "now linear"
    linear = f"      {replaced(report)} of {name} are {now}" + (f": {numbered(layers)}" if layers else "")
    result(_verdict(report.passed) + drawable(f"  {verdict_line(report)}"))
    result(drawable(linear))
    if report.divergence:
        result(drawable(f"      {report.divergence}", "red"))
    result(drawable(f"      model {out / 'model.onnx'}   report {out / 'report' / 'report.html'}"))


def show_evaluation(value: Evaluation, out: Path) -> None:
    """The tables of an evaluation, its verdicts, and where to look next."""
    from nbl_export.report.evaluation import evaluation_tables

    answer(value.as_json())
    _show_judged(value, evaluation_tables(value, brief=True))
    result(drawable(f"evaluation {out / 'report' / 'eval.md'}"))


def show_bench(value: BenchReport, out: Path) -> None:
    """The table of a bench, its verdicts, and where to look next."""
    from nbl_export.report.speed import BENCH, speed_table

    answer(value.as_json())
    _show_judged(value, [speed_table(BENCH, value.speed, brief=True)])
    for note in value.notes:
        result(drawable(note))
    result(drawable(f"bench {out / 'report' / 'bench.md'}"))


def show_diff(value: Diff, as_markdown: bool) -> None:
    """What changed: its tables, its gates and its verdict, or all of it as Markdown."""
    from nbl_export.report.diff import headline_table, markdown, tables, verdict_line

    answer(answer_of("diff", to_json(value)))
    if as_markdown and not answering.json:
        print(markdown(value), end="")
        return
    show_tables([*tables(value, brief=True), headline_table(value, brief=True)])
    for note in value.notes:
        result(drawable(note))
    if value.checks:
        _show_checks(value.checks)
        result(_verdict(value.passed) + drawable(f"  {verdict_line(value)}"))
    else:
        result(drawable(verdict_line(value)))


def _show_judged(value: Evaluation | BenchReport, tables: list[Table]) -> None:
    show_tables(tables)
    if value.checks:
        _show_checks(value.checks)
        result(_verdict(value.passed))


def show_conversion(value: Conversion, out: Path) -> None:
    """The checks of a file for another engine, its verdict, and where it is."""
    answer(answer_of("convert", {"out": out, **vars(value), "passed": value.passed}))
    _show_checks(value.checks)
    size = f"{value.bytes / 2**20:,.1f} MiB"
    result(
        _verdict(value.passed)
        + drawable(f"  {out / value.file}, {size}; linear: {', '.join(value.layers) or 'none'}")
    )


def show_package(value: Package, to: Path) -> None:
    """What was packaged, and its size."""
    size = sum((to / name).stat().st_size for name in value.files)
    answer(answer_of("package", {"package": to, "bytes": size, **vars(value)}))
    linear = ", ".join(map(str, value.layers)) or "none"
    result(
        drawable(
            f"{to}: {len(value.files)} files, {size / 2**20:,.1f} MiB, {value.precision}; linear: {linear}"
        )
    )
    result(drawable(f"Verify it anywhere: nbl-export verify {to} --model MODEL"))


def show_verified(value: Verified, root: Path) -> None:
    """The checks of a package and its verdict."""
    figures = {**vars(value.measured), "package": root, "passed": value.passed, "checks": value.checks}
    answer(answer_of("verify", figures))
    _show_checks(value.checks)
    cost = loss_in_words(value.measured.method_loss)
    result(_verdict(value.passed) + drawable(f"  {root}, of {value.package.model.source}; {cost}"))


def _show_checks(checks: Sequence[Check]) -> None:
    drawn = _drawn(verdicts_table(checks))
    drawn.columns[-1].justify = "left"
    result(drawn)


def _verdict(passed: bool) -> Text:
    return Text("PASS", style="bold green") if passed else Text("FAIL", style="bold red")
