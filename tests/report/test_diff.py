"""Whole comparisons of real folders: what is in each section, what is missing, and the mirror of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.records import Check, Status
from nbl_export.report.diff import (
    Change,
    Diff,
    Section,
    change,
    markdown,
    write_markdown,
)
from nbl_export.report.diff import diff as compare
from nbl_export.report.diff_facts import (
    SPEED,
    Better,
    Fact,
    Figure,
    Opened,
    opened,
)
from nbl_export.report.diff_gates import gates, races_of, unlike
from nbl_export.report.evaluation import write_evaluation
from nbl_export.settings import DiffBounds
from nbl_export.verify.parity.figures import MethodLoss
from tests.processes import flip
from tests.report.conftest import changed, report_of, with_speed
from tests.report.test_tables import evaluation

NONE = DiffBounds()
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
    for name in ("", "report/report.json", "report", "model.onnx", "baseline"):
        where = stories_out / name
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


def test_what_is_missing_is_said_with_the_reason(stories_out: Path, tmp_path: Path) -> None:
    checks = [{"name": "speed", "status": "skipped", "detail": "not asked for (--no-speed)"}]
    report = edited(stories_out, tmp_path, speed=None, method_loss=None, checks=checks)
    diff = compare(stories_out, report, NONE)
    assert notes(diff, "Speed") == ("B has none (not asked for (--no-speed)).",)
    assert notes(diff, "Method loss") == ("B has none.",)
    assert notes(diff, "Graph file") == ("B has none.",)
    assert {c.effect for c in by_name(diff, "Speed").values()} == {"only in A"}
    assert by_name(diff, "Checks")["parity"].effect == "only in A"
    mirrored = compare(report, stories_out, NONE)
    assert notes(mirrored, "Speed") == ("A has none (not asked for (--no-speed)).",)


def test_two_kinds_are_refused(stories_out: Path) -> None:
    with pytest.raises(InputError) as told:
        compare(stories_out, stories_out / "model.onnx", NONE)
    assert str(told.value) == (
        f"A ({stories_out}) is a report and B ({stories_out / 'model.onnx'}) is a graph: give two of one kind."
    )


# one figure ----------------------------------------------------------------------------------------


def both(a: Fact | None, b: Fact | None) -> str:
    """The effect, after a look from the other side, which must be its mirror."""
    there, back = change("x", a, b), change("x", b, a)
    assert back.effect == MIRRORED.get(there.effect, there.effect)
    assert (back.a, back.b) == (there.b, there.a)
    return there.effect


@pytest.mark.parametrize(
    ("a", "b", "better", "effect"),
    [
        (1, 1, "lower", "same"),
        (1, 2, "lower", "worse"),
        (2, 1, "lower", "better"),
        (1, 2, "higher", "better"),
        (1, 2, "", "changed"),
        ("x", "x", "", "same"),
        ("x", "y", "", "changed"),
        (nan, nan, "lower", "same"),
        (1.0, nan, "lower", "worse"),
        (nan, 1.0, "lower", "better"),
        (1.0, nan, "higher", "worse"),
        (nan, 1.0, "higher", "better"),
        (1.0, nan, "", "changed"),
        (1.0, inf, "lower", "worse"),
        ("passed", "failed", "passed", "worse"),
        ("skipped", "failed", "passed", "worse"),
        ("failed", "skipped", "passed", "better"),
        ("passed", "skipped", "passed", "changed"),
    ],
)
def test_exact_figures(a: float | str, b: float | str, better: Better, effect: str) -> None:
    assert both(Fact(Figure(a), better), Fact(Figure(b), better)) == effect


@pytest.mark.parametrize(
    ("a", "b", "effect"),
    [
        # Errors of 0.03 and 0.04 are one of 0.05; two of them are noise.
        (Figure(0.0, 0.03), Figure(0.0, 0.04), "same"),
        (Figure(0.0, 0.03), Figure(-0.09, 0.04), "within noise"),
        (Figure(0.0, 0.03), Figure(-0.1, 0.04), "within noise"),
        (Figure(0.0, 0.03), Figure(-0.11, 0.04), "worse"),
        # So are intervals that touch.
        (Figure(1.15, None, 1.1, 1.2), Figure(1.3, None, 1.25, 1.4), "better"),
        (Figure(1.15, None, 1.1, 1.2), Figure(1.3, None, 1.2, 1.4), "within noise"),
        (Figure(1.15, None, 1.1, 1.2), Figure(1.3, None, 1.15, 1.4), "within noise"),
        (Figure(1.15, None, 1.1, 1.2), Figure(1.0, None, 0.9, 1.09), "worse"),
        (Figure(1.15, None, 1.1, 1.2), Figure(1.3, None, -inf, inf), "of unknown noise"),
        (Figure(1.15, None, 1.1, 1.2), Figure(1.3, None, nan, nan), "of unknown noise"),
        (Figure(1.15, nan), Figure(1.3, 0.1), "of unknown noise"),
    ],
)
def test_what_is_noise(a: Figure, b: Figure, effect: str) -> None:
    assert both(Fact(a, "higher"), Fact(b, "higher")) == effect


# drawing -------------------------------------------------------------------------------------------

EVIL = "</details><script>alert(1)</script>|`[x](javascript:y)\n| a |\x1b[2J# **b**"


SIDE = {"path": "a", "model": ""}


def made(*changes: Change, checks: tuple[Check, ...] = (), **more: Any) -> Diff:
    part = Section("Part", changes, ("a note",))
    fields = {"difference": "changed", "verdict": "failed" if checks else "no gate", "checks": checks, **more}
    return Diff("report", SIDE, SIDE, sections=(part,), bounds=NONE, **fields)


def test_nothing_in_a_name_is_markup() -> None:
    fact = Fact(Figure(EVIL), headline=True, detail=EVIL)
    other = replace(fact, figure=Figure(EVIL * 2))
    names = ("path", "model", "created", "tool_version", "verdict")
    side, check = dict.fromkeys(names, EVIL), Check(EVIL, "failed", EVIL)
    found = made(change(EVIL, fact, other), change("y", fact, None), checks=(check,), notes=(EVIL,))
    text = markdown(replace(found, a=side, b=side))
    assert "<script" not in text and "\x1b" not in text
    assert text.count("</details>") == text.count("<details>") == 1
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for t in tokens for child in t.children or ()]
    assert not [child for child in inline if child.type in ("html_inline", "link_open", "image")]


def test_a_file_is_written_anew_and_nothing_else_is_overwritten(tmp_path: Path) -> None:
    diff = made(change("x", Fact(Figure(1)), Fact(Figure(2))))
    path = tmp_path / "diff.md"
    for _ in range(2):
        write_markdown(path, diff)
        assert path.read_text(encoding="utf-8") == markdown(diff)
    path.write_text("# Mine\n")
    with pytest.raises(InputError, match="is there already and is no comparison of nbl-export"):
        write_markdown(path, diff)
    assert path.read_text() == "# Mine\n"
    with pytest.raises(InputError, match="name a file in a folder that is there"):
        write_markdown(tmp_path / "x" / "diff.md", diff)
    assert [p.name for p in tmp_path.iterdir()] == ["diff.md"]


# what is compared ------------------------------------------------------------------------------------


def test_an_evaluation_of_other_graphs_is_left_out(stories_copy: Path) -> None:
    write_evaluation(stories_copy / "report", evaluation())
    side = opened(stories_copy)
    assert side.evaluation is None and "eval.json is of other graphs, or was changed" in side.notes[0]


def test_changed_weights_are_seen(stories_copy: Path, tmp_path: Path) -> None:
    """Of a folder they are refused, of a graph alone they are named."""
    shutil.copytree(stories_copy, tmp_path / "before")
    flip(stories_copy / "model.onnx.data")
    with pytest.raises(
        InputError, match=r"model\.onnx\.data is missing or was changed after it was measured"
    ):
        opened(stories_copy)
    found = compare(*(folder / "model.onnx" for folder in (tmp_path / "before", stories_copy)), NONE)
    assert by_name(found, "Graph file")["weights, SHA-256"].effect == "changed"


def test_a_report_that_is_not_of_its_folder_is_refused(stories_copy: Path) -> None:
    with (stories_copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"model\.onnx is not the graph that .*report\.json is about"):
        opened(stories_copy)
    path = stories_copy / "report" / "report.json"
    path.write_text(path.read_text().replace('"documents": 4', '"documents": 5'))
    edited = r"report\.json was changed after `verify` wrote it: run `nbl-export verify"
    with pytest.raises(InputError, match=edited):
        opened(stories_copy)


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


def gate(a: Opened, b: Opened, **bounds: float) -> Check:
    """The verdict on the one bound, or on the checks."""
    return gates(a, b, DiffBounds(**bounds))[-1]


def lossy(side: Opened, ratio: float, **more: Any) -> Opened:
    loss = report_of(side).method_loss
    assert isinstance(loss, MethodLoss)
    return changed(side, method_loss=replace(loss, perplexity_ratio=ratio, **more))


def sized(side: Opened, size: int) -> Opened:
    graph = report_of(side).graph
    return changed(side, graph=replace(graph, after=replace(graph.after, file_bytes=size)))


# checks -----------------------------------------------------------------------------------------------


def judged(side: Opened, **statuses: Status) -> Opened:
    return changed(side, checks=tuple(Check(n, s, f"why {n}") for n, s in statuses.items()))


def test_a_check_that_fails_now_is_a_regression_without_any_bound(two: Opened) -> None:
    good, bad = judged(two, parity="passed"), judged(two, parity="failed")
    (check,) = gates(good, bad, DiffBounds())
    assert check == Check("checks", "failed", "parity failed in B and was passed in A (why parity)")
    assert gates(bad, good, DiffBounds())[0].status == "passed"
    assert gates(good, good, DiffBounds())[0].detail == "none failed in B that had not in A"


# loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1.0, 1.37])
@pytest.mark.parametrize("before", [1.0, 1.1, 1.5495926733233176])
def test_perplexity_at_the_bound_exactly_passes(two: Opened, before: float, bound: float) -> None:
    a, at, above = lossy(two, before), lossy(two, before * bound), lossy(two, before * bound * 1.0001)
    assert gate(a, at, max_ppl_increase=bound).status == "passed"
    assert gate(a, above, max_ppl_increase=bound).status == "failed"
    quotient = above.report.method_loss.perplexity_ratio / before  # type: ignore[union-attr]
    assert gate(a, above, max_ppl_increase=quotient).status == "passed"


def test_other_text_cannot_be_judged(two: Opened) -> None:
    other = lossy(two, 1.0, perplexity_original=99.0)
    assert gate(two, other, max_ppl_increase=9).status == "passed", "the digest says that it is the same"
    other = changed(other, hashes={})
    check = gate(two, other, max_ppl_increase=9)
    assert check.status == "failed" and check.detail.startswith(
        "cannot be judged: the ratios are of different"
    )


# speed ------------------------------------------------------------------------------------------------


def test_a_slowdown_is_judged_by_its_interval(two: Opened, three: Opened) -> None:
    least = 1.5 * 0.98 / (1.2 * 1.02)
    assert gate(three, two, max_slowdown=least).status == "passed", "at the bound exactly"
    assert gate(three, two, max_slowdown=least * 0.999).status == "failed"
    noisy = with_speed(two, 1.2, width=0.3)
    check = gate(three, noisy, max_slowdown=1.0)
    assert check.status == "passed" and "0 of 2 surely do not, 2 may be by noise" in check.detail
    assert "surely do not (" in gate(two, three, max_slowdown=1.0).detail


# size -------------------------------------------------------------------------------------------------


def test_size_at_the_bound_exactly_passes(two: Opened) -> None:
    a = sized(two, 1_000_000)
    assert gate(a, sized(two, 1_100_000), max_size_increase=1.1).status == "passed"
    check = gate(a, sized(two, 1_100_001), max_size_increase=1.1)
    assert check.status == "failed"
    assert check.detail == "1.0 MiB in A, 1.0 MiB in B: 1.1000 times, above the 1.1 asked for"
    assert gate(sized(two, 0), a, max_size_increase=2).detail.endswith("no size of a graph is known in A")


def test_another_machine_and_other_versions(two: Opened) -> None:
    report = report_of(two)
    env, race = report.environment, lambda side: races_of(side)[SPEED]
    for elsewhere in (replace(env, processor="A chip"), replace(env, cores=96), replace(env, system="Other")):
        why, notes = unlike(race(two), race(changed(two, environment=elsewhere)))
        assert why == "on another machine" and "do not compare" in notes[0]
    assert report.speed is not None
    threads = replace(report.speed, machine=replace(report.speed.machine, threads=64))
    assert unlike(race(two), race(changed(two, speed=threads)))[0] == "on another machine"
    newer = replace(env, packages={**env.packages, "onnxruntime": "99"}, memory_gib=1.0)
    why, notes = unlike(race(two), race(changed(two, environment=newer)))
    assert why is None and f"onnxruntime {env.packages['onnxruntime']} → 99" in notes[0]
    assert unlike(race(two), None) == (None, ()) == unlike(race(two), race(two))
