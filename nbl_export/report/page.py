"""``report.html``: the report as one page that needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from nbl_export.report.canvas import COLOURS
from nbl_export.report.drawing import Table
from nbl_export.report.plots import Plot
from nbl_export.report.schema import Report
from nbl_export.report.summary import headlines, making, model_name, replaced_line, verdict_line
from nbl_export.report.tables import checks_table, report_tables

TEMPLATES = Path(__file__).parent / "templates"
_FIGURE = re.compile(r"[-+±]? ?(?:\d[^ ]*|inf|nan)( ± .*| MiB| not resolved)?$|=?$")


def page(report: Report, plots: Mapping[str, Plot]) -> str:
    """The report as HTML: no script, nothing fetched, every text of the report escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["numeric"] = numeric_columns
    environment.filters["anchor"] = anchor
    # Drawn by us; the text in them was escaped by the library that drew them.
    drawings = {name: [Markup(plot.svg(narrow)) for narrow in (False, True)] for name, plot in plots.items()}
    return environment.get_template("report.html.j2").render(
        report=report,
        name=model_name(report.model),
        verdict=verdict_line(report),
        replaced=replaced_line(report),
        headlines=headlines(report),
        checks=checks_table(report),
        tables=report_tables(report),
        plots=plots,
        drawings=drawings,
        making=making(report),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        colours=COLOURS,
    )


def numeric_columns(table: Table) -> set[int]:
    """The columns of figures, which are set flush right: every cell is one, or empty."""
    columns = range(1, len(table.columns))
    return {i for i in columns if table.rows and all(_FIGURE.match(row[i].strip()) for row in table.rows)}


def anchor(title: str) -> str:
    """What a link to the section of this title says: lower-case words with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
