"""Whole comparisons of real folders: what is in each section, what is missing, and the mirror of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.files import json_text, write_json
from nbl_export.records import to_json
from nbl_export.report.bench import BenchReport
from nbl_export.report.diff.compare import compare
from nbl_export.report.diff.values import Change, Diff
from nbl_export.report.evaluation import write_evaluation
from nbl_export.report.render import write_bench
from nbl_export.settings import DiffBounds
from tests.report.test_bench import bench  # noqa: F401
from tests.report.test_evaluation import evaluation

NONE = DiffBounds()
OLD = Path(__file__).parent.parent / "version_1"
MIRRORED = {"better": "worse", "worse": "better", "only in A": "only in B", "only in B": "only in A"}


def by_name(diff: Diff, title: str) -> dict[str, Change]:
    (section,) = [s for s in diff.sections if s.title == title]
    return {change.what: change for change in section.changes}


def notes(diff: Diff, title: str) -> tuple[str, ...]:
    return next(s.notes for s in diff.sections if s.title == title)


def edited(out: Path, folder: Path, **changes: Any) -> Path:
    """The report of ``out`` with other sections, in a folder of its own."""
    raw = json.loads((out / "report" / "report.json").read_text())
    folder.mkdir(exist_ok=True)
    write_json(folder / "report.json", {**raw, **changes})
    return folder / "report.json"


def test_the_same_twice_is_no_difference(stories_out: Path) -> None:
    for where in (stories_out, stories_out / "report" / "report.json", stories_out / "model.onnx"):
        diff = compare(where, where, NONE)
        assert diff.difference == "none" and diff.passed
        assert {change.effect for change in diff.changes} == {"same"} and diff.changes


def test_two_k_differ_where_they_do(stories_out: Path, stories_three: Path) -> None:
    diff = compare(stories_out, stories_three, NONE)
    assert diff.difference == "changed" and diff.verdict == "passed"
    layers = by_name(diff, "Model and settings")["linear layers"]
    assert (layers.a and layers.a.value, layers.b and layers.b.value) == ("2 of 5: 2, 3", "3 of 5: 2-4")
    assert layers.note == "added 4" and layers.headline
    asked = {n for n, c in by_name(diff, "Model and settings").items() if c.effect != "same"}
    assert asked == {"linear layers", "select: k"}
    graph = by_name(diff, "Graph")
    assert (graph["nodes: Attention"].a.value, graph["nodes: Attention"].b.value) == (3, 2)  # type: ignore[union-attr]
    assert (
        graph["KV pairs (layers with a cache)"].effect == "changed"
        and graph["size on disk"].effect == "better"
    )
    assert by_name(diff, "Method loss")["perplexity ratio"].effect == "worse"
    assert by_name(diff, "Graph file")["linear layers in the graph"].note == "added 4"
    assert {change.effect for change in by_name(diff, "Unmodified graph").values()} == {"same"}
    assert notes(diff, "Method loss") == () == notes(diff, "Speed")


@pytest.mark.parametrize("of", ["folder", "report", "graph", "one graph missing", "no loss"])
def test_the_mirror(stories_out: Path, stories_three: Path, tmp_path: Path, of: str) -> None:
    pair = {
        "folder": (stories_out, stories_three),
        "report": (stories_out / "report", stories_three / "report"),
        "graph": (stories_out / "model.onnx", stories_three / "baseline"),
        "one graph missing": (stories_out, stories_three / "report"),
        "no loss": (stories_out, edited(stories_three, tmp_path, method_loss=None)),
    }[of]
    there, back = compare(*pair, NONE), compare(*reversed(pair), NONE)  # type: ignore[misc]
    assert there.difference == back.difference == "changed"
    assert (there.a, there.b) == (back.b, back.a)
    assert [s.title for s in there.sections] == [s.title for s in back.sections]
    for section in there.sections:
        own, other = by_name(there, section.title), by_name(back, section.title)
        assert own.keys() == other.keys()
        for what, change in own.items():
            assert (change.a, change.b) == (other[what].b, other[what].a)
            assert other[what].effect == MIRRORED.get(change.effect, change.effect), what


def test_what_is_missing_is_said_with_the_reason(stories_out: Path, tmp_path: Path) -> None:
    checks = [{"name": "speed", "status": "skipped", "detail": "not asked for (--no-speed)"}]
    report = edited(stories_out, tmp_path, speed=None, method_loss=None, checks=checks)
    diff = compare(stories_out, report, NONE)
    assert notes(diff, "Speed") == ("B has none (not asked for (--no-speed)).",)
    assert notes(diff, "Method loss") == ("B has none.",)
    assert notes(diff, "Graph file") == ("B is a report without its graph.",)
    assert {c.effect for c in by_name(diff, "Speed").values()} == {"only in A"}
    assert by_name(diff, "Checks")["parity"].effect == "only in A"
    mirrored = compare(report, stories_out, NONE)
    assert notes(mirrored, "Speed") == ("A has none (not asked for (--no-speed)).",)


def test_other_text_is_said_and_decides_nothing(stories_out: Path, tmp_path: Path) -> None:
    raw = json.loads((stories_out / "report" / "report.json").read_text())
    loss = {**raw["method_loss"], "perplexity_original": 3.0, "perplexity_ratio": 1.01}
    diff = compare(stories_out, edited(stories_out, tmp_path, method_loss=loss, hashes={}), NONE)
    assert by_name(diff, "Method loss")["perplexity ratio"].effect == "on other text"
    assert "do not compare" in notes(diff, "Method loss")[0]


def test_another_machine_is_said(stories_out: Path, tmp_path: Path) -> None:
    raw = json.loads((stories_out / "report" / "report.json").read_text())
    there = {**raw["environment"], "processor": "A chip"}
    speed = json.loads(json.dumps(raw["speed"]))
    for cell in speed["cells"]:
        for result in cell["results"]:
            if result["over_base"]:
                result["over_base"]["value"] *= 2
    diff = compare(stories_out, edited(stories_out, tmp_path, environment=there, speed=speed), NONE)
    assert {c.effect for c in by_name(diff, "Speed").values()} == {"on another machine"}
    assert "B on A chip" in notes(diff, "Speed")[0]
    assert by_name(diff, "Environment")["processor"].effect == "changed"


def test_reports_of_version_1_compare_with_new_ones(stories_out: Path) -> None:
    for path in sorted(OLD.glob("*.json")):
        assert compare(path, path, NONE).difference == "none"
        diff = compare(path, stories_out, NONE)
        assert diff.difference == "changed" and diff.sections


def test_an_encoder_and_a_decoder_have_nothing_in_common(stories_out: Path) -> None:
    diff = compare(OLD / "encoder.json", stories_out, NONE)
    effects = {c.effect for c in by_name(diff, "Method loss").values()}
    assert effects == {"only in A", "only in B"}


def test_benches(bench: BenchReport, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "b").mkdir()
    write_bench(tmp_path, bench)
    failed = replace(bench, checks=(replace(bench.checks[0], status="failed"), *bench.checks[1:]))
    write_bench(tmp_path / "b", failed)
    a, b = tmp_path / "bench.json", tmp_path / "b" / "bench.json"
    assert compare(a, a, NONE).difference == "none"
    diff = compare(a, b, DiffBounds(max_slowdown=1))
    assert [(c.name, c.status) for c in diff.checks] == [("checks", "failed"), ("slowdown", "passed")]
    assert by_name(diff, "Checks")["ceilings"].effect == "worse"
    assert any(change.headline for change in by_name(diff, "Bench").values())
    assert by_name(diff, "Model and settings")["peers"].effect == "same"


def test_evaluations(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    mean = evaluation().mean.tasks
    assert mean and mean.recovery
    worse = replace(mean, recovery=replace(mean.recovery, value=0.8))
    write_evaluation(tmp_path, evaluation())
    write_evaluation(tmp_path / "b", evaluation(mean=replace(evaluation().mean, tasks=worse)))
    diff = compare(tmp_path / "eval.json", tmp_path / "b" / "eval.json", NONE)
    assert by_name(diff, "Tasks and retrieval")["mean recovery of tasks"].effect == "worse"
    assert diff.verdict == "no gate" and diff.a.verdict == "no gate"


def test_two_kinds_are_refused(stories_out: Path) -> None:
    with pytest.raises(InputError) as told:
        compare(stories_out, stories_out / "model.onnx", NONE)
    assert str(told.value) == (
        f"A ({stories_out}) is a report and B ({stories_out / 'model.onnx'}) is a graph: give two of one kind."
    )


def test_it_is_json(stories_out: Path, stories_three: Path) -> None:
    diff = compare(stories_out, stories_three, DiffBounds(max_ppl_increase=1.1))
    raw = json.loads(json_text(to_json(diff)))
    assert (raw["kind"], raw["verdict"], raw["difference"]) == ("report", "failed", "changed")
    assert raw["bounds"]["max_ppl_increase"] == 1.1
    loss = next(s for s in raw["sections"] if s["title"] == "Method loss")
    assert loss["changes"][0]["what"] == "perplexity ratio" and loss["changes"][0]["effect"] == "worse"


def test_a_plan_of_mlps_is_json(stories_out: Path, tmp_path: Path) -> None:
    raw = json.loads((stories_out / "report" / "report.json").read_text())
    other = edited(stories_out, tmp_path, selection={**raw["selection"], "layers": [2, "3.mlp"]})
    diff = compare(stories_out, other, NONE)
    assert by_name(diff, "Model and settings")["linear layers"].note == "added 3.mlp; removed 3"
    json_text(to_json(diff))
