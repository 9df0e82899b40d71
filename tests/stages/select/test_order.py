"""Which layers and how many: against whole runs with maps put in place by hand, and within budgets."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.calibrate.text import load_text
from nbl_export.errors import BudgetError
from nbl_export.linearize import lmmse
from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.scores import CRITERIA
from nbl_export.stages.select import speeds
from nbl_export.stages.select.speeds import SpeedMeter, Speedups
from nbl_export.workspace import Workspace
from tests.fixtures_graph import load
from tests.listening import Notes
from tests.stages.select.by_hand import candidates, curve, files, kl_by_hand, same_plan, select


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
    ratios, kls = ([p[name] for p in points] for name in ("perplexity_ratio", "kl"))
    for values, name in ((ratios, "max_perplexity_ratio"), (kls, "max_kl")):
        for bound in [*((a + b) / 2 for a, b in pairwise(values)), max(values) * 1.01, values[2]]:
            if bound < (1 if name == "max_perplexity_ratio" else 0) or min(values) > bound:
                continue
            best = max(p["k"] for p, v in zip(points, values, strict=True) if v <= bound)
            plan = select(out, api.SelectSettings(budget=api.Budget(**{name: bound})))
            assert len(plan.chosen) == best, (name, bound)
            assert list(plan.chosen) == points[best - 1]["layers"]
            said = candidates(out)["curve"]
            assert said["chosen"] == best and said["budget"][name] == bound and said["context"] == 511
            # A few points are timed, among them the chosen one.
            speeds = {p["k"]: (p["prefill_speedup"], p["decode_speedup"]) for p in said["points"]}
            assert speeds[best] == (1 + best / 10, 1 + best / 8)
    both = api.Budget(max_kl=kls[3] * 1.0001, max_perplexity_ratio=max(ratios[0], ratios[1], 1.0) * 1.0001)
    assert len(select(out, api.SelectSettings(budget=both)).chosen) == max(
        p["k"]
        for p in points
        if p["kl"] <= kls[3] * 1.0001 and p["perplexity_ratio"] <= max(ratios[0], ratios[1], 1.0) * 1.0001
    )


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "greedy"])
def test_every_criterion_has_a_curve_where_a_budget_asks_for_one(
    out: Path, timed: list[int], criterion: str
) -> None:
    plan = select(out, api.SelectSettings(criterion=criterion, budget=api.Budget(max_kl=100.0)))
    assert plan.chosen == (0, 1, 2, 3, 4)
    points = candidates(out)["curve"]["points"]
    fewer = select(out, api.SelectSettings(k=2, criterion=criterion))
    assert points[1]["layers"] == list(fewer.chosen)


def test_a_budget_that_no_k_keeps_is_one_sentence_and_leaves_the_earlier_plan(
    out: Path, timed: list[int]
) -> None:
    plan, kept = select(out, api.SelectSettings(k=2)), files(out)
    with pytest.raises(BudgetError) as caught:
        select(out, api.SelectSettings(budget=api.Budget(max_kl=1e-9)))
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert message.startswith("No K meets the budget, since K = 1 costs a KL of ") and message.endswith(
        "or give --k."
    )
    assert "\n" not in message
    left = files(out)
    assert {k: v for k, v in left.items() if k != "measured.json"} == {
        k: v for k, v in kept.items() if k != "measured.json"
    }
    assert same_plan(load_plan(out / "nbl" / "plan.json"), plan)
    notes = Notes()
    select(out, api.SelectSettings(k=2), notes)
    assert notes.notes == ["select: done already, kept."]


# what ships --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{"rank": 6}, {"fit": "sequential"}, {"repair": 3, "repair_rank": 0}],
    ids=lambda how: next(iter(how)),
)
def test_the_plan_that_ships_is_the_plan_that_is_weighed(
    out: Path, stories_folder: Path, timed: list[int], how: dict[str, Any]
) -> None:
    """A budget that K = 3 of the curve just keeps: what ships keeps it too, with as many layers as that allows."""
    bound = curve(out)[2]["kl"] * 1.0001
    losses = {}
    for k in (1, 2, 3):
        select(out, api.SelectSettings(k=k, **how))
        losses[k] = candidates(out)["result"]["loss"]["kl"]
    best = max((k for k, kl in losses.items() if kl <= bound), default=0)
    notes = Notes()
    plan = select(out, api.SelectSettings(budget=api.Budget(max_kl=bound), **how), notes)
    known = candidates(out)
    assert len(plan.chosen) == known["curve"]["chosen"] == best
    assert known["result"]["loss"]["kl"] <= bound
    assert kl_by_hand(out, load(stories_folder), plan.layers) <= bound * 1.005
    dropped = [note for note in notes.notes if "as it ships, more than the budget" in note]
    assert len(dropped) == 3 - best and (how.get("rank") is None or best < 3)
    # The chosen K is timed.
    assert next(p for p in known["curve"]["points"] if p["k"] == best)["prefill_speedup"] == 1 + best / 10


def test_a_budget_that_nothing_ships_within_is_refused(out: Path, timed: list[int]) -> None:
    bound = api.Budget(max_kl=curve(out)[0]["kl"] * 1.0001)
    kept = select(out, api.SelectSettings(k=2))
    with pytest.raises(BudgetError) as caught:
        select(out, api.SelectSettings(budget=bound, rank=1))
    assert re.match(
        r"No K meets the budget with the fit, the repair or the rank asked for: K = 1 costs a KL of ",
        str(caught.value),
    )
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert same_plan(load_plan(out / "nbl" / "plan.json"), kept)


def test_a_speed_binds_what_ships_too(out: Path, timed: list[int]) -> None:
    """As fast as K = 2 at least: fewer layers are not taken, even if only they cost as little as asked."""
    points = curve(out)
    bound = points[2]["kl"] * 1.0001
    with pytest.raises(BudgetError, match=r"No K meets the budget with .* K = 3 costs"):
        select(out, api.SelectSettings(budget=api.Budget(max_kl=bound, min_speedup=1.3), rank=2))


def test_a_k_that_is_found_too_slow_is_not_shipped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 5 is fast enough and K = 3 the least; of those between, K = 4 is timed slower than asked."""
    found = {1: 1.1, 2: 1.2, 3: 1.3, 4: 1.25, 5: 1.5}

    def call(self: SpeedMeter, k: int) -> Speedups:
        self.found[k] = Speedups(found[k], None)
        return self.found[k]

    monkeypatch.setattr(SpeedMeter, "__call__", call)
    points = curve(out)
    bound = (points[3]["kl"] + points[4]["kl"]) / 2
    plan = select(out, api.SelectSettings(budget=api.Budget(max_kl=bound, min_speedup=1.3)))
    assert len(plan.chosen) == 3


def test_graphs_of_a_rank_are_really_timed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--k auto --rank R, which had no factors to time."""
    monkeypatch.setattr(speeds, "CONTEXT", 16)
    monkeypatch.setattr(speeds, "ROUNDS", 3)
    cut: list[int] = []
    plain = lmmse.truncate

    def counted(*arguments: Any) -> Any:
        cut.append(1)
        return plain(*arguments)

    monkeypatch.setattr(lmmse, "truncate", counted)
    settings = api.SelectSettings(criterion="nmse", budget=api.Budget(max_kl=100.0), rank=8)
    plan = select(out, settings)
    assert len(cut) == 5, "each layer once, however many K are timed with it"
    assert len(plan.chosen) == 5 and plan.rank == 8
    points = candidates(out)["curve"]["points"]
    assert points[-1]["prefill_speedup"] > 0
