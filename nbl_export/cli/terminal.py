"""Draw what commands return: tables, reports, the verdict; read prompts, and write text as it is generated.

Names in it come from graphs, reports and paths that somebody else may have written: every text is drawn by
:func:`.output.drawable`, which leaves nothing that a terminal obeys.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from nbl_export.cli.output import answer, answering, drawable, finish, log, result
from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import printable_lines, read_bytes
from nbl_export.progress import Listener
from nbl_export.records import Check, to_json
from nbl_export.report.drawing import Table
from nbl_export.report.schema import BenchReport, Conversion, Report
from nbl_export.report.summary import loss_in_words, numbered, replaced, verdict_line
from nbl_export.report.tables import engines_table, graph_table, report_tables, verdicts_table
from nbl_export.settings.definition import UsageError
from nbl_export.settings.measuring import BOTH

if TYPE_CHECKING:
    from nbl_export.doctor import Diagnosis
    from nbl_export.engine.manifest import EngineFile
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


if TYPE_CHECKING:
    from nbl_export.evaluate.answer import Generated

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
