"""Draw what commands return: tables, reports, the verdict; read prompts, and write text as it is generated.

Names in it come from graphs, reports and paths that somebody else may have written: every text is drawn by
:func:`.output.drawable`, which leaves nothing that a terminal obeys.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from nbl_export.cli.output import OUT, answer, drawable, drawn, finish, log, result, show_tables
from nbl_export.engine.manifest import EngineFile
from nbl_export.errors import InputError, os_error_in_words
from nbl_export.evaluate.answer import Generated
from nbl_export.files import printable_lines, read_bytes
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Listener
from nbl_export.records import Check
from nbl_export.report import diff
from nbl_export.report.drawing import Table, loss_in_words, numbered, replaced, verdict_line
from nbl_export.report.evaluation import Evaluation, evaluation_tables
from nbl_export.report.schema import BenchReport, Conversion, Report
from nbl_export.report.tables import (
    BENCH,
    engines_table,
    graph_table,
    report_tables,
    speed_table,
    verdicts_table,
)
from nbl_export.settings.definition import UsageError
from nbl_export.settings.measuring import BOTH

if TYPE_CHECKING:
    from nbl_export.rewrite.replace import RewriteResult
    from nbl_export.stages.inspection import Package
    from nbl_export.stages.verify import Verified


def show(
    command: str,
    facts: Mapping[str, Any],
    tables: Sequence[Table] = (),
    judged: Any = None,
    line: str = "",
    after: Sequence[str] = (),
) -> None:
    """The JSON object of ``facts``; or tables, the checks and the verdict of what is ``judged`` with a line, others.

    Without checks there is no verdict.
    """
    answer(command, facts)
    show_tables(tables)
    checks: Sequence[Check] = judged.checks if judged is not None else ()
    verdict = Text()
    if checks:
        found = drawn(verdicts_table(checks))
        found.columns[-1].justify = "left"
        result(found)
        verdict = Text("PASS  ", style="bold green") if judged.passed else Text("FAIL  ", style="bold red")
    if checks or line:
        result(verdict + drawable(line))
    for text in after:
        result(drawable(text))


def show_plan(plan: Plan, out: Path) -> None:
    """What was chosen, and how it was fitted; not W and b."""
    names = ("model", "criterion", "fit", "fit_input", "ridge", "repair", "rank", "calibration_tokens")
    facts = {name: getattr(plan, name) for name in names}
    text = f"Plan: layers {', '.join(map(str, plan.blocks)) or 'none'}. Next: nbl-export export {out}"
    finish("select", text, out=out, k=len(plan.chosen), layers=plan.blocks, **facts, ranks=plan.ranks)


def show_rewrite(found: RewriteResult) -> None:
    """The graph before and after; as JSON the files and the proof of each block, too."""
    from nbl_export.rewrite.replace import rewrite_summary

    text = f"Wrote {found.files[0]}; every replaced layer is proven against the plan's activations."
    facts = {"files": found.files, "graph": rewrite_summary(found)}
    show("rewrite", facts, [graph_table(found.before, found.after)], after=[text])


def show_engines(engines: Sequence[EngineFile], out: Path) -> None:
    """What was built, from the manifests."""
    manifests = [engine.manifest for engine in engines]
    text = f"Built {out / 'engine'}. Next: nbl-export verify {out}"
    show("build", {"out": out, "engines": manifests}, [engines_table(manifests)], after=[text])


def show_report(report: Report, out: Path) -> None:
    """The summary of a run: tables, then checks, then the verdict and where to look next."""
    layers, name = report.selection.layers, Path(report.model.source).name
    now = "left out" if report.selection.fit == "drop" else "now linear"
    said = [f"{replaced(report)} of {name} are {now}" + (f": {numbered(layers)}" if layers else "")]
    said += [report.divergence] if report.divergence else []
    said += [f"model {out / 'model.onnx'}   report {out / 'report' / 'report.html'}"]
    tables = report_tables(report, brief=True)
    show("verify", report.as_json(), tables, report, verdict_line(report), [f"      {text}" for text in said])


def show_evaluation(value: Evaluation, out: Path) -> None:
    """The tables of an evaluation, its verdicts, and where to look next."""
    after = [f"evaluation {out / 'report' / 'eval.md'}"]
    show("eval", value.as_json(), evaluation_tables(value, brief=True), value, after=after)


def show_bench(value: BenchReport, out: Path) -> None:
    """The table of a bench, its verdicts, and where to look next."""
    after = [*value.notes, f"bench {out / 'report' / 'bench.md'}"]
    show("bench", value.as_json(), [speed_table(BENCH, value.speed, brief=True)], value, after=after)


def show_diff(value: diff.Diff, as_markdown: bool) -> None:
    """What changed: its tables, its gates and its verdict, or all of it as Markdown."""
    if as_markdown and not OUT.quiet:
        print(diff.markdown(value), end="")
        return
    tables = [*diff.tables(value, brief=True), diff.headline_table(value, brief=True)]
    show("diff", vars(value), tables, value, diff.verdict_line(value), value.notes)


def show_conversion(value: Conversion, out: Path) -> None:
    """The checks of a file for another engine, its verdict, and where it is."""
    linear = ", ".join(value.layers) or "none"
    where = f"{out / value.file}, {value.bytes / 2**20:,.1f} MiB; linear: {linear}"
    show("convert", {"out": out, **vars(value), "passed": value.passed}, judged=value, line=where)


def show_package(value: Package, to: Path) -> None:
    """What was packaged, and its size."""
    size = sum((to / name).stat().st_size for name in value.files)
    linear = ", ".join(map(str, value.layers)) or "none"
    said = f"{to}: {len(value.files)} files, {size / 2**20:,.1f} MiB, {value.precision}; linear: {linear}"
    after = [said, f"Verify it anywhere: nbl-export verify {to} --model MODEL"]
    show("package", {"package": to, "bytes": size, **vars(value)}, after=after)


def show_verified(value: Verified, root: Path) -> None:
    """The checks of a package and its verdict."""
    facts = {**vars(value.measured), "package": root, "passed": value.passed, "checks": value.checks}
    line = f"{root}, of {value.package.model.source}; {loss_in_words(value.measured.method_loss)}"
    show("verify", facts, judged=value, line=line)


# text ----------------------------------------------------------------------------------------------

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
