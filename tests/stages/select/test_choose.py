"""Which layers and how many: against whole runs with maps put in place by hand, within budgets, as they ship."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nbl_export import api
from nbl_export.blocks import Block, Mlp, Span, as_json, from_json
from nbl_export.calibrate.text import load_text
from nbl_export.errors import BudgetError, InputError
from nbl_export.files import TEMPORARY
from nbl_export.linearize.loss import PARTS, LossMeter
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.search import MeasuredSets, Prefixes
from nbl_export.linearize.selection import Candidate, CurvePoint, Sums, per_saving
from nbl_export.progress import Silent
from nbl_export.settings import Budget, SelectSettings
from nbl_export.settings.definition import AUTO
from nbl_export.stages import choosing as stage
from nbl_export.stages import speed_by_k
from nbl_export.stages.choosing import Choosing, SpeedMeter
from nbl_export.verify.loss import measure_method_loss
from nbl_export.verify.speed import pair as pair_module
from nbl_export.verify.speed.pair import measure_speed
from nbl_export.workspace import Workspace
from tests.fixtures_graph import load
from tests.processes import Notes, Recorder, forked, send
from tests.stages.select.conftest import (
    QUICK,
    candidates,
    curve,
    files,
    forget,
    kl_by_hand,
    same_plan,
    select,
)


def test_scores_and_the_curve_are_those_of_whole_runs(out: Path, stories_folder: Path) -> None:
    model = load(stories_folder)
    plan = select(out, api.SelectSettings(k=5, synthetic=False))
    maps, known = plan.layers, candidates(out)
    for c in known["candidates"]:
        assert c["kl"] == pytest.approx(kl_by_hand(out, model, {c["layer"]: maps[c["layer"]]}), rel=5e-3)
        assert c["kl_se"] > 0
    curve = known["curve"]
    text = load_text(Workspace.open(out).text)
    assert curve["tokens"] == text.selection[:, 1:].size
    assert curve["documents"] == len(np.unique(text.selection_document[:, 1:]))
    # The greedy order, by trying everything.
    taken: list[int] = []
    for point in curve["points"]:
        rest = [i for i in maps if i not in taken]
        costs = {i: kl_by_hand(out, model, {j: maps[j] for j in [*taken, i]}) for i in rest}
        taken.append(min(costs, key=lambda i: costs[i]))
        assert point["layers"] == sorted(taken)
        assert point["kl"] == pytest.approx(min(costs.values()), rel=5e-3)
    assert [p["k"] for p in curve["points"]] == [1, 2, 3, 4, 5] and curve["chosen"] == 5


def test_the_largest_k_within_a_budget(out: Path, timed: list[int]) -> None:
    points = curve(out)
    for name, floor in (("perplexity_ratio", 1.0), ("kl", 0.0)):
        values = [p[name] for p in points]
        for bound in [*((a + b) / 2 for a, b in pairwise(values)), values[2]]:
            if bound < max(floor, min(values)):
                continue
            best = max(p["k"] for p, v in zip(points, values, strict=True) if v <= bound)
            plan = select(out, api.SelectSettings(budget=api.Budget(**{f"max_{name}": bound})))
            said = candidates(out)["curve"]
            assert list(plan.chosen) == points[best - 1]["layers"] and said["chosen"] == best
            # A few points are timed, among them the chosen one.
            speeds = {p["k"]: (p["prefill_speedup"], p["decode_speedup"]) for p in said["points"]}
            assert speeds[best] == (1 + best / 10, 1 + best / 8) and said["context"] == 511


def test_a_budget_holds_on_held_out_text_too(out: Path, stories_folder: Path, timed: list[int]) -> None:
    plan, text = select(out, api.SelectSettings(k=1)), load_text(Workspace.open(out).text)
    heldout = measure_method_loss(load(stories_folder), plan, text.heldout, text.heldout_document).kl
    bound = (candidates(out)["curve"]["points"][0]["kl"] + heldout) / 2
    assert bound < heldout, "the selection text alone would allow a layer"
    with pytest.raises(
        BudgetError, match=rf"K = 1 costs a KL of {heldout:.3g} .* on held-out text: .*more text"
    ):
        select(out, api.SelectSettings(budget=api.Budget(max_kl=bound)))
    assert select(out, api.SelectSettings(budget=api.Budget(max_kl=heldout * 1.0001))).chosen == plan.chosen


def test_layers_are_chosen_by_synthetic_rows_too_and_how_certainly(out: Path) -> None:
    select(out, api.SelectSettings(k=2))
    scored = {c["layer"]: c for c in candidates(out)["candidates"]}
    costs = {i: c["kl"] + np.mean(list(c["synthetic"].values())) for i, c in scored.items()}
    assert candidates(out)["curve"]["points"][0]["layers"] == [min(costs, key=lambda i: costs[i])]
    assert all(len(c["synthetic"]) == 6 and 0 <= c["stable"] <= 1 for c in scored.values())
    assert sum(c["stable"] for c in scored.values()) == pytest.approx(2)
    select(out, api.SelectSettings(k=2, synthetic=False))
    assert not any("synthetic" in c and c["synthetic"] for c in candidates(out)["candidates"])


def test_the_plan_that_ships_is_the_plan_that_is_weighed(
    out: Path, stories_folder: Path, timed: list[int]
) -> None:
    """A budget that K = 3 of the curve just keeps: what ships keeps it too, with as many layers as that allows."""
    points = curve(out)
    bound, losses = points[2]["kl"] * 1.0001, {}
    for k in (1, 2, 3):
        select(out, api.SelectSettings(k=k, rank=6))
        losses[k] = candidates(out)["result"]["loss"]["kl"]
    best = max(k for k, kl in losses.items() if kl <= bound)
    notes = Notes()
    plan = select(out, api.SelectSettings(budget=api.Budget(max_kl=bound), rank=6), notes)
    known = candidates(out)
    assert len(plan.chosen) == known["curve"]["chosen"] == best < 3
    assert kl_by_hand(out, load(stories_folder), plan.layers) <= bound * 1.005
    assert sum("as it ships, more than the budget" in note for note in notes.notes) == 3 - best
    assert next(p for p in known["curve"]["points"] if p["k"] == best)["prefill_speedup"] == 1 + best / 10
    with pytest.raises(
        BudgetError, match=r"with the fit, the repair or the rank asked for: K = 1 costs a KL"
    ):
        select(out, api.SelectSettings(budget=api.Budget(max_kl=points[0]["kl"] * 1.0001), rank=1))
    # As fast as K = 2 at least: fewer layers are not taken, even if only they cost as little as asked.
    with pytest.raises(BudgetError, match=r"No K meets the budget with .* K = 3 costs"):
        select(out, api.SelectSettings(budget=api.Budget(max_kl=bound, min_speedup=1.3), rank=2))


# a budget of loss is filled: what is too much for it does not keep out what is not ----------------

MS: Mapping[Block, float] = {0: 2.0, 1: 2.0, 2: 2.0, Mlp(0): 10.0, Mlp(1): 10.0}
KL: Mapping[Block, float] = {0: 0.01, 1: 0.02, 2: 0.03, Mlp(0): 0.04, Mlp(1): 0.06}


class Saved:
    """What blocks save of a workload of 100 ms."""

    def __init__(self, saved: Mapping[Block, float]) -> None:
        self._saved = saved

    def ms(self, linear: Sequence[Block] = ()) -> float:
        return 100 - sum(self._saved[block] for block in linear)

    def speedup(self, linear: Sequence[Block]) -> float:
        return 100 / self.ms(linear)


def choosing_of(settings: SelectSettings, ms: Mapping[Block, float] = MS) -> Choosing:
    """Every set's loss is the sum of its blocks'."""
    known = {}
    for count in range(1, len(KL) + 1):
        for blocks in combinations(sorted(KL), count):
            total = sum(KL[b] for b in blocks)
            name = ",".join(map(str, blocks))
            known |= {f"{name} part {part}": Sums({"0": (1.0, total, total)}) for part in range(PARTS)}
    measuring: Any = SimpleNamespace(settings=settings, listener=Silent())
    nothing: Any = None  # no graph is written
    found = Choosing(measuring, nothing, Saved(ms))  # type: ignore[arg-type]
    nobody: Any = lambda *_: pytest.fail("measured")  # noqa: E731
    found.__dict__["sets"] = MeasuredSets(nobody, KL, known, nobody)
    return found


def filled(
    order: Sequence[Block], budget: Budget, ms: Mapping[Block, float] = MS
) -> tuple[list[Block], list[CurvePoint]]:
    """What an ``order`` becomes: what ships, and the points of its curve."""
    settings = SelectSettings(criterion="greedy", workload=("prefill=1",), budget=budget)
    choosing = choosing_of(settings, ms)
    path = Prefixes(iter([tuple(order[:k]) for k in range(1, len(order) + 1)]))
    prefix, points = choosing.fill(path, choosing.measure_curve(path, len(order)), sorted(KL))
    return list(prefix(len(points))), points


def test_a_smaller_block_takes_the_room_that_a_larger_one_does_not_find() -> None:
    order = [Mlp(0), Mlp(1), 0, 1, 2]
    chosen, points = filled(order, Budget(max_kl=0.075))
    # 0.04, then not 0.10; the one that loses least for what it saves, and the next.
    assert chosen == [Mlp(0), 0, 1]
    assert [(p.k, p.layers) for p in points] == [(1, (Mlp(0),)), (2, (0, Mlp(0))), (3, (0, Mlp(0), 1))]
    assert [p.kl for p in points] == pytest.approx([0.04, 0.05, 0.07])
    assert [p.workload_speedup for p in points] == pytest.approx([100 / 90, 100 / 88, 100 / 86])
    # Without room it stays as it was; what saves nothing fills nothing; where not even the first fits, another may.
    chosen, points = filled(order, Budget(max_kl=0.045))
    assert len(points) > 1 and chosen == order[: len(points)]
    none = {**MS, 0: 0.0, 1: -1.0, 2: 0.0}
    assert filled(order, Budget(max_kl=0.075), none)[0][:2] == [Mlp(0), Mlp(1)]
    assert filled([Mlp(1), Mlp(0), 0, 1, 2], Budget(max_kl=0.015))[0] == [0]


@pytest.mark.parametrize(
    ("least", "first", "then"),
    [
        (None, [Mlp(0)], [0, Mlp(0)]),
        (1.04, [0], [0, 1]),
        (1.08, [0], [0, Mlp(0)]),
        (1.12, [Mlp(0)], [0, Mlp(0)]),
    ],
)
def test_a_way_to_a_speed_does_not_lose_more_to_be_faster(
    least: float | None, first: list[Block], then: list[Block]
) -> None:
    """By loss for what it saves the MLP is first; where attention saves enough, it is not."""
    asked = SelectSettings(criterion="greedy", workload=("prefill=1",), budget=Budget(min_speedup=least))
    prefix = choosing_of(asked).order([SimpleNamespace(layer=block) for block in KL])  # type: ignore[misc]
    assert [sorted(prefix(k)) for k in (1, 2)] == [first, then]


def test_fewer_blocks_than_asked_for_are_said() -> None:
    choosing, notes = choosing_of(SelectSettings(k=3, criterion="cca")), Notes()
    choosing._listener = notes
    candidates = [Candidate(0, 0.1, 0.1, 0.0, 0.0), Candidate(Span(1, 2), 0.5, 0.5, 0.0, 0.0)]
    (plan, _), _ = choosing.choose(candidates, lambda chosen: (list(chosen), None))  # type: ignore[arg-type,return-value]
    assert plan == [0]
    assert (
        "1 of the 3 attentions and MLPs of --k are linear, as the next best block is a span" in notes.notes[0]
    )


# fitting -------------------------------------------------------------------------------------------


def test_what_the_final_maps_cost_is_measured(out: Path, stories_folder: Path) -> None:
    model = load(stories_folder)
    plan = select(out, api.SelectSettings(k=3, fit="sequential", repair=10))
    result = candidates(out)["result"]
    assert result["loss"]["kl"] == pytest.approx(kl_by_hand(out, model, plan.layers, plan.adapters), rel=5e-3)
    assert len(plan.adapters) == 3 * (5 - min(plan.chosen))  # gate, up and down of the blocks behind
    fitted = select(out, api.SelectSettings(k=3, fit="sequential"))
    assert result["before_repair"]["kl"] == pytest.approx(kl_by_hand(out, model, fitted.layers), rel=5e-3)
    assert not same_plan(plan, fitted)
    # The seed decides what the distillation reads.
    assert not same_plan(plan, select(out, api.SelectSettings(k=3, fit="sequential", repair=10, seed=1)))


def test_ridges_by_heldout_error_are_of_a_model_that_is_whole(out: Path) -> None:
    """The moments of other text are made before text goes through the model block by block; no file of them is left."""
    settings = api.SelectSettings(k=2, criterion="cca", ridge=None)
    before = set(Workspace.open(out).nbl.iterdir())
    plain, found = (select(out, replace(settings, fit=how)) for how in ("lmmse", "sequential"))
    first = min(plain.chosen)
    assert found.chosen == plain.chosen and not same_plan(found, plain)
    # Nothing before the first chosen layer is changed.
    scale = np.abs(plain.layers[first].w).max()
    np.testing.assert_allclose(found.layers[first].w, plain.layers[first].w, atol=1e-3 * scale)
    made = {path.name for path in set(Workspace.open(out).nbl.iterdir()) - before}
    assert made <= {"plan.json", "plan.safetensors", "candidates.json", "measured.json"}


class RepairStops(Silent):
    """Interrupts at the given step of a repair."""

    def __init__(self, at: int) -> None:
        self.recorder = Recorder(at, send(signal.SIGINT))

    def task(self, title: str, total: int, unit: str, done: int = 0) -> Any:
        return (self.recorder if title == "Repairing" else super()).task(title, total, unit, done)


def test_an_interrupted_repair_goes_on_and_its_checkpoint_is_gone_in_the_end(
    out: Path, calibrated: Path, tmp_path: Path
) -> None:
    settings = api.SelectSettings(k=2, repair=6)
    expected = select(Path(shutil.copytree(calibrated, tmp_path / "whole")), settings)
    checkpoint = Workspace.open(out).repair_checkpoint
    with pytest.raises(KeyboardInterrupt):
        select(out, settings, RepairStops(4))
    assert checkpoint.exists() and Workspace.open(out).record("select") is None
    going_on = RepairStops(-1)
    assert same_plan(select(out, settings, going_on), expected)
    assert going_on.recorder.start == (6, 4)
    assert not checkpoint.exists()


def test_a_rank_is_found_for_each_map(both_out: Path, stories_folder: Path) -> None:
    """Attention of this model writes into few directions, its MLPs into all; of a rank, W is two products."""
    chosen = (0, 1, 4, Mlp(1))
    whole = select(both_out, api.SelectSettings(layers=chosen))
    plan = select(both_out, api.SelectSettings(layers=chosen, rank=AUTO))  # type: ignore[arg-type]
    result = candidates(both_out)["result"]
    assert plan.rank is None and set(plan.ranks) == {0, 1, 4}
    assert result["ranks"] == {str(i): rank for i, rank in plan.ranks.items()}
    nmse = {c["layer"]: c["nmse"] for c in candidates(both_out)["candidates"]}
    for index, layer in plan.layers.items():
        rank = plan.rank_of(index)
        assert np.linalg.matrix_rank(layer.w) == (rank or np.linalg.matrix_rank(whole.layers[index].w))
        assert result["rank_lost"][str(index)] <= 0.02 * nmse[as_json(index)] * 1.001
    for name, maps in (("before_rank", whole.layers), ("loss", plan.layers)):
        by_hand = kl_by_hand(both_out, load(stories_folder), maps)
        assert result[name]["kl"] == pytest.approx(by_hand, rel=5e-3)


# every way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        api.SelectSettings(k=2, criterion="linearity"),
        api.SelectSettings(k=2, fit="sequential", repair=2, fit_input="residual"),
        api.SelectSettings(layers=(0, 3), fit="weighted", ridge=None, repair=2),
        api.SelectSettings(k=3, fit="drop", criterion="drop"),
    ],
    ids=lambda s: f"{s.criterion}-{s.fit}-{s.fit_input}",
)
def test_every_way_gives_a_plan(out: Path, settings: api.SelectSettings) -> None:
    plan = select(out, settings)
    assert len(plan.chosen) == (settings.k or 2)
    assert plan.criterion == ("by hand" if settings.layers else settings.criterion or "greedy")
    assert (plan.fit, plan.repair, plan.ridge) == (settings.fit, settings.repair, settings.ridge)
    known = candidates(out)
    score = {"greedy": "kl", "linearity": "predicted"}.get(plan.criterion, plan.criterion)
    if plan.criterion != "by hand":
        assert all(math.isfinite(c[score]) for c in known["candidates"])
    told = bool(settings.repair or settings.fit == "sequential" or settings.criterion == "linearity")
    assert (known["result"] is not None) is told
    predicted = sum(c["predicted"] or 0.0 for c in known["candidates"] if c["layer"] in plan.chosen)
    assert (known["result"] or {}).get("predicted_excess", 0.0) == pytest.approx(predicted)
    assert ("before_repair" in (known["result"] or {})) is bool(settings.repair)
    if settings.fit == "drop":
        assert not plan.layers and plan.dropped == plan.chosen


@pytest.mark.parametrize("criterion", ["kl", "nmse", "cca"])
def test_a_ranking_gives_the_best_first(out: Path, criterion: str, timed: list[int]) -> None:
    plan = select(out, api.SelectSettings(k=2, criterion=criterion))
    best = sorted(candidates(out)["candidates"], key=lambda c: float(c[criterion]))
    assert plan.chosen == tuple(sorted(c["layer"] for c in best[:2]))
    # A budget asks for a curve, in the same order.
    every = select(out, api.SelectSettings(criterion=criterion, budget=api.Budget(max_kl=100.0)))
    assert every.chosen == (0, 1, 2, 3, 4)
    assert candidates(out)["curve"]["points"][1]["layers"] == list(plan.chosen)


# spans -----------------------------------------------------------------------------------------

SPANS = (Span(1, 2), 4, Mlp(3))


@pytest.mark.parametrize(
    "settings",
    [
        api.SelectSettings(layers=SPANS, rank=8, repair=2),
        api.SelectSettings(layers=SPANS, fit="drop"),
        api.SelectSettings(k=6, workload=("decode=8@64",)),
    ],
    ids=lambda s: (
        f"{s.criterion}-{s.fit}-{s.rank}{'-repair' * bool(s.repair)}{'-workload' * bool(s.workload)}"
    ),
)
def test_spans_are_selected_rewritten_and_verified(all_out: Path, settings: api.SelectSettings) -> None:
    plan = select(all_out, settings)
    if settings.layers:
        assert plan.chosen == (1, Mlp(1), 2, Mlp(2), Mlp(3), 4)
        assert plan.linear == (() if settings.fit == "drop" else (1, Mlp(3), 4))
    else:
        assert 0 < len(plan.chosen) <= (settings.k or 0)
    api.rewrite(all_out)
    report = api.verify(all_out, QUICK)
    assert report.passed, report.checks
    assert report.selection.layers == plan.blocks
    assert set(plan.blocks) == set(settings.layers or plan.blocks) or settings.fit == "drop"
    text = (all_out / "report" / "report.md").read_text()
    if plan.blocks != plan.chosen:
        assert "1-2.span" in text and "in a span" in text
        assert "Spans, each by one map" in text
    assert f"{len(plan.linear_attention)} of 5 attention layers" in text


# speeds --------------------------------------------------------------------------------------------


def test_bisection_times_few() -> None:
    for most in (1, 2, 7, 30, 64):
        for least in range(1, most + 1):
            asked: list[int] = []

            class Faked(SpeedMeter):
                def __init__(self, least: int, asked: list[int]) -> None:
                    self.context, self.enough, self.asked = 511, least, asked

                def __call__(self, k: int) -> dict[str, float]:
                    self.asked.append(k)
                    return {"a": 2.0} if k >= self.enough else {"a": 9.0, "b": 1.0}

            assert Faked(least, asked).least_k(1.5, most) == least
            assert len(asked) <= 1 + math.ceil(math.log2(most)) if most > 1 else len(asked) == 1


def test_a_speed_out_of_reach_and_one_that_costs_too_much(out: Path, timed: list[int]) -> None:
    with pytest.raises(BudgetError, match=r"--min-speedup 1\.6 is out of reach at 511 tokens: 5 .* 1\.50"):
        select(out, api.SelectSettings(budget=api.Budget(min_speedup=1.6)))
    assert timed == [5], "whether it can be had at all comes first"
    points = curve(out)
    between = (points[1]["kl"] + points[2]["kl"]) / 2
    with pytest.raises(
        BudgetError, match=r"--min-speedup 1\.35 needs 4 linear layers, and the loss allows 2 \(K = 1 costs"
    ):
        select(out, api.SelectSettings(budget=api.Budget(max_kl=between, min_speedup=1.35)))
    plan = select(out, api.SelectSettings(budget=api.Budget(max_kl=between, min_speedup=1.05)))
    assert len(plan.chosen) == 2, "as many as the loss allows"
    assert len(select(out, api.SelectSettings(budget=api.Budget(min_speedup=1.25))).chosen) == 3


def test_a_speed_without_a_graph_names_the_command(out: Path) -> None:
    forget(out, "export")
    with pytest.raises(InputError, match=rf"no finished `export` yet: run `nbl-export export {out}` first"):
        select(out, api.SelectSettings(budget=api.Budget(min_speedup=1.1)))
    # A budget of loss alone is kept without: the curve then has no speeds, and a note says why.
    notes = Notes()
    select(out, api.SelectSettings(budget=api.Budget(max_kl=100.0)), notes)
    assert any(n.startswith("The K curve has no speeds: the model is not exported yet") for n in notes.notes)
    assert all(p["prefill_speedup"] is None for p in candidates(out)["curve"]["points"])


def test_points_that_are_timed() -> None:
    assert list(stage._timed_ks([1], 1)) == [1]
    assert list(stage._timed_ks(range(1, 4), 0)) == [1, 2, 3]
    assert list(stage._timed_ks(range(1, 33), 9)) == [8, 9, 16, 24, 32]
    # With spans not every K is there.
    assert list(stage._timed_ks([2, 6, 7, 13, 20], 7)) == [6, 7, 13, 20]


def test_a_trial_graph_has_only_its_own_weights_and_is_gone_afterwards(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads all others from the unmodified graph's file; a graph of another K is no part of it."""
    written: list[int] = []
    before = (out / "baseline" / "model.onnx").read_bytes()

    def measured(base: Path, linear: Path, *asked: Any) -> Any:
        graph = onnx.load(str(linear), load_external_data=False).graph
        places = Counter(e.value for t in graph.initializer for e in t.external_data if e.key == "location")
        (own,) = set(places) - {"baseline/model.onnx.data"}
        written.append((out / own).stat().st_size)
        assert 4 * 64 * 8 * places[own] == written[-1], "up and down of each layer; b is in the graph"
        return measure_speed(base, linear, *asked)

    monkeypatch.setattr(pair_module, "measure_speed", measured)
    monkeypatch.setattr(speed_by_k, "CONTEXT", 16)
    monkeypatch.setattr(speed_by_k, "ROUNDS", 3)
    select(out, api.SelectSettings(criterion="nmse", budget=api.Budget(max_kl=100.0), rank=8))
    assert written == [2 * 4 * 64 * 8 * k for k in stage._timed_ks(range(1, 6), 5)]
    assert not list(out.glob(f"*{TEMPORARY}"))
    assert all(
        p["prefill_speedup"] is None or p["prefill_speedup"] > 0 for p in candidates(out)["curve"]["points"]
    )
    assert candidates(out)["curve"]["context"] == 16
    assert (out / "baseline" / "model.onnx").read_bytes() == before


# workload ------------------------------------------------------------------------------------------

SHORT, LONG = ("decode=8@8",), ("decode=8@500",)


def asked(k: int, workload: tuple[str, ...], **more: Any) -> api.SelectSettings:
    return api.SelectSettings(k=k, workload=workload, **more)


def attention(plan: Plan) -> int:
    return sum(not isinstance(block, Mlp) for block in plan.chosen)


def test_layers_are_ranked_by_loss_for_what_they_save(both_out: Path) -> None:
    notes = Notes()
    plan = api.select(both_out, asked(3, SHORT, criterion="kl"), listener=notes)
    said = [note for note in notes.notes if note.startswith("Of ")]
    assert len(said) == 1 and "a linear attention saves" in said[0] and "a linear MLP saves" in said[0]
    scored = candidates(both_out)["candidates"]
    assert all(c["saved_ms"] > 0 for c in scored)
    # All attentions of this model are alike, and so are its MLPs.
    assert len({round(c["saved_ms"], 9) for c in scored}) == 2
    best = sorted(scored, key=lambda c: per_saving(c["kl"], c["saved_ms"]))[:3]
    assert {from_json(c["layer"]) for c in best} == set(plan.chosen)


def test_a_workload_must_run_in_the_graph(both_out: Path) -> None:
    with pytest.raises(InputError, match=r"decode=8@600 has 608 tokens in a row, and the model has 512"):
        select(both_out, asked(1, ("decode=8@600",)))
    forget(both_out, "export")
    with pytest.raises(InputError, match=r"nbl-export export .*"):
        select(both_out, asked(1, SHORT))


def test_a_speed_that_is_asked_for_is_that_of_the_workload(
    both_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def took(base: Path, graph: Path, workloads: Any, *_: Any) -> tuple[float, float]:
        assert [w.context for w in workloads] == [200]
        return 100.0, 100.0 - 5 * int(graph.name.split(".")[0][1:])

    monkeypatch.setattr("nbl_export.verify.speed.pair.workload_ms", took)
    monkeypatch.setattr("nbl_export.verify.speed.pair.measure_speed", lambda *_: pytest.fail("512 tokens"))
    budget = api.Budget(min_speedup=1.15)
    plan = select(both_out, api.SelectSettings(workload=("decode=8@200",), criterion="kl", budget=budget))
    assert len(plan.chosen) == 3, "100 / 85"
    curve = candidates(both_out)["curve"]
    assert curve["context"] is None and curve["points"][2]["timed_speedup"] == pytest.approx(100 / 85)


# sizes -------------------------------------------------------------------------------------------


def graph_of(out: Path) -> Path:
    """The rewritten graph of the plan that was selected."""
    api.rewrite(out)
    return out / "model.onnx"


def weights(path: Path) -> int:
    return sum(numpy_helper.to_array(t).nbytes for t in onnx.load(str(path)).graph.initializer)


def bounded(workload: tuple[str, ...] = (), **budget: str) -> api.SelectSettings:
    return api.SelectSettings(criterion="kl", workload=workload, budget=api.Budget(**budget))


def test_weights_of_at_most_a_size_by_the_fewest_layers(both_out: Path) -> None:
    whole = weights(both_out / "baseline" / "model.onnx")
    limit = f"{(whole - 250_000) / 1000:.3f}KB"
    chosen = select(both_out, bounded(SHORT, max_weight_bytes=limit)).chosen
    assert weights(graph_of(both_out)) <= whole - 250_000
    fewer = select(both_out, asked(len(chosen) - 1, SHORT, criterion="kl")).chosen
    assert set(fewer) < set(chosen) and weights(graph_of(both_out)) > whole - 250_000


def test_a_kv_cache_of_at_most_a_size(both_out: Path) -> None:
    # Five pairs of 4 heads of size 8 for 2 rows of 500 tokens.
    pair = 2 * 500 * 2 * 4 * 8 * 4
    plan = select(both_out, bounded(("decode=8@492,batch=2",), max_kv_bytes=f"{3 * pair / 1000:.3f}KB"))
    assert attention(plan) == 2
    curve = candidates(both_out)["curve"]
    assert curve is None or curve["budget"]["max_kv_bytes"]


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ({"max_weight_bytes": "1KB"}, BudgetError, "with 10 linear layers there are still"),
        ({"max_weight_bytes": "1GB"}, InputError, "asks for nothing: without a linear layer there are"),
        ({"max_kv_bytes": "1GB"}, InputError, "asks for nothing"),
    ],
)
def test_sizes_out_of_reach_and_sizes_that_are_there(
    both_out: Path, budget: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        select(both_out, bounded(SHORT, **budget))


# measured ------------------------------------------------------------------------------------------

SAME = ("candidates.json", "plan.json", "plan.safetensors")


def test_selection_in_bfloat16_leaves_the_model_and_what_is_solved_in_float32(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = select(out, api.SelectSettings(k=3))
    kl = candidates(out)["candidates"][0]["kl"]
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda *_: "bfloat16")
    forget(out, "select")
    half = select(out, api.SelectSettings(k=3))
    other = candidates(out)["candidates"][0]["kl"]
    assert other == pytest.approx(kl, rel=0.2) and other != kl  # measured anew
    assert same_plan(half, exact)


def test_another_k_measures_nothing_again(out: Path, measured: list[int]) -> None:
    select(out, api.SelectSettings(k=4))
    assert len(measured) >= 5 + 3
    measured.clear()
    for k in (2, 4, 0, 3):
        assert len(select(out, api.SelectSettings(k=k)).chosen) == k
    # Each alone is what greedy search begins with.
    select(out, api.SelectSettings(k=2, criterion="kl"))
    assert measured == []
    select(out, api.SelectSettings(k=5))
    assert len(measured) == 1, "all of them, which was not measured yet"


def test_what_a_loss_depends_on_is_measured_anew(out: Path, measured: list[int]) -> None:
    plain = api.SelectSettings(k=1, criterion="kl")
    select(out, plain)
    # Those chosen by the same maps are measured as they ship.
    for change, count in (
        ({"fit_input": "residual"}, 5),
        ({"fit": "weighted"}, 5),
        ({"ridge": None}, 5),
        ({"repair": 1}, 2),
        ({"fit": "sequential"}, 1),
    ):
        measured.clear()
        select(out, replace(plain, **change))  # type: ignore[arg-type]
        assert len(measured) == count, change
    measured.clear()
    select(out, api.SelectSettings(k=1, criterion="linearity"))
    for c in candidates(out)["candidates"]:
        # A divergence, which chance cannot make negative as it can the likelihood of so little text.
        assert c["sensitivity"] > 0 and c["sensitivity_se"] > 0
        assert c["predicted"] == pytest.approx(c["sensitivity"] * c["nmse"])
    select(out, api.SelectSettings(k=2, criterion="linearity", fit="weighted"))
    assert len(measured) == 5 + 2, "sensitivities depend on no fit; what was predicted of a plan is measured"


def test_an_interrupted_selection_goes_on_to_the_same_result(
    out: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    whole = Path(shutil.copytree(calibrated, tmp_path / "whole"))
    settings = api.SelectSettings(k=4)
    expected = select(whole, settings)
    total = len(measured)
    measured.clear()
    counted = LossMeter.measure_within

    def stops(*args: Any) -> Any:
        if len(measured) == 6:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LossMeter, "measure_within", stops)
        with pytest.raises(KeyboardInterrupt):
            select(out, settings)
    assert Workspace.open(out).record("select") is None
    assert same_plan(select(out, settings), expected)
    assert len(measured) == total, "nothing is measured twice"
    assert candidates(out) == candidates(whole)
    one, other = (json.loads((o / "nbl" / "measured.json").read_text()) for o in (out, whole))
    assert one == other


def test_damaged_losses_are_measured_again(out: Path, measured: list[int]) -> None:
    plan = select(out, api.SelectSettings(k=2, criterion="kl"))
    path = out / "nbl" / "measured.json"
    path.write_text(path.read_text()[:100])
    forget(out, "select")
    measured.clear()
    notes = Notes()
    assert same_plan(select(out, api.SelectSettings(k=2, criterion="kl"), notes), plan)
    assert len(measured) == 5 and "measured.json is damaged and was ignored." in notes.notes


# several processes -------------------------------------------------------------------------------


def copy_of(out: Path, to: Path) -> Path:
    return Path(shutil.copytree(out, to, copy_function=shutil.copy2))


def losses(out: Path) -> dict[tuple[str, str], Any]:
    """What was measured, by what it depends on and by name."""
    path = out / "nbl" / "measured.json"
    groups = json.loads(path.read_text())["losses"] if path.exists() else {}
    return {(key, name): loss for key, group in groups.items() for name, loss in group.items()}


def selected(out: Path, settings: api.SelectSettings) -> Any:
    """What a process gets of a selection by all: the chosen layers, and the notes."""
    heard = Notes()
    return api.select(out, settings, heard).chosen, heard.notes


def test_the_plan_and_all_figures_are_those_of_one_process(calibrated: Path, tmp_path: Path) -> None:
    alone, out = copy_of(calibrated, tmp_path / "alone"), copy_of(calibrated, tmp_path / "out")
    settings, count = api.SelectSettings(k=2, criterion="greedy"), 2
    plan = select(alone, settings)
    found = forked(count, tmp_path / "results", lambda _: selected(out, settings))
    assert [chosen for chosen, _ in found] == [plan.chosen] * count
    assert [notes for _, notes in found[1:]] == [[]] * (count - 1)
    assert all(files(out)[name] == files(alone)[name] for name in SAME)
    one, several = losses(alone), losses(out)
    # Several measure some sets of a greedy round that one process can do without.
    assert one.items() <= several.items()
