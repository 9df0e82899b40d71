"""Draw what commands return: tables, reports, the verdict.

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

from nbl_export.cli.output import answer, answering, drawable, finish, result
from nbl_export.records import Check, to_json
from nbl_export.report.drawing import Table
from nbl_export.report.schema import BenchReport, Conversion, Report
from nbl_export.report.summary import loss_in_words, numbered, replaced, verdict_line
from nbl_export.report.tables import engines_table, graph_table, report_tables, verdicts_table

if TYPE_CHECKING:
    from nbl_export.doctor import Diagnosis
    from nbl_export.engine.build import EngineFile
    from nbl_export.linearize.plan import Plan
    from nbl_export.report.diff import Diff
    from nbl_export.report.evaluation import Evaluation
    from nbl_export.rewrite.replace import RewriteResult
    from nbl_export.stages.dry_run import DryRun
    from nbl_export.stages.inspection import Package
    from nbl_export.stages.package import Verified

__all__ = ["finish"]

_COLOURS = {
    "passed": "green",
    "failed": "bold red",
    "skipped": "yellow",
    "works": "green",
    "broken": "bold red",
    "missing": "yellow",
}


def finish_tables(command: str, tables: Sequence[Table]) -> None:
    """A command whose results are ``tables``, or its JSON object with them."""
    answer(command, {"tables": tables})
    show_tables(tables)


def show_dry_run(ahead: DryRun) -> None:
    """What a run would do, or its JSON object."""
    answer("dry-run", to_json(ahead))
    show_tables(ahead.tables)


def show_plan(plan: Plan, out: Path) -> None:
    """What was chosen, and how it was fitted; not W and b."""
    names = ("model", "criterion", "fit", "fit_input", "ridge", "repair", "rank", "calibration_tokens")
    facts = {name: getattr(plan, name) for name in names}
    ranks = {str(layer): rank for layer, rank in plan.ranks.items()}
    text = f"Plan: layers {', '.join(map(str, plan.blocks)) or 'none'}. Next: nbl-export export {out}"
    finish("select", text, out=out, k=len(plan.chosen), layers=plan.blocks, **facts, ranks=ranks)


def show_rewrite(found: RewriteResult) -> None:
    """The graph before and after; as JSON the files and the proof of each block, too."""
    from nbl_export.rewrite.replace import rewrite_summary

    show_tables([graph_table(found.before, found.after)])
    text = f"Wrote {found.files[0]}; every replaced layer is proven against the plan's activations."
    finish("rewrite", text, files=found.files, graph=rewrite_summary(found))


def show_engines(engines: Sequence[EngineFile], out: Path) -> None:
    """What was built, from the manifests."""
    manifests = [engine.manifest for engine in engines]
    show_tables([engines_table(manifests)])
    finish("build", f"Built {out / 'engine'}. Next: nbl-export verify {out}", out=out, engines=manifests)


def show_tables(tables: Sequence[Table]) -> None:
    for table in tables:
        result(_drawn(table))
        for line, colour in [(table.note, "dim"), *((problem, "yellow") for problem in table.problems)]:
            if line:
                result(drawable(line, colour))
        result()


def show_diagnosis(found: Diagnosis) -> None:
    """The machine, the packages, what is missing, and whether the main job runs."""
    answer("doctor", {"runs_here": found.runs_here, **to_json(found)})
    for table in found.tables:
        result(_drawn(table, left=True))
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


def _drawn(table: Table, left: bool = False) -> RichTable:
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
        drawn.add_column(
            drawable(column), justify="left" if left or number == 0 else "right", overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*(drawable(cell, _COLOURS.get(cell, "")) for cell in row))
    return drawn


def show_report(report: Report, out: Path) -> None:
    """The summary of a run: tables, then checks, then the verdict and where to look next."""
    answer("verify", report.as_json())
    layers, name = report.selection.layers, Path(report.model.source).name
    show_tables(report_tables(report, brief=True))
    now = "left out" if report.selection.fit == "drop" else "now linear"
    linear = f"      {replaced(report)} of {name} are {now}" + (f": {numbered(layers)}" if layers else "")
    _show_judged(report.checks, report.passed, f"  {verdict_line(report)}")
    result(drawable(linear))
    if report.divergence:
        result(drawable(f"      {report.divergence}", "red"))
    result(drawable(f"      model {out / 'model.onnx'}   report {out / 'report' / 'report.html'}"))


def show_evaluation(value: Evaluation, out: Path) -> None:
    """The tables of an evaluation, its verdicts, and where to look next."""
    from nbl_export.report.evaluation import evaluation_tables

    answer("eval", value.as_json())
    show_tables(evaluation_tables(value, brief=True))
    _show_judged(value.checks, value.passed)
    result(drawable(f"evaluation {out / 'report' / 'eval.md'}"))


def show_bench(value: BenchReport, out: Path) -> None:
    """The table of a bench, its verdicts, and where to look next."""
    from nbl_export.report.tables import BENCH, speed_table

    answer("bench", value.as_json())
    show_tables([speed_table(BENCH, value.speed, brief=True)])
    _show_judged(value.checks, value.passed)
    for line in (*value.notes, f"bench {out / 'report' / 'bench.md'}"):
        result(drawable(line))


def show_diff(value: Diff, as_markdown: bool) -> None:
    """What changed: its tables, its gates and its verdict, or all of it as Markdown."""
    from nbl_export.report.diff import headline_table, markdown, tables, verdict_line

    answer("diff", to_json(value))
    if as_markdown and not answering.json:
        print(markdown(value), end="")
        return
    show_tables([*tables(value, brief=True), headline_table(value, brief=True)])
    for note in value.notes:
        result(drawable(note))
    _show_judged(value.checks, value.passed, f"  {verdict_line(value)}")


def show_conversion(value: Conversion, out: Path) -> None:
    """The checks of a file for another engine, its verdict, and where it is."""
    answer("convert", {"out": out, **vars(value), "passed": value.passed})
    linear = ", ".join(value.layers) or "none"
    where = f"  {out / value.file}, {value.bytes / 2**20:,.1f} MiB; linear: {linear}"
    _show_judged(value.checks, value.passed, where)


def show_package(value: Package, to: Path) -> None:
    """What was packaged, and its size."""
    size = sum((to / name).stat().st_size for name in value.files)
    answer("package", {"package": to, "bytes": size, **vars(value)})
    linear = ", ".join(map(str, value.layers)) or "none"
    mib = f"{size / 2**20:,.1f} MiB"
    result(drawable(f"{to}: {len(value.files)} files, {mib}, {value.precision}; linear: {linear}"))
    result(drawable(f"Verify it anywhere: nbl-export verify {to} --model MODEL"))


def show_verified(value: Verified, root: Path) -> None:
    """The checks of a package and its verdict."""
    measured = vars(value.measured)
    answer("verify", {**measured, "package": root, "passed": value.passed, "checks": value.checks})
    cost = loss_in_words(value.measured.method_loss)
    _show_judged(value.checks, value.passed, f"  {root}, of {value.package.model.source}; {cost}")


def _show_judged(checks: Sequence[Check], passed: bool, line: str = "") -> None:
    """The checks, and the verdict before a ``line``; without checks there is none."""
    verdict = Text()
    if checks:
        drawn = _drawn(verdicts_table(checks))
        drawn.columns[-1].justify = "left"
        result(drawn)
        verdict = Text("PASS", style="bold green") if passed else Text("FAIL", style="bold red")
    if checks or line:
        result(verdict + drawable(line if checks else line.lstrip()))
