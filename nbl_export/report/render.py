"""Write a report: its JSON, Markdown and HTML for people, JUnit for CI, and the model card of a package.

Texts in it come from models, graphs and paths that somebody else may have named: each form escapes them where it is
written, and nowhere else.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

from nbl_export.files import atomic_path, printable, write_json, write_text
from nbl_export.models.source import ModelIdentity
from nbl_export.report.drawing import (
    Table,
    finite,
    headlines,
    making,
    measured_on,
    model_name,
    replaced_line,
    verdict_line,
)
from nbl_export.report.plots import PLOTS, Plot, report_plots, speed_plot
from nbl_export.report.schema import BenchReport, Header, Report
from nbl_export.report.tables import BENCH, report_tables, speed_table, verdicts_table

M = TypeVar("M", bound=ModelIdentity)
CARD = "README.md"
TEMPLATES = Path(__file__).parent / "templates"
_FIGURE = re.compile(r"[-+±]? ?(?:\d[^ ]*|inf|nan)( ± .*| MiB| not resolved)?$|=?$")


def write_report(folder: Path, report: Report) -> list[Path]:
    """Write every file into ``folder``, each atomically; returns their paths.

    The verdict comes first; a plot of an earlier report that this one has no figures for is removed.
    """
    plots = report_plots(report)
    write_json(folder / "report.json", report.as_json())
    write_junit(folder / "junit.xml", "nbl-export", report)
    for name in set(PLOTS) - set(plots):
        (folder / "plots" / f"{name}.png").unlink(missing_ok=True)
    pictures = [write_plot(folder / "plots", plot) for plot in plots.values()]
    write_text(folder / "report.md", markdown(report, plots))
    write_text(folder / "report.html", page(report, plots))
    return [*(folder / name for name in ("report.json", "report.md", "report.html", "junit.xml")), *pictures]


def write_bench(folder: Path, value: BenchReport) -> list[Path]:
    """Write ``bench.json``, ``bench.md`` and ``plots/bench.png`` into ``folder``, each atomically."""
    plot = speed_plot(BENCH, value.speed)
    return write_judged(
        folder, "bench", "bench", value, [speed_table(BENCH, value.speed)], plots={BENCH: plot}
    )


def write_judged(
    folder: Path,
    stem: str,
    what: str,
    value: Header,
    tables: Sequence[Table],
    asked: str = "",
    plots: Mapping[str, Plot] | None = None,
) -> list[Path]:
    """Write ``value`` as ``stem``.json, its ``tables`` as ``stem``.md, and their ``plots``, each atomically."""
    files, drawn = [folder / f"{stem}.json", folder / f"{stem}.md"], plots or {}
    verdicts = [verdicts_table(value.checks)] if value.checks else []
    text = filled(
        "page.md.j2",
        title=f"nbl-export {what}: {value.model.source}",
        tables=[*verdicts, *tables],
        making=[
            f"Made {value.created} with nbl-export {value.tool_version}{asked}.",
            f"{'; '.join(measured_on(value.environment))}.",
        ],
        notes=value.notes,
        plots=drawn,
    )
    write_json(files[0], value.as_json())
    write_text(files[1], text)
    return [*files, *(write_plot(folder / "plots", plot) for plot in drawn.values())]


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
        if check.status == "passed":
            case.system_out = detail
        else:
            case.result = [Failure(detail) if check.status == "failed" else Skipped(detail)]
        suite.add_testcase(case)
    suite.timestamp = printable(report.created)
    xml = JUnitXml()
    xml.add_testsuite(suite)
    xml.update_statistics()
    with atomic_path(path) as temporary:
        xml.write(str(temporary), pretty=True)


# the model card ----------------------------------------------------------------------------------


def without_paths(report: Report) -> Report:
    """``report`` with the names of files and folders in the place of their paths, which are a machine's own."""
    chosen, bench = report.selection, report.bench
    return replace(
        report,
        model=_public(report.model),
        selection=replace(chosen, sources=tuple(map(_named, chosen.sources))),
        settings=_named(report.settings),
        kept={name: replace(kept, settings=_named(kept.settings)) for name, kept in report.kept.items()},
        bench=bench and replace(bench, settings=_named(bench.settings), model=_public(bench.model)),
        forms={},  # their files are not in the package
    )


def _public(model: M) -> M:
    """``model`` as it is called elsewhere: by its Hub id, or the name of its folder or file."""
    return model if model.kind == "hub" else replace(model, source=model_name(model))


def _named(asked: Any) -> Any:
    """Settings, with the last part of every path with folders in its place."""
    if isinstance(asked, Mapping):
        return {name: _named(value) for name, value in asked.items()}
    if isinstance(asked, (list, tuple)):
        return [_named(value) for value in asked]
    path = isinstance(asked, str) and (PurePath(asked).is_absolute() or asked.startswith(("~", "..")))
    return PurePath(asked).name if path else asked


def license_of(model: Path, gguf_file: str | None = None) -> str | None:
    """The license that the files of a model name: a field of its GGUF file, or the front matter of its card."""
    from yaml import YAMLError

    named = None
    try:
        if gguf_file is not None:
            from gguf import GGUFReader

            field = GGUFReader(model / gguf_file).get_field("general.license")
            named = field.contents() if field else None
        elif (model / CARD).is_file():
            from huggingface_hub import ModelCard

            named = ModelCard.load(model / CARD).data.to_dict().get("license")
    except (ValueError, OSError, YAMLError):  # no such file, no front matter, or none that is one
        return None
    return named if isinstance(named, str) else None


def model_card(report: Report, license: str | None = None, layout: str = "folder") -> str:
    """The card in Markdown with its front matter; ``report`` names no paths (:func:`without_paths`)."""
    # A report may come from somebody else: what is no Hub id makes no link.
    hub = report.model.kind == "hub" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", report.model.source) is not None
    task = report.graph.task or "text-generation"
    header: dict[str, object] = {
        **({"license": license} if license else {}),
        **({"base_model": report.model.source} if hub else {}),
        "library_name": "transformers.js" if layout == "web" else "onnx",
        "pipeline_tag": task,
        "tags": ["onnx", "neural-block-linearization", "nbl-export"],
    }
    return filled(
        "card.md.j2",
        header={name: json.dumps(value) for name, value in header.items()},
        base=report.model.source,
        link=f"https://huggingface.co/{report.model.source}" if hub else "",
        layout=layout,
        task=task,
        license=license,
        **_values(report, report_plots(report)),
    )
