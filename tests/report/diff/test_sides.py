"""What can be compared, and what is refused in one sentence: real folders, files and damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nbl_export.errors import InputError
from nbl_export.report.diff.sides import opened
from nbl_export.report.evaluation import write_evaluation
from nbl_export.report.render import write_bench
from tests.report.test_bench import bench  # noqa: F401
from tests.report.test_evaluation import evaluation


def test_an_output_folder_is_its_report_and_its_graph(stories_out: Path) -> None:
    side = opened(stories_out)
    assert side.kind == "report" and side.report is not None and side.graph is not None
    assert side.graph.linear == side.report.selection.layers
    assert side.side.model == side.report.model.source and side.side.verdict == "passed"
    assert {path.name for path in side.files} == {"report.json", "model.onnx"}


def test_a_report_alone_has_no_graph(stories_out: Path) -> None:
    path = stories_out / "report" / "report.json"
    for where in (path, path.parent):
        side = opened(where)
        assert side.kind == "report" and side.report == opened(stories_out).report and side.graph is None


def test_a_graph_is_a_file_or_a_folder(stories_out: Path) -> None:
    for where in (stories_out / "model.onnx", stories_out / "baseline"):
        side = opened(where)
        assert side.kind == "graph" and side.header is None and side.summary is not None
        assert side.side.verdict == ""


def test_reports_of_version_1_are_read() -> None:
    folder = Path(__file__).parent.parent / "version_1"
    for path in folder.glob("*.json"):
        assert opened(path).kind == "report"


def test_a_bench_and_an_evaluation(bench: object, tmp_path: Path) -> None:  # noqa: F811
    write_bench(tmp_path, bench)  # type: ignore[arg-type]
    write_evaluation(tmp_path, evaluation())
    assert opened(tmp_path / "bench.json").kind == "bench"
    side = opened(tmp_path / "eval.json")
    assert side.kind == "eval" and side.side.verdict == "no gate"


def test_an_evaluation_of_other_graphs_is_left_out(stories_copy: Path) -> None:
    write_evaluation(stories_copy / "report", evaluation())
    side = opened(stories_copy)
    assert side.evaluation is None and "eval.json is of other graphs, or was changed" in side.notes[0]


def test_an_edited_report_is_refused(stories_copy: Path) -> None:
    path = stories_copy / "report" / "report.json"
    path.write_text(path.read_text().replace('"documents": 4', '"documents": 5'))
    with pytest.raises(
        InputError, match=r"report\.json was changed after `verify` wrote it: run `nbl-export verify"
    ):
        opened(stories_copy)


def test_a_report_of_another_graph_is_refused(stories_copy: Path) -> None:
    with (stories_copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"model\.onnx is not the graph that .*report\.json is about"):
        opened(stories_copy)


def test_a_folder_without_a_report_names_its_graph(stories_copy: Path) -> None:
    shutil.rmtree(stories_copy / "report")
    with pytest.raises(
        InputError, match=r"has no report: run `nbl-export verify .*` first, or name its graph"
    ):
        opened(stories_copy)


def test_nothing_is_written(stories_copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in stories_copy.rglob("*")}
    opened(stories_copy)
    assert {path: path.stat().st_mtime_ns for path in stories_copy.rglob("*")} == before


@pytest.mark.parametrize(
    "name", ["missing", "x.txt", "x.json", "list.json", "broken.json", "x.onnx", "empty"]
)
def test_anything_else_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    texts = {"x.json": '{"schema": "of somebody else"}', "list.json": "[1]", "broken.json": "{"}
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name != "missing":
        (tmp_path / name).write_text(texts.get(name, "text"))
    with pytest.raises(InputError) as told:
        opened(tmp_path / name)
    assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value)


def test_a_damaged_report_says_where(stories_out: Path, tmp_path: Path) -> None:
    raw = json.loads((stories_out / "report" / "report.json").read_text())
    raw["speed"] = 3
    (tmp_path / "report.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"report\.json is damaged"):
        opened(tmp_path / "report.json")
