"""Write a report: ``report.json`` as it is, ``report.md`` and ``report.html`` for people, ``junit.xml`` for CI.

Texts in it come from models, graphs and paths that somebody else may have named: each form escapes them where it is
written, and nowhere else.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.files import atomic_path, printable, write_json, write_text
from nbl_export.report.drawing import Table, finite
from nbl_export.report.plots import PLOTS, Plot, report_plots, speed_plot
from nbl_export.report.schema import BenchReport, Header, Report
from nbl_export.report.speed import BENCH, speed_table
from nbl_export.report.summary import headlines, making, measured_on, model_name, replaced_line, verdict_line
from nbl_export.report.tables import report_tables, verdicts_table

TEMPLATES = Path(__file__).parent / "templates"
_FIGURE = re.compile(r"[-+±]? ?(?:\d[^ ]*|inf|nan)( ± .*| MiB| not resolved)?$|=?$")


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
    for name in set(PLOTS) - set(plots):
        (folder / "plots" / f"{name}.png").unlink(missing_ok=True)
    pictures = [write_plot(folder / "plots", plot) for plot in plots.values()]
    write_text(markdown_file, markdown(report, plots))
    write_text(html, page(report, plots))
    return [json, markdown_file, html, junit, *pictures]


def write_bench(folder: Path, value: BenchReport) -> list[Path]:
    """Write ``bench.json``, ``bench.md`` and ``plots/bench.png`` into ``folder``, each atomically."""
    plot = speed_plot(BENCH, value.speed)
    write_json(folder / "bench.json", value.as_json())
    made = f"Made {value.created} with nbl-export {value.tool_version}."
    title = f"nbl-export bench: {value.model.source}"
    tables = [verdicts_table(value.checks), speed_table(BENCH, value.speed)]
    text = markdown_page(title, tables, [made, measured_on(value.environment)], value.notes, {BENCH: plot})
    write_text(folder / "bench.md", text)
    return [folder / "bench.json", folder / "bench.md", write_plot(folder / "plots", plot)]


def write_plot(folder: Path, plot: Plot) -> Path:
    """Draw ``plot`` and write it as PNG, atomically."""
    path, picture = folder / f"{plot.name}.png", plot.file("png")
    with atomic_path(path) as temporary:
        temporary.write_bytes(picture)
    return path


def _values(report: Report, plots: Mapping[str, Plot]) -> dict[str, Any]:
    """What both forms of a report show."""
    return {
        "report": report,
        "name": model_name(report.model),
        "verdict": verdict_line(report),
        "replaced": replaced_line(report),
        "headlines": headlines(report),
        "checks": verdicts_table(report.checks),
        "tables": report_tables(report),
        "plots": plots,
        "making": making(report),
    }


def markdown(report: Report, plots: Mapping[str, Plot] | None = None) -> str:
    """The report as GitHub-flavoured Markdown, with links to those of its ``plots`` that were drawn."""
    return filled("report.md.j2", **_values(report, plots or {}))


def page(report: Report, plots: Mapping[str, Plot]) -> str:
    """The report as HTML: no script, nothing fetched, every text of the report escaped."""
    from markupsafe import Markup

    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    drawings = {name: base64.b64encode(plot.file("svg")).decode() for name, plot in plots.items()}
    return filled("report.html.j2", **_values(report, plots), style=style, drawings=drawings)


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
    """A template with ``values``: HTML escapes them itself, Markdown by the filters ``cell`` and ``line``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    html = template.endswith(".html.j2")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=html,
        trim_blocks=html,
        lstrip_blocks=html,
    )
    environment.filters["cell"] = lambda text: _escaped(text).replace("|", "\\|")
    environment.filters["line"] = lambda text: re.sub(r"^[#>+=~-]", r"\\\g<0>", _escaped(text))
    environment.filters["numeric"] = numeric_columns
    environment.filters["anchor"] = lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return environment.get_template(template).render(**values)


def _escaped(text: object) -> str:
    """``text`` as Markdown that shows it in one line: no HTML, no link, no picture."""
    shown = printable(" ".join(str(text).split("\n"))).strip()
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        shown = shown.replace(sign, entity)
    return re.sub(r"[\\\[\]]", r"\\\g<0>", shown)


def numeric_columns(table: Table) -> set[int]:
    """The columns of figures, which are set flush right: every cell is one, or empty."""
    columns = range(1, len(table.columns))
    return {i for i in columns if table.rows and all(_FIGURE.match(row[i].strip()) for row in table.rows)}


def write_junit(path: Path, suite_name: str, report: Header) -> None:
    """Write the checks of any ``report`` as one JUnit suite, atomically.

    A case has the seconds of its check where they are known, and no time where they are not. XML has no control
    characters, not even escaped. The class is the suite and the model's name, without dots and slashes: a CI server
    takes those for the levels of a package.
    """
    from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

    suite = TestSuite(suite_name)
    suite.add_property("model", printable(report.model.source))
    classname = re.sub(r"[^\w-]+", "_", f"{suite_name}-{model_name(report.model)}").strip("_-")
    for check in report.checks:
        known = None if (seconds := finite(check.seconds)) is None else round(seconds, 3)
        case = TestCase(printable(check.name), classname=classname, time=known)
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
