"""Draw a report: ``report.json`` as it is, ``report.md`` and ``report.html`` for people, ``junit.xml`` for CI.

Texts in it come from models, graphs and paths that somebody else may have named: each form escapes them where it is
written, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nbl_export.files import atomic_path, write_json, write_text
from nbl_export.printable import printable
from nbl_export.report.bench import BenchReport
from nbl_export.report.drawing import Table, finite
from nbl_export.report.header import Header
from nbl_export.report.page import TEMPLATES, page
from nbl_export.report.plots import PLOTS, Plot, report_plots, speed_plot
from nbl_export.report.schema import Report
from nbl_export.report.speed import BENCH, speed_tables
from nbl_export.report.summary import (
    headlines,
    making,
    measured_on,
    model_name,
    replaced_line,
    verdict_line,
)
from nbl_export.report.tables import checks_table, report_tables


def write_report(folder: Path, report: Report) -> list[Path]:
    """Write every file into ``folder``, each atomically; returns their paths.

    The verdict comes first; a plot of an earlier report that this one has no figures for is removed.
    """
    json, junit, markdown_file, html = (
        folder / name for name in ("report.json", "junit.xml", "report.md", "report.html")
    )
    plots = report_plots(report)
    write_json(json, report.as_json())
    write_junit(junit, "nbl-export", report)
    pictures = _write_plots(folder / "plots", plots)
    write_text(markdown_file, markdown(report, plots))
    write_text(html, page(report, plots))
    return [json, markdown_file, html, junit, *pictures]


def write_bench(folder: Path, value: BenchReport) -> list[Path]:
    """Write ``bench.json``, ``bench.md`` and ``plots/bench.png`` into ``folder``, each atomically."""
    paths = [folder / "bench.json", folder / "bench.md", folder / "plots" / "bench.png"]
    plot = speed_plot(BENCH, value.speed)
    write_json(paths[0], value.as_json())
    made = f"Made {value.created} with nbl-export {value.tool_version}."
    title = f"nbl-export bench: {value.model.source}"
    tables = [checks_table(value), *speed_tables(BENCH, value.speed)]
    page = markdown_page(title, tables, [made, measured_on(value.environment)], value.notes, {BENCH: plot})
    write_text(paths[1], page)
    write_plot(paths[2], plot)
    return paths


def _write_plots(folder: Path, plots: Mapping[str, Plot]) -> list[Path]:
    for name in set(PLOTS) - set(plots):
        (folder / f"{name}.png").unlink(missing_ok=True)
    paths = {folder / f"{name}.png": plot for name, plot in plots.items()}
    for path, plot in paths.items():
        write_plot(path, plot)
    return list(paths)


def write_plot(path: Path, plot: Plot) -> None:
    """Draw ``plot`` and write it as PNG, atomically."""
    picture = plot.png()
    with atomic_path(path) as temporary:
        temporary.write_bytes(picture)


def markdown(report: Report, plots: Mapping[str, Plot] | None = None) -> str:
    """The report as GitHub-flavoured Markdown, with links to those of its ``plots`` that were drawn."""
    return filled(
        "report.md.j2",
        report=report,
        verdict=verdict_line(report),
        replaced=replaced_line(report),
        headlines=headlines(report),
        checks=checks_table(report),
        tables=report_tables(report),
        plots=plots or {},
        making=making(report),
    )


def markdown_page(
    title: str,
    tables: Sequence[Table],
    making: Sequence[str],
    notes: Sequence[str] = (),
    plots: Mapping[str, Plot] | None = None,
) -> str:
    """Tables as GitHub-flavoured Markdown, with links to those of their ``plots`` that were drawn."""
    return filled("page.md.j2", title=title, tables=tables, making=making, notes=notes, plots=plots or {})


def filled(template: str, **values: object) -> str:
    """A template of Markdown with ``values``: its filters ``cell`` and ``line`` make text of anything."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["cell"] = lambda text: _escaped(text).replace("|", "\\|")
    environment.filters["line"] = lambda text: re.sub(r"^[#>+=~-]", r"\\\g<0>", _escaped(text))
    return environment.get_template(template).render(**values)


def _escaped(text: object) -> str:
    """``text`` as Markdown that shows it in one line: no HTML, no link, no picture."""
    shown = printable(" ".join(str(text).split("\n"))).strip()
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        shown = shown.replace(sign, entity)
    return re.sub(r"[\\\[\]]", r"\\\g<0>", shown)


def write_junit(path: Path, suite_name: str, report: Header) -> None:
    """Write the checks of any ``report`` as one JUnit suite, atomically.

    Every case is of the class that :func:`classname` gives. It has the seconds of its check where they are known, and
    no time where they are not. XML has no control characters, not even escaped.
    """
    from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

    suite = TestSuite(suite_name)
    suite.add_property("model", printable(report.model.source))
    for check in report.checks:
        known = None if (seconds := finite(check.seconds)) is None else round(seconds, 3)
        case = TestCase(printable(check.name), classname=classname(suite_name, report), time=known)
        detail = printable(check.detail)
        if check.status == "failed":
            case.result = [Failure(detail)]
        elif check.status == "skipped":
            case.result = [Skipped(detail)]
        else:
            case.system_out = detail
        suite.add_testcase(case)
    suite.timestamp = printable(report.created)
    xml = JUnitXml()
    xml.add_testsuite(suite)
    xml.update_statistics()
    with atomic_path(path) as temporary:
        xml.write(str(temporary), pretty=True)


def classname(suite_name: str, report: Header) -> str:
    """What a test case belongs to: the suite and the model's name, in letters, digits, hyphens and underscores.

    A CI server takes dots and slashes for the levels of a package.
    """
    return re.sub(r"[^\w-]+", "_", f"{suite_name}-{model_name(report.model)}").strip("_-")
