"""Explanations of speedups above their ceiling: which are asked for, and every figure of one by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export.verify.speed import harness as module
from nbl_export.verify.speed import profile as profile_module
from nbl_export.verify.speed.candidates import Candidate, decoder_prompt
from nbl_export.verify.speed.ceiling import ceiling
from nbl_export.verify.speed.profile import (
    GraphPair,
    NodeTimes,
    compared,
    explain,
    explained_cell,
    graph_pairs,
)
from nbl_export.verify.speed.values import CellResult, Explanation
from tests.verify.speed.raced import COST, GOOD, HALF, ROOFLINE, lasting, ran


@pytest.mark.usefixtures("told")
def test_speedups_are_explained_by_what_their_interval_is_sure_of(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def reason(graphs: Any, phase: str, _made: Any, *figures: Any) -> Explanation | None:
        asked.append((graphs, phase, *figures))
        return GOOD if phase == "prefill" else None

    monkeypatch.setattr(profile_module, "explain", reason)
    passes = iter([0.5, 0.5, 0.6, 0.5, 0.5, 0.5, 0.5])
    seconds = lambda p: (p.seconds["prefill"] or next(passes),)  # noqa: E731
    monkeypatch.setattr(module, "prefill_seconds", seconds)
    a, b = Path("a"), Path("b")
    race = [
        Candidate("base", lasting(1.0, 1.0), graph=a, cost=COST),
        Candidate("linearized", lasting(0.0, 0.9), "base", b, HALF),
        Candidate("engine", lasting(0.8, 0.9), "base", None, HALF),
        Candidate("elsewhere", lasting(1.0, 0.9), graph=b, cost=HALF),
    ]
    pairs = graph_pairs(race)
    assert pairs == {"linearized": GraphPair("base", (a, b))}
    run: Any = None

    def explained(cell: CellResult) -> dict[str, Explanation]:
        found = explained_cell(cell, pairs, run, "there")
        assert [replace(r, explanation=None) for r in found.results] == list(cell.results)
        return {r.name: r.explanation for r in found.results if r.explanation}

    prefill, decode = ran([(1, 8)], race)
    assert prefill.results[1].timing.median_ms == 500
    assert explained(prefill) == {"linearized": GOOD}
    assert explained(decode) == {}
    limits = [ceiling(COST, HALF, ROOFLINE, phase, 8) for phase in ("prefill", "decode")]
    assert asked == [
        ((a, b), "prefill", 1000, pytest.approx(1 / 0.6), limits[0], "there"),
        ((a, b), "decode", 1000, pytest.approx(1 / 0.9), limits[1], "there"),
    ]
    # Who was absent cannot be profiled.
    assert explained(replace(prefill, results=prefill.results[:1])) == {}
    assert explained(replace(prefill, results=prefill.results[1:])) == {}


def test_only_a_speedup_above_its_ceiling_is_explained() -> None:
    def made(_model: Any) -> Any:
        raise AssertionError

    # Graphs that do not exist are not profiled.
    for speedup in (1.1, 1.2, -math.inf):
        assert explain((Path("a"), Path("b")), "prefill", made, 1.0, speedup, 1.2) is None


def test_an_explanation_by_hand() -> None:
    a = NodeTimes(
        {"x": 5.0, "y": 3.0, "gone": 4.0, "gone too": 1.0},
        {"x": "MatMul", "y": "Add", "gone": "Softmax", "gone too": "Add"},
    )
    b = NodeTimes({"x": 5.0, "y": 3.0, "new": 2.0}, {"x": "MatMul", "y": "Add", "new": "MatMul"})
    found = compared(a, b, 13.0, 3.0, 1.0)
    assert (found.base_nodes, found.linearized_nodes, found.gone_ms) == (4, 3, 3.0)
    assert found.by_operator_ms == {"Softmax": 4.0, "Add": 1.0} and not found.suspect
    # In a race that took twice as long as the profile.
    longer = compared(a, b, 26.0, 6.0, 2.0)
    assert longer.gone_ms == 6.0 and not longer.suspect
    # The same three milliseconds, saved in a node that both graphs have.
    slow = NodeTimes({**a.ms, "x": 8.0, "gone": 1.0}, a.ops)
    assert compared(slow, b, 13.0, 3.0, 1.0).suspect
    # And where the profiler does not see them at all.
    assert compared(a, b, 13.0, 12.0, 10.0).suspect


def test_a_real_pair_is_profiled(stories_out: Path) -> None:
    graphs = stories_out / "baseline" / "model.onnx", stories_out / "model.onnx"
    run = decoder_prompt()
    for phase in ("prefill", "decode"):
        # Two thirds of 1.5 s are saved for sure, a half at the ceiling.
        found = explain(graphs, phase, lambda model: run(model, 64, 2), 1500.0, 3.0, 2.0)
        assert found is not None and found.saved_ms == pytest.approx(1000)
        assert found.excess_ms == pytest.approx(250)
        assert found.base_nodes > found.linearized_nodes > 50
        # The profiler sees only the saved layers' nodes go: attention is among them.
        assert found.gone_ms > 0 and found.by_operator_ms
