"""Which layers and how many: against whole runs with maps put in place by hand, within budgets, as they ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.blocks import Block, Mlp
from nbl_export.calibrate.text import load_text
from nbl_export.errors import BudgetError
from nbl_export.linearize.search import LossCache, MeasuredSets, Prefixes
from nbl_export.linearize.selection import CurvePoint, Loss
from nbl_export.progress import Silent
from nbl_export.settings import Budget, SelectSettings
from nbl_export.stages.select.choose import Choosing
from nbl_export.workspace import Workspace
from tests.fixtures_graph import load
from tests.listening import Notes
from tests.stages.select.by_hand import candidates, curve, kl_by_hand, select


def test_scores_and_the_curve_are_those_of_whole_runs(out: Path, stories_folder: Path) -> None:
    model = load(stories_folder)
    plan = select(out, api.SelectSettings(k=5))
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
            known |= dict.fromkeys((name, f"{name} roughly"), Loss(total, 0.0, total, 0.0).as_json())
    found = Choosing(settings, None, Silent(), Saved(ms))  # type: ignore[arg-type]
    nobody: Any = lambda *_: pytest.fail("measured")  # noqa: E731
    found.__dict__["sets"] = MeasuredSets(nobody, KL, LossCache(known, lambda _: None), nobody)
    return found


def filled(
    order: Sequence[Block], budget: Budget, ms: Mapping[Block, float] = MS
) -> tuple[list[Block], list[CurvePoint]]:
    """What an ``order`` becomes: what ships, and the points of its curve."""
    choosing = choosing_of(SelectSettings(k=1, criterion="greedy", workload=("prefill=1",)), ms)
    path = Prefixes(iter([tuple(order[:k]) for k in range(1, len(order) + 1)]))
    prefix, points = choosing.fill(path, choosing.measure_curve(path, len(order), budget), budget, sorted(KL))
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
