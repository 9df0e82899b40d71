"""A budget of loss is filled: what is too much for it does not keep out what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.blocks import Block, Mlp
from nbl_export.linearize.budget import CurvePoint
from nbl_export.linearize.figures import Loss
from nbl_export.linearize.search import LossCache, MeasuredSets
from nbl_export.progress import Silent
from nbl_export.settings import Budget, SelectSettings
from nbl_export.settings.workload import Workload
from nbl_export.stages.select.choosing import Choosing, Way
from nbl_export.verify.speed.savings import BlockTimes, Savings
from nbl_export.verify.speed.values import GraphCost, Roofline

NOTHING = GraphCost(0, 0, 0, 0)
MS: Mapping[Block, float] = {0: 2.0, 1: 2.0, 2: 2.0, Mlp(0): 10.0, Mlp(1): 10.0}
KL: Mapping[Block, float] = {0: 0.01, 1: 0.02, 2: 0.03, Mlp(0): 0.04, Mlp(1): 0.06}


def losses(kl: Mapping[Block, float]) -> MeasuredSets:
    """Every set's loss is the sum of its blocks'."""
    known = {}
    for count in range(1, len(kl) + 1):
        for blocks in combinations(sorted(kl), count):
            total = sum(kl[b] for b in blocks)
            name = ",".join(map(str, blocks))
            known |= dict.fromkeys((name, f"{name} roughly"), Loss(total, 0.0, total, 0.0).as_json())
    linear: Any = dict.fromkeys(kl)
    return MeasuredSets(lambda: pytest.fail("measured"), linear, LossCache(known, lambda _: None))


def saving(ms: Mapping[Block, float]) -> Savings:
    """What blocks save of a workload of 100 ms."""
    roofline = Roofline("cpu", "float32", 1, 1e9, 1e9)
    return Savings(
        NOTHING, dict.fromkeys(ms, NOTHING), roofline, [Workload(prefill=1)], 0, BlockTimes(100.0, ms)
    )


def filled(
    order: Sequence[Block], budget: Budget, ms: Mapping[Block, float] = MS
) -> tuple[str, list[Block], list[CurvePoint]]:
    """What a way of that ``order`` becomes: its name, what ships, and the points of its curve."""
    used = saving(ms)
    sets, nobody = losses(KL), None
    way = Way("MLPs", tuple(sorted(KL)), lambda k: order[:k], lambda: sets, used)
    choosing = Choosing(SelectSettings(k=1, criterion="greedy"), nobody, Silent(), used)  # type: ignore[arg-type]
    points = choosing.curve(way, len(order), budget)
    way, points = choosing.filled(way, points, budget, sorted(KL))
    return way.name, list(way.prefix(len(points))), points


def test_a_smaller_block_takes_the_room_that_a_larger_one_does_not_find() -> None:
    order = [Mlp(0), Mlp(1), 0, 1, 2]
    name, chosen, points = filled(order, Budget(max_kl=0.075))
    # 0.04, then not 0.10; the one that loses least for what it saves, and the next.
    assert name == "both" and chosen == [Mlp(0), 0, 1]
    assert [(p.k, p.layers) for p in points] == [
        (1, (Mlp(0),)),
        (2, (0, Mlp(0))),
        (3, (0, Mlp(0), 1)),
    ]
    assert [p.kl for p in points] == pytest.approx([0.04, 0.05, 0.07])
    assert [p.workload_speedup for p in points] == pytest.approx([100 / 90, 100 / 88, 100 / 86])


def test_what_has_no_room_stays_as_it_was() -> None:
    order = [Mlp(0), Mlp(1), 0, 1, 2]
    name, chosen, points = filled(order, Budget(max_kl=0.045))
    assert (
        name == "MLPs"
        and len(points) > 1
        and points[0].k == 1
        and chosen[: len(points)] == order[: len(points)]
    )


def test_a_block_that_saves_nothing_fills_nothing() -> None:
    none = {**MS, 0: 0.0, 1: -1.0, 2: 0.0}
    _, chosen, _ = filled([Mlp(0), Mlp(1), 0, 1, 2], Budget(max_kl=0.075), none)
    assert chosen[:2] == [Mlp(0), Mlp(1)]


def test_where_not_even_the_first_fits_another_may() -> None:
    name, chosen, points = filled([Mlp(1), Mlp(0), 0, 1, 2], Budget(max_kl=0.015))
    assert name == "attention" and chosen == [0] and [p.k for p in points] == [1]


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
    choosing = Choosing(asked, None, Silent(), saving(MS))  # type: ignore[arg-type]
    choosing.__dict__["sets"] = losses(KL)
    way = choosing.way([SimpleNamespace(layer=block) for block in KL])  # type: ignore[misc]
    assert [sorted(way.prefix(k)) for k in (1, 2)] == [first, then]
