"""The other ways beside the one that is asked for: measured once, and the fastest within a budget ships."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.blocks import Block, Mlp, from_json
from nbl_export.errors import InputError
from nbl_export.files import read_sealed, write_sealed
from nbl_export.linearize.budget import CurvePoint, largest_within
from nbl_export.linearize.selection import Curve, Scores
from nbl_export.records import part_from_json
from nbl_export.settings import Budget
from nbl_export.stages.select.choosing import Way
from nbl_export.stages.select.frontier import Frontier, Measured
from tests.stages.select.by_hand import candidates, select

WORKLOAD = ("prefill=64,decode=8@200",)
BUDGET = api.Budget(max_kl=0.5)


def asked(**more: Any) -> api.SelectSettings:
    return api.SelectSettings(**{"workload": WORKLOAD, "frontier": True, **more})


def curve_of(out: Path) -> Curve:
    found = part_from_json(Scores, candidates(out), "candidates", "").curve
    assert found is not None
    return found


@pytest.mark.parametrize("criterion", ["greedy", "kl"])
def test_the_fastest_within_the_budget_ships(both_out: Path, criterion: str) -> None:
    plan = select(both_out, asked(criterion=criterion, budget=BUDGET))
    curve = curve_of(both_out)
    assert {line.name for line in curve.frontier} == {"both", "attention", "MLPs", "dropped"}
    parts = {
        line.name: {isinstance(b, Mlp) for p in line.points for b in p.layers} for line in curve.frontier
    }
    assert parts["attention"] == {False} and parts["MLPs"] == {True}
    fastest = {}
    for line in curve.frontier:
        k = largest_within(line.points, BUDGET)
        fastest[line.name] = max([p.workload_speedup or 0 for p in line.points if p.k == k], default=1.0)
    shipped = next(p for p in curve.points if p.k == curve.chosen)
    assert shipped.layers == plan.chosen and shipped.kl <= 0.5
    assert shipped.workload_speedup == fastest[curve.name]
    assert all(fastest[curve.name] >= fastest[line.name] for line in curve.others if line.name != "dropped")


def test_another_point_is_taken_later_without_measuring(both_out: Path, measured: list[int]) -> None:
    select(both_out, asked(budget=BUDGET))
    before = len(measured)
    assert before > 0
    first = curve_of(both_out)
    line = first.frontier[0].points
    lower = sorted(p.kl for p in line)[0] * 1.001
    plan = select(both_out, asked(budget=api.Budget(max_kl=lower)))
    assert len(measured) - before <= 8, "sets that fill the smaller budget, and no others"
    assert plan.chosen and next(p for p in curve_of(both_out).points if p.layers == plan.chosen).kl <= lower


def test_a_number_of_layers_is_compared_at_its_loss(both_out: Path) -> None:
    plan = select(both_out, asked(k=2))
    curve = curve_of(both_out)
    assert curve.name == "both" and curve.chosen == 2 and len(plan.chosen) == 2
    lost = max(p.kl for p in curve.points)
    for line in curve.others:
        # Followed until two more points are beyond.
        assert sum(p.kl > lost for p in line.points) <= 3


def test_without_a_frontier_there_is_one_way(both_out: Path) -> None:
    select(both_out, asked(k=2, frontier=False))
    assert curve_of(both_out).others == () and curve_of(both_out).name == "both"


def measured_way(name: str, points: Mapping[float, float]) -> Measured:
    """Points by their loss, and what the workload gains."""
    way = Way(name, (), lambda _: (), lambda: pytest.fail("measured"), None)
    found = [
        CurvePoint(k, tuple(range(k)), kl, None, 1.0, None, workload_speedup=gain)
        for k, (kl, gain) in enumerate(points.items(), 1)
    ]
    return Measured(way, found)


class Full:
    """Choosing that finds no room for anything."""

    def filled(self, way: Way, points: Any, *_: Any) -> tuple[Way, Any]:
        assert way.name != "dropped"
        return way, points


def test_dropped_blocks_never_ship() -> None:
    full: Any = Full()
    both = measured_way("both", {0.1: 1.1, 0.3: 1.2})
    mlps = measured_way("MLPs", {0.1: 1.15, 0.2: 1.3})
    dropped = measured_way("dropped", {0.1: 9.0})
    found = Frontier(both, (mlps, dropped)).fastest(full, Budget(max_kl=0.15))
    assert found.chosen == mlps and found.others == (both, dropped)
    same = Frontier(both, (dropped,)).fastest(full, Budget(max_kl=0.01))
    assert same.chosen == both, "none has room"
    tie = Frontier(both, (measured_way("attention", {0.1: 1.1}),)).fastest(full, Budget(max_kl=0.15))
    assert tie.chosen == both


# measured costs ----------------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds of the graphs by their names; grows by what was asked for, under the workload's text."""
    found = {"base": 100.0, "linear 0": 90.0, "linear 1": 90.0}
    asked: list[str] = []

    def took(base: Path, others: Mapping[str, Path], workloads: Any, *_: Any, anew: bool) -> dict[str, float]:
        assert anew and all(path.exists() for path in others.values())
        asked.append("".join(map(str, workloads)))
        found["asked"] = len(asked)
        return {name: found[name] for name in ("base", *others)}

    monkeypatch.setattr("nbl_export.verify.speed.workloads.workload_ms", took)
    return found


def parts(chosen: tuple[Block, ...]) -> set[bool]:
    return {isinstance(block, Mlp) for block in chosen}


def cost(**more: Any) -> api.SelectSettings:
    return asked(**{"k": 3, "criterion": "kl", "frontier": False, "measure_cost": True, **more})


def test_what_was_measured_decides(both_out: Path, times: dict[str, float]) -> None:
    """Attention comes first: a graph with three of five attentions linear, one with three of five MLPs."""
    times["linear 0"], times["linear 1"] = 99.999, 40.0
    plan = select(both_out, cost())
    assert parts(plan.chosen) == {True}
    saved = {from_json(c["layer"]): c["saved_ms"] for c in candidates(both_out)["candidates"]}
    assert saved[Mlp(0)] == pytest.approx(20.0) and saved[0] == pytest.approx(0.001 / 3)
    assert candidates(both_out)["measured_cost"] and candidates(both_out)["workload_ms"] == 100.0


def test_costs_are_measured_once_for_a_workload(both_out: Path, times: dict[str, float]) -> None:
    select(both_out, cost())
    select(both_out, cost(k=2))
    assert times["asked"] == 1
    select(both_out, cost(workload=("decode=8@100",)))
    assert times["asked"] == 2
    (both_out / "nbl" / "costs.json").write_text('{"format": "nbl-export/costs/1", "costs": {}}')
    select(both_out, cost(k=2))
    assert times["asked"] == 3, "what was edited is measured again"
    path = both_out / "nbl" / "costs.json"
    raw = read_sealed(path, "costs", "")
    broken = {key: dict.fromkeys(value, "fast") for key, value in raw["costs"].items()}
    write_sealed(path, {**raw, "costs": broken})
    select(both_out, cost(k=3))
    assert times["asked"] == 4, "what is no number, too"


def test_graphs_are_really_timed_for_costs(both_out: Path) -> None:
    plan = select(both_out, cost(workload=("decode=2@16",)))
    assert len(plan.chosen) == 3 and candidates(both_out)["workload_ms"] > 0


@pytest.mark.parametrize("option", ["measure_cost", "frontier"])
def test_both_are_of_a_workload(option: str) -> None:
    with pytest.raises(InputError, match=rf"--{option.replace('_', '-')} is about the time of a workload"):
        api.SelectSettings(k=1, **{option: True}).check()  # type: ignore[arg-type]


def test_a_workload_longer_than_the_model_is_refused(both_out: Path) -> None:
    with pytest.raises(
        InputError, match=r"decode=8@600 has 608 tokens in a row, and the model has 512 positions"
    ):
        select(both_out, asked(k=1, workload=("decode=8@600",)))


def test_a_decode_needs_a_cache(both_out: Path) -> None:
    api.export(both_out, api.ExportSettings(kv_cache="none"))
    with pytest.raises(InputError, match=r"decodes, and the graph has no KV cache: export it with another"):
        select(both_out, asked(k=1))
    assert len(select(both_out, asked(k=1, workload=("prefill=64",))).chosen) == 1


# the speed that is asked for ---------------------------------------------------------------------


def test_a_speed_that_is_asked_for_is_that_of_the_workload(
    both_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def took(base: Path, others: Mapping[str, Path], workloads: Any, *_: Any) -> dict[str, float]:
        assert [w.context for w in workloads] == [200]
        (name,) = others
        k = int(others[name].name.split(".")[0][1:])
        seen.append(k)
        return {"base": 100.0, name: 100.0 - 5 * k}

    monkeypatch.setattr("nbl_export.verify.speed.workloads.workload_ms", took)
    monkeypatch.setattr("nbl_export.verify.speed.pair.measure_speed", lambda *_: pytest.fail("512 tokens"))
    plan = select(both_out, asked(frontier=False, criterion="kl", budget=api.Budget(min_speedup=1.15)))
    assert len(plan.chosen) == 3, "100 / 85"
    curve = curve_of(both_out)
    assert curve.context is None
    assert {p.k: p.timed_speedup for p in curve.points}[3] == pytest.approx(100 / 85)
    assert all(p.prefill_speedup is None for p in curve.points)
