"""Draw a report: ``report.json`` as it is, ``report.md`` for people, ``junit.xml`` for CI."""

from __future__ import annotations

from pathlib import Path

from nbl_export.report.schema import Report
from nbl_export.report.tables import checks_table, report_tables
from nbl_export.workspace import atomic_path, write_json, write_text


def write_report(folder: Path, report: Report) -> list[Path]:
    """Write all three files into ``folder``, each atomically; returns their paths."""
    paths = [folder / name for name in ("report.json", "report.md", "junit.xml")]
    write_json(paths[0], report.as_json())
    write_text(paths[1], markdown(report))
    _write_junit(paths[2], report)
    return paths


def markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["cell"] = lambda text: str(text).strip().replace("|", "\\|").replace("\n", " ")
    template = environment.get_template("report.md.j2")
    return template.render(report=report, checks=checks_table(report), tables=report_tables(report))


def _write_junit(path: Path, report: Report) -> None:
    from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

    suite = TestSuite("nbl-export")
    for check in report.checks:
        case = TestCase(check.name, classname=f"nbl_export.{report.model['source']}")
        if check.status == "failed":
            case.result = [Failure(check.detail)]
        elif check.status == "skipped":
            case.result = [Skipped(check.detail)]
        else:
            case.system_out = check.detail
        suite.add_testcase(case)
    suite.timestamp = report.created
    xml = JUnitXml()
    xml.add_testsuite(suite)
    xml.update_statistics()
    with atomic_path(path) as temporary:
        xml.write(str(temporary), pretty=True)
