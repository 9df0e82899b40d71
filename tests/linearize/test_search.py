"""The order of layers against an exhaustive search in tables of losses, and losses that are measured once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from nbl_export.blocks import Block, Mlp, Span, layer_of, parts_in, spans_of, with_block
from nbl_export.errors import CalibrationError
from nbl_export.linearize import search
from nbl_export.linearize.plan import DROPPED, LinearLayer
from nbl_export.linearize.search import (
    MeasuredSets,
    Prefixes,
    capped,
    count_blocks,
    greedy_path,
    largest_within,
    loss_curve,
    measured_alone,
    measured_losses,
    ranked_path,
    single_layer_losses,
)
from nbl_export.linearize.selection import CurvePoint, Loss, Sums
from nbl_export.settings import NO_BUDGET, Budget

Cost = Callable[[frozenset[int]], float]


def greedy_order(
    sets: MeasuredSets,
    singles: Mapping[Block, Loss],
    count: int,
    saved: Callable[[Sequence[Block], Block], float] = lambda _linear, _block: 1.0,
) -> list[Block]:
    """``saved`` is what a block saves where others are linear already."""

    def together(blocks: Sequence[Block]) -> float:
        return sum(saved(blocks[:number], block) for number, block in enumerate(blocks))

    return list(Prefixes(greedy_path(sets, singles, together))(count))


def of_kl(kl: float) -> Loss:
    return Loss(kl, 0.0, 0.0, 0.0)


def sums_of_kl(kl: float) -> Sums:
    return Sums({"0": (1.0, kl, 0.0)})


class Table:
    """Stands for a meter: the loss of a set is what ``cost`` says; keeps which sets it was asked for, and settled.

    ``swept`` are those that it was asked for at once.
    """

    def __init__(self, cost: Cost, count: int, together: bool = False, roughly: Cost | None = None) -> None:
        self.cost, self.together, self.roughly = cost, together, roughly or cost
        self._rough: Table | None = None
        self.swept: list[list[frozenset[int]]] = []
        self.asked: list[frozenset[int]] = []
        self.settled: list[frozenset[int]] = [frozenset()]
        self.maps = {
            i: LinearLayer(np.zeros((1, 1), np.float32), np.zeros(1, np.float32)) for i in range(count)
        }

    @property
    def parts(self) -> list[Table | None]:
        """A quarter of the text, on which a set costs what ``roughly`` says, and the rest; the first is asked apart."""
        if self.together:
            return [self, None, None]
        if self._rough is None:
            self._rough = Table(self.roughly, len(self.maps), self.together)
            self._rough.maps = self.maps
        return [self._rough, self, None]

    def settle(self, maps: Mapping[int, LinearLayer]) -> None:
        self.settled.append(frozenset(maps))

    def measure(self, maps: Mapping[int, LinearLayer]) -> Sums:
        assert all(maps[i] is self.maps[i] for i in maps)
        assert self.settled[-1] <= frozenset(maps)
        self.asked.append(frozenset(maps))
        cost = self.cost(frozenset(maps))
        if self._rough is None:
            return sums_of_kl(cost)
        # All rows together cost what ``cost`` says.
        return Sums({"0": (3.0, 4 * cost - self.roughly(frozenset(maps)), 0.0)})

    def measure_all(self, sets: Sequence[Mapping[int, LinearLayer]]) -> list[Sums]:
        before = len(self.asked)
        losses = [self.measure(maps) for maps in sets]
        self.swept.append(self.asked[before:])
        return losses

    def sets(self, known: dict[str, Sums] | None = None) -> MeasuredSets:
        measure: Any = partial(measured_losses, self, self.maps)
        return MeasuredSets(lambda: self, self.maps, {} if known is None else known, measure)  # type: ignore[arg-type, return-value]


def exhaustive(cost: Cost, count: int, k: int) -> list[int]:
    """Greedy search that tries everything; ties go to the lower layer."""
    chosen: list[int] = []
    while len(chosen) < k:
        rest = [i for i in range(count) if i not in chosen]
        chosen.append(min(rest, key=lambda i: (cost(frozenset([*chosen, i])), i)))
    return chosen


def order(table: Table, k: int) -> list[int]:
    sets = table.sets()
    return greedy_order(sets, single_layer_losses(sets), k)


# Layers cost what they cost alone, and something more beside each other: additions grow. In whole numbers, which
# floats add without rounding, so that ties are ties.
@st.composite
def growing(draw: st.DrawFn) -> tuple[int, Cost]:
    count = draw(st.integers(2, 7))
    own = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    pairs = {(i, j): draw(st.integers(0, 4)) for i in range(count) for j in range(i + 1, count)}

    def cost(chosen: Iterable[int]) -> float:
        inside = sorted(chosen)
        both = [pairs[i, j] for i in inside for j in inside if i < j]
        return float(sum(own[i] for i in inside) + sum(both))

    return count, cost


@settings(max_examples=200, deadline=None)
@given(growing(), st.sampled_from([0.5, 1.0, 2.0]))
def test_lazy_search_is_exhaustive_where_additions_grow(problem: tuple[int, Cost], other_text: float) -> None:
    """The first rows are on another scale than all."""
    count, cost = problem
    table = Table(cost, count, roughly=lambda chosen: other_text * cost(chosen))
    want = exhaustive(cost, count, count)
    for k in range(count + 1):
        assert order(table, k) == want[:k]


def test_lazy_search_measures_less_and_each_set_once() -> None:
    """Layers that hardly touch each other: after the first, one look at the best of the rest is enough."""
    rng = np.random.default_rng(0)
    own = rng.permutation(24) + 1.0

    def cost(chosen: Iterable[int]) -> float:
        return float(sum(own[i] for i in chosen)) * (1 + 0.001 * len(list(chosen)))

    table, count = Table(cost, 24), 24
    sets = table.sets()
    assert (
        greedy_order(sets, single_layer_losses(sets), 24)
        == exhaustive(cost, 24, 24)
        == np.argsort(own).tolist()
    )
    assert len(table.asked) == len(set(table.asked))
    assert len(table.asked) <= count + 2 * count < count * (count + 1) // 2
    # Fewer layers, and one more, are the beginning of it and cost nothing.
    asked = len(table.asked)
    assert greedy_order(sets, single_layer_losses(sets), 7) == np.argsort(own)[:7].tolist()
    assert len(table.asked) == asked


def test_the_cap_leaves_out_what_was_last_known_to_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "GREEDY_TRIES", 2)
    # Beside layer 0, layer 3 costs nothing; but it seemed to cost most, and two others are tried before it.
    own = [1.0, 2.0, 3.0, 9.0]

    def cost(chosen: frozenset[int]) -> float:
        if chosen >= {0, 3}:
            return 1.0
        return sum(own[i] for i in chosen) * 10 ** (len(chosen) - 1)

    assert exhaustive(cost, 4, 2) == [0, 3]
    assert order(Table(cost, 4), 2) == [0, 1]


def test_ties_go_to_the_lower_layer() -> None:
    table = Table(lambda chosen: float(len(chosen)), 5)
    assert order(table, 5) == [0, 1, 2, 3, 4]
    # Layer 0 rises to what layer 1 is known to cost alone, and still costs: 1 must be looked at.
    costs = {frozenset([2]): 1.0, frozenset([0]): 3.0, frozenset([1]): 3.0}
    costs |= {frozenset([2, 1]): 4.0, frozenset([2, 0]): 4.0}
    assert order(Table(lambda s: costs[s], 3), 2) == [2, 0]
    costs |= {frozenset([2]): 1.0, frozenset([1]): 2.0, frozenset([2, 1]): 4.0, frozenset([2, 0]): 4.0}
    assert order(Table(lambda s: costs[s], 3), 2) == [2, 0]


def test_a_set_is_the_same_in_any_order_and_a_meter_is_made_only_for_what_is_new() -> None:
    table = Table(lambda chosen: float(sum(chosen)), 4)
    sets = table.sets()
    assert sets.loss([2, 0]) == sets.loss((0, 2)) == sets.loss([0, 2, 2]) == of_kl(2.0)
    assert table.asked == [frozenset([0, 2])]
    assert sets.candidates == (0, 1, 2, 3)

    def none() -> Any:
        pytest.fail("everything is known")

    known = {
        f"{name} part {part}": sums_of_kl(kl) for name, kl in (("0,2", 9.0), ("", 0.0)) for part in range(3)
    }
    sets = MeasuredSets(none, table.maps, known, none)
    assert sets.loss([2, 0]) == of_kl(9.0) and sets.loss([]) == of_kl(0.0)


def raced(
    costs: Mapping[int, tuple[float, float]], later: Mapping[int, float] | None = None
) -> tuple[list[int], list[tuple[tuple[int, ...], int]]]:
    """The order of layers that cost so much of each of the six documents of a part, more or less by the second figure
    in every other one, beside others ``later`` times as much from the second part on; and which sets were measured on
    which part."""
    asked: list[tuple[tuple[int, ...], int]] = []

    def measure(sets: Sequence[Sequence[int]], _settled: frozenset[Block], part: int) -> list[Sums]:
        asked.extend((tuple(layers), part) for layers in sets)

        def cost(layer: int, beside: int, n: int) -> float:
            mean, swing = costs[layer]
            return (mean + (-1) ** n * swing) * ((later or {}).get(layer, 1.0) if part and beside else 1.0)

        return [
            Sums(
                {
                    str(6 * part + n): (1.0, sum(cost(i, len(layers) - 1, n) for i in layers), 0.0)
                    for n in range(6)
                }
            )
            for layers in sets
        ]

    meter: Any = SimpleNamespace(parts=[True, True, True], together=False)
    sets = MeasuredSets(lambda: meter, costs, {}, measure)  # type: ignore[arg-type]
    return greedy_order(sets, single_layer_losses(sets), 2), asked


def test_what_is_certainly_behind_is_measured_on_no_more_rows() -> None:
    order, asked = raced({0: (1.0, 0.0), 1: (5.0, 0.0), 2: (5.5, 0.0), 3: (9.0, 0.0)})
    assert order == [0, 1]
    assert ((0, 2), 0) in asked and ((0, 2), 1) not in asked, "every document says so"
    assert ((0, 1), 2) in asked, "what is taken is measured on all"
    order, asked = raced({0: (1.0, 0.0), 1: (5.0, 2.0), 2: (5.5, -2.0), 3: (90.0, 0.0)})
    assert order == [0, 1]
    assert ((0, 2), 2) in asked, "documents are divided on it"
    assert not any(3 in layers and len(layers) > 1 for layers, _ in asked), "its bound is above the best"


def test_what_is_worse_on_all_rows_than_the_bounds_of_others_is_raced_again() -> None:
    order, asked = raced({0: (1.0, 0.0), 1: (5.0, 2.0), 2: (6.5, -2.0), 3: (90.0, 0.0)}, later={1: 2.0})
    assert order == [0, 2], "layer 1 was the best on the first part"
    assert not any(3 in layers and len(layers) > 1 for layers, _ in asked)


# no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused_by_the_layers_it_was_measured_with(bad: float) -> None:
    """NaN is below everything: min() took it for the best."""
    for broken in (frozenset([2]), frozenset([0, 1])):
        known: dict[str, Sums] = {}
        table = Table(lambda chosen, b=broken: bad if chosen == b else float(sum(i + 1 for i in chosen)), 4)  # type: ignore[misc]
        named = "layer 2" if len(broken) == 1 else "layers 0, 1"
        with pytest.raises(
            CalibrationError, match=rf"^With {named} replaced, the model's loss .* not a number"
        ):
            sets = table.sets(known)
            greedy_order(sets, single_layer_losses(sets), 3)
        # It is not kept, either.
        assert known and not any(name.startswith(f"{','.join(map(str, sorted(broken)))} ") for name in known)


# together ----------------------------------------------------------------------------------------


def test_sets_that_are_measured_together_give_the_same_order_in_as_many_sweeps_as_layers() -> None:
    rng = np.random.default_rng(0)
    count, k = 14, 6
    costs = rng.uniform(0.1, 1.0, count)
    pairs = rng.uniform(0.0, 0.4, (count, count))

    def cost(layers: frozenset[int]) -> float:
        chosen = sorted(layers)
        return float(costs[chosen].sum() + pairs[np.ix_(chosen, chosen)].sum())

    one, all_at_once = Table(cost, count), Table(cost, count, together=True)
    orders = [greedy_order(s, single_layer_losses(s), k) for s in (one.sets(), all_at_once.sets())]
    assert orders[0] == orders[1]
    assert [len(sweep) for sweep in all_at_once.swept[:1]] == [count]
    assert len(all_at_once.swept) <= 1 + (k - 1), "the first layer is known from the singles"
    assert all(len(sweep) == 1 for sweep in one.swept)
    assert len(set(all_at_once.asked)) == len(all_at_once.asked), "nothing is measured twice"


# for what is saved -------------------------------------------------------------------------------


def exact_loss(losses: Sequence[float], saved: Sequence[float], least: float) -> float:
    """The smallest sum of ``losses`` of items that save at least ``least``, by integer programming."""
    found = milp(
        np.array(losses),
        integrality=np.ones(len(losses)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array(saved)[None], least, np.inf),
    )
    assert found.success
    return float(found.fun)


ITEMS = st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.1, 1.0)), min_size=3, max_size=8)


@settings(max_examples=60, deadline=None)
@given(items=ITEMS)
def test_for_what_is_saved_each_prefix_is_as_good_as_any_set_that_saves_as_much(
    items: list[tuple[float, float]],
) -> None:
    """Where losses add up: no set that saves as much loses less (the greedy order solves the relaxed program)."""
    losses, saved = zip(*items, strict=True)
    table = Table(lambda layers: sum(losses[i] for i in layers), len(items))
    sets = table.sets()
    order = greedy_order(sets, single_layer_losses(sets), len(items), lambda _, block: saved[layer_of(block)])
    for k in range(1, len(items) + 1):
        taken = [layer_of(block) for block in order[:k]]
        total = sum(saved[i] for i in taken)
        assert sum(losses[i] for i in taken) <= exact_loss(losses, saved, total - 1e-6) + 1e-5


def test_what_saves_nothing_comes_last_and_what_gains_first() -> None:
    losses, saved = [0.1, 0.2, -0.05, -0.05], [0.0, 5.0, 1.0, 2.0]
    table = Table(lambda layers: sum(losses[i] for i in layers), 4)
    sets = table.sets()
    assert greedy_order(sets, single_layer_losses(sets), 4, lambda _, i: saved[layer_of(i)]) == [3, 2, 1, 0]
    # By loss alone the one that saves nothing comes before.
    assert greedy_order(sets, single_layer_losses(sets), 4) == [2, 3, 0, 1]


# spans -------------------------------------------------------------------------------------------


def spanned(costs: Mapping[Block, float]) -> MeasuredSets:
    """Sets of blocks with these ``costs``, which add up, as measured."""

    def loss(blocks: Sequence[Block]) -> Sums:
        return sums_of_kl(sum(costs[block] for block in blocks))

    return MeasuredSets(
        lambda: Table(lambda _: 0.0, 1, together=True),  # type: ignore[arg-type, return-value]
        dict.fromkeys(costs, DROPPED),
        {},
        lambda sets, _settled, _part: [loss(blocks) for blocks in sets],
    )


def path_of(
    costs: Mapping[Block, float], saved: Mapping[Block, float] | None = None
) -> list[tuple[Block, ...]]:
    sets = spanned(costs)
    by = count_blocks if saved is None else (lambda blocks: sum(saved[block] for block in blocks))
    return list(greedy_path(sets, single_layer_losses(sets), by))


def test_spans_grow_and_do_not_overlap() -> None:
    costs = {Span(1, 1): 0.1, Span(2, 2): 0.3, Span(1, 2): 0.25, Span(2, 3): 0.4, Span(1, 3): 0.7}
    found = path_of(costs)
    # 2-3 overlaps 1-2, and what is within it is nothing new.
    assert found == [(Span(1, 1),), (Span(1, 2),), (Span(1, 3),)]


def test_what_is_saved_beyond_what_is_needed_is_no_reason_to_lose_more() -> None:
    costs = {0: 0.1, 1: 0.15, 4: 0.2, Span(0, 1): 0.6}
    saved = {0: 1.0, 1: 1.0, 4: 1.0, Span(0, 1): 9.0}

    def total(blocks: Sequence[Block]) -> float:
        return sum(saved[block] for block in blocks)

    def enough(needed: float, capping: bool) -> tuple[Block, ...]:
        """The first set of the path that saves what is needed."""
        sets = spanned(costs)
        path = greedy_path(sets, single_layer_losses(sets), capped(total, needed) if capping else total)
        return next(found for found in path if total(found) >= needed)

    assert enough(2.0, capping=False) == (Span(0, 1),)
    assert enough(2.0, capping=True) == (0, 1)
    assert enough(2.5, capping=True) == (0, 1, 4)
    # Where small blocks do not do, or lose more, the span is taken; beyond what is needed the path goes on as before.
    assert enough(5.0, capping=True) == (Span(0, 1),)
    assert capped(total, 2.0)((0,)) == 1.0
    assert 2.0 < capped(total, 2.0)((0, 1, 4)) < capped(total, 2.0)((Span(0, 1),)) < 2.1


def test_spans_beside_each_other_become_one_where_that_costs_little() -> None:
    costs = {Span(1, 1): 0.1, Span(2, 2): 0.1, Span(1, 2): 0.26, 4: 0.5}
    found = path_of(costs, {**dict.fromkeys(costs, 1.0), Span(1, 2): 2.5})
    assert found == [(Span(1, 1),), (Span(1, 1), Span(2, 2)), (Span(1, 2),), (Span(1, 2), 4)]
    prefix = Prefixes(iter(found), spans=True)
    assert [prefix(k) for k in (4, 5, 4)] == [found[2], found[3], found[2]]


def test_prefixes_are_the_largest_sets_of_at_most_k() -> None:
    costs = {0: 0.1, Span(1, 1): 0.3, Span(1, 2): 0.7}
    sets = spanned(costs)
    prefix = Prefixes(greedy_path(sets, single_layer_losses(sets)), spans=True)
    assert [prefix(k) for k in (0, 1, 2, 3, 4, 5, 9)] == [
        (),
        (0,),
        (0,),
        (0, Span(1, 1)),
        (0, Span(1, 1)),
        (0, Span(1, 2)),
        (0, Span(1, 2)),
    ]


def test_a_ranking_leaves_out_what_overlaps() -> None:
    order = [Span(2, 3), 3, 1, Mlp(1), Span(3, 4), Span(1, 4)]
    assert list(ranked_path(order)) == [
        (Span(2, 3),),
        (Span(2, 3), 1),
        (Span(2, 3), 1, Mlp(1)),
        (Span(1, 4),),
    ]


BLOCKS = st.sampled_from([0, Mlp(0), 1, Mlp(1), 2, Mlp(2), *spans_of(range(3))])


@settings(max_examples=200, deadline=None)
@given(costs=st.dictionaries(BLOCKS, st.floats(0.01, 1.0), min_size=1))
def test_every_step_replaces_more_and_nothing_twice(costs: dict[Block, float]) -> None:
    before: set[Block] = set()
    blocks: tuple[Block, ...] = ()
    for blocks in path_of(costs):
        parts = [part for block in blocks for part in parts_in(block)]
        assert len(parts) == len(set(parts)) and before <= set(parts)
        before = set(parts)
    # It ends where nothing can be added.
    assert all(with_block(blocks, block) is None for block in costs)


def test_longer_spans_are_measured_where_they_may_be_best() -> None:
    asked: list[tuple[Block, ...]] = []
    costs = {
        Span(a, b): float(sum(range(a + 1, b + 2))) ** 1.1 for a in range(6) for b in range(a, min(a + 4, 6))
    }

    def losses(sets: Sequence[Sequence[Block]], _settled: frozenset[Block], _part: int) -> list[Sums]:
        asked.extend(map(tuple, sets))
        return [sums_of_kl(sum(costs[block] for block in blocks)) for blocks in sets]

    sets = MeasuredSets(
        lambda: Table(lambda _: 0.0, 1, together=True),  # type: ignore[arg-type, return-value]
        dict.fromkeys(costs, DROPPED),
        {},
        losses,
    )
    singles = single_layer_losses(sets, filter(measured_alone, costs))
    assert len(singles) == 6
    longer = [span for span in costs if not measured_alone(span)]
    found = list(greedy_path(sets, singles, longer=longer))
    exact = single_layer_losses(spanned(costs))
    assert found == list(greedy_path(spanned(costs), exact))
    assert len({blocks for blocks in asked if len(blocks) == 1}) < len(costs)


# the curve ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kls", "length", "best"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 5, 2),  # two points within, and three beyond
        ([0.9] * 7, 3, 0),
        ([0.1] * 7, 7, 7),
        ([0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.1], 7, 4),  # it comes back once, and not in time again
        ([], 0, 0),
    ],
)
def test_a_curve_is_followed_a_little_beyond_its_budget(kls: list[float], length: int, best: int) -> None:
    budget = Budget(max_kl=0.2)
    found = loss_curve(lambda k: range(k), lambda layers: of_kl(kls[len(layers) - 1]), len(kls), budget)
    assert found == [CurvePoint.of(range(k), of_kl(kls[k - 1])) for k in range(1, length + 1)]
    assert largest_within(found, budget) == best
    every = loss_curve(lambda k: range(k), lambda layers: of_kl(kls[len(layers) - 1]), len(kls), NO_BUDGET)
    assert len(every) == len(kls)
