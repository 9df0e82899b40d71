"""Choose the layers to linearize by the measured loss of their replacement.

Every criterion gives an order, best layer first. The K best are the first K, so one order is enough for every K.

kl         KL of the model with only that layer replaced
drop       KL of the model with only that layer dropped: the layer dropping baseline
linearity  the layer's NMSE times a measured sensitivity (arXiv 2411.17525): the increase of ln perplexity is
           predicted as Σ α_l t_l², with t_l² the share of layer l's output that the fit misses (its NMSE) and α_l
           the KL caused by noise of a known share, which is the expected increase of ln perplexity on text sampled
           from the model
greedy     one layer after the other, each the one with the smallest added loss given those already chosen

For a workload each loss is divided by the time that the layer saves in it.

Greedy search is lazy: the loss added by a layer mostly grows as others are chosen, so its last known value is a lower
bound of the next one, and layers whose bound is above the best value found are not run. Ties go to the lower layer.
It begins with the rough losses of single layers, on the first part of the rows. The sets of a step race: those that
are behind the best one by more than twice the standard error of the difference, over documents, are not measured on
more rows. A set that is taken is measured on all.

What it compares is the KL of the text and, with a smaller weight, those of synthetic rows, where only the context tells
what comes next (:mod:`nbl_export.calibrate.synthetic`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from nbl_export.blocks import Block, Span, all_parts, layer_of, with_block
from nbl_export.errors import CalibrationError
from nbl_export.linearize.loss import PARTS, LossMeter
from nbl_export.linearize.plan import Replacement, by_part
from nbl_export.linearize.selection import CurvePoint, Loss, Sums, keeps, mean_of_documents, per_saving
from nbl_export.models.layers import BlockModules
from nbl_export.settings import Budget

# The share of a layer's output that is noise when its sensitivity is measured: about the error of the fits. The theorem
# is about small errors, but with a share of 5 % bfloat16 rounding dominated, and the ranking was random.
NOISE = 0.5
# The maximum number of candidates measured for each layer that greedy search chooses.
GREEDY_TRIES = 8
# A rough loss may be this much larger than the loss on all rows would be, for the same layer and on the same scale.
_ROUGH = 1.25
# Of fewer documents a standard error says nothing.
_FEWEST_DOCUMENTS = 3


class MeasuredSets:
    """The losses of sets of linear layers, ``known`` by name or measured.

    The ``meter`` is created at the first measurement. ``measure`` is :func:`measured_losses`, of which several
    processes may each do a share: ``at_once`` sets are measured in the time of one.
    """

    def __init__(
        self,
        meter: Callable[[], LossMeter],
        candidates: Iterable[Block],
        known: dict[str, Sums],
        measure: Callable[[Sequence[Sequence[Block]], frozenset[Block], int], Sequence[Sums]],
        at_once: int = 1,
    ) -> None:
        self.candidates = tuple(sorted(candidates))
        self._meter, self._known, self._measure, self._at_once = meter, known, measure, at_once
        self._settled: frozenset[Block] = frozenset()
        self._announced: list[list[Block]] = []

    def loss(self, layers: Iterable[Block]) -> Loss:
        """The loss with exactly ``layers`` replaced; raises :class:`CalibrationError` for one that is no number."""
        return self.sums(layers).loss

    def rough_loss(self, layers: Iterable[Block]) -> Loss:
        """As :meth:`loss`, on the first part of the rows alone: a fraction of the time."""
        return self.sums(layers, 1).loss

    def sums(self, layers: Iterable[Block], parts: int = PARTS) -> Sums:
        """What is measured with ``layers`` replaced on the first ``parts`` of the rows."""
        wanted, total = sorted(set(layers)), Sums()
        for part in range(parts):
            total += self._part(wanted, part)
        return total

    def known(self, layers: Iterable[Block]) -> list[Sums]:
        """What was measured with ``layers`` replaced on each part of the rows, as far as it was."""
        found = (self._known.get(_name(sorted(set(layers)), part)) for part in range(PARTS))
        return [sums for sums in found if sums is not None]

    def announce(self, sets: Iterable[Iterable[Block]]) -> None:
        """Say which ``sets`` may be asked for: where that is less work, the first unknown one brings all of them."""
        self._announced = [sorted(set(layers)) for layers in sets]

    def settle(self, layers: Iterable[Block]) -> None:
        """Announce sets that add to ``layers``: the first unknown one makes the meter settle on ``layers``."""
        self._settled = frozenset(layers)

    def _part(self, layers: list[Block], part: int) -> Sums:
        if (name := _name(layers, part)) not in self._known:
            if self._meter().parts[part] is None:
                self._known.update({name: Sums()})
                return Sums()
            unknown = [w for w in self._announced if w != layers and _name(w, part) not in self._known]
            sets = [layers, *unknown]
            if not self._meter().together:
                sets = sets[: self._at_once]
            found = self._measure(sets, self._settled, part)
            self._known.update({_name(w, part): usable(x, w) for w, x in zip(sets, found, strict=True)})
        return usable(self._known[name], layers)


def _name(layers: Sequence[Block], part: int) -> str:
    return f"{','.join(map(str, layers))} part {part}"


def measured_losses(
    meter: LossMeter,
    linear: Mapping[Block, Replacement],
    sets: Sequence[Sequence[Block]],
    settled: frozenset[Block] = frozenset(),
    part: int = 0,
) -> list[Sums]:
    """What is measured of ``sets`` of the ``linear`` layers on one part of the rows.

    If all add to ``settled``, the meter of the part settles on those.
    """
    meter = meter.parts[part] or meter
    if all(settled <= set(layers) for layers in sets):
        meter.settle(by_part({i: linear[i] for i in settled}))
    return meter.measure_all([by_part({i: linear[i] for i in layers}) for layers in sets])


Found = TypeVar("Found", Loss, Sums)


def usable(found: Found, layers: Sequence[Block], changed: str = "replaced") -> Found:
    """``found``, if it is a number: NaN is smaller than nothing and would be taken for the best.

    Raises :class:`CalibrationError` naming the ``layers`` that were ``changed`` when it was measured.
    """
    if found.finite:
        return found
    named = f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers)) or 'none'}"
    raise CalibrationError(
        f"With {named} {changed}, the model's loss on the selection text is not a number: choose other layers with "
        "--layers, or calibrate on more or other text."
    )


def single_layer_losses(sets: MeasuredSets, layers: Iterable[Block] | None = None) -> dict[Block, Loss]:
    """The rough loss of each of ``layers`` (None: all) with only that layer replaced."""
    wanted = sets.candidates if layers is None else tuple(sorted(layers))
    sets.announce([layer] for layer in wanted)
    return {layer: sets.rough_loss([layer]) for layer in wanted}


# What a set of linear blocks saves, in any unit; without it every block saves the same.
Saved = Callable[[Sequence[Block]], float]


def count_blocks(blocks: Sequence[Block]) -> float:
    """What ``blocks`` save where all parts of layers are alike."""
    return float(len(all_parts(blocks)))


# What of it counts that a set saves beyond what is needed: enough to tell sets apart that all save that.
_BEYOND = 1e-3


def capped(saved: Saved, needed: float) -> Saved:
    """``saved``, of which hardly anything counts beyond ``needed``.

    By loss for what it saves, a long span may be best that saves far more than is asked for, and loses far more than a
    few small blocks that save enough. So items are truncated in greedy algorithms for covering knapsacks.
    """

    def counted(blocks: Sequence[Block]) -> float:
        found = saved(blocks)
        return min(found, needed) + _BEYOND * max(found - needed, 0.0)

    return counted


def measured_alone(block: Block) -> bool:
    """Whether a search begins with the loss of this ``block`` alone: longer spans are tried where they may be best."""
    return not isinstance(block, Span) or block.layer == block.last


def greedy_path(
    sets: MeasuredSets,
    singles: Mapping[Block, Loss],
    saved: Saved = count_blocks,
    longer: Collection[Span] = (),
) -> Iterator[tuple[Block, ...]]:
    """Set after set, each the one before it and the block with the smallest added KL for what it saves.

    A span may take the place of blocks within it. The ``singles`` are rough. ``longer`` are spans that are not among
    them: each is taken to add what its layers do alone, until it is tried. The path ends where nothing can be added.
    """
    # What each block added when it was last tried, or what it adds roughly.
    added = {block: usable(loss, [block]).cost for block, loss in singles.items()}
    added |= {span: sum(added.get(Span(i, i), 0.0) for i in span.layers) for span in longer}
    added, scale = _to_scale(sets, added)
    chosen: tuple[Block, ...] = ()
    while nexts := _nexts(chosen, added):
        sets.settle(chosen)
        already = saved(chosen)
        savings = {block: saved(larger) - already for block, larger in nexts.items()}
        # What the blocks have added whose place a block takes: that much less is added by it.
        gone = {block: sum(added[b] for b in chosen if b not in larger) for block, larger in nexts.items()}
        bounds = {block: per_saving(added[block] - gone[block], savings[block]) for block in nexts}
        order = sorted(nexts, key=lambda b: (bounds[b], b))
        race = _Race(sets, chosen, nexts, savings, scale)
        best = race.won_by(order[:GREEDY_TRIES], bounds)
        added |= {block: found + gone[block] for block, found in race.added.items()}
        chosen = nexts[best]
        yield chosen


class _Race:
    """What each of the blocks in ``savings`` adds to ``chosen``, which becomes ``nexts``, for what it saves."""

    def __init__(
        self,
        sets: MeasuredSets,
        chosen: Sequence[Block],
        nexts: Mapping[Block, Sequence[Block]],
        savings: Mapping[Block, float],
        scale: float,
    ) -> None:
        self._sets, self._chosen, self._nexts, self._savings = sets, chosen, nexts, savings
        # What ``chosen`` costs on each number of parts, and on all over that: what is added is brought to that scale.
        counts = range(1, PARTS + 1)
        self._base = {n: sets.sums(chosen, n).loss.cost if chosen else 0.0 for n in counts}
        whole = self._base[PARTS]
        self._scale = {n: whole / cost if min(whole, cost) > 0 else scale for n, cost in self._base.items()}
        self._scale[PARTS] = 1.0
        self.added: dict[Block, float] = {}

    def won_by(self, order: Sequence[Block], bounds: Mapping[Block, float]) -> Block:
        """The best of the blocks; those in ``order`` whose bound is above its rate on all rows are not measured."""
        self._sets.announce(self._nexts[block] for block in order)
        waiting = list(order)
        best, least, whole = waiting[0], math.inf, dict[Block, float]()
        while waiting and bounds[waiting[0]] <= least:
            racing = dict[Block, float]()
            while waiting and bounds[waiting[0]] <= min([least, *racing.values()]):
                block = waiting.pop(0)
                racing[block] = self._rate(block, 1)
            if whole:
                racing[best] = self._rate(best, 1)
            best, least = self._race(racing)
            whole[best] = self.added[best]
        self.added |= whole
        return best

    def _race(self, rates: Mapping[Block, float]) -> tuple[Block, float]:
        """The best of the blocks, of which the ``rates`` on the first part are known, and its rate on all rows."""
        for parts in range(2, PARTS + 1):
            best = min(rates, key=lambda b: (rates[b], b))
            error = {block: self._scale[parts - 1] * self._error(block, best, parts - 1) for block in rates}
            left = [b for b in rates if b == best or rates[b] <= rates[best] + 2 * error[b]]
            self._sets.announce(self._nexts[block] for block in left)
            rates = {block: self._rate(block, parts) for block in left}
        best = min(rates, key=lambda b: (rates[b], self.added[b], b))
        return best, rates[best]

    def _rate(self, block: Block, parts: int) -> float:
        added = self._sets.sums(self._nexts[block], parts).loss.cost - self._base[parts]
        self.added[block] = added * self._scale[parts]
        return per_saving(self.added[block], self._savings[block])

    def _error(self, one: Block, other: Block, parts: int) -> float:
        """The standard error of the difference of two rates, over documents: unknown, so infinite, for a few."""
        if min(self._savings[one], self._savings[other]) <= 0:
            return 0.0
        base = self._sets.sums(self._chosen, parts).text if self._chosen else {}
        difference: Any = 0.0
        for block, sign in ((one, 1.0), (other, -1.0)):
            text = self._sets.sums(self._nexts[block], parts).text
            tokens, kl = np.array([sums[:2] for sums in text.values()]).T
            before = np.array([base[name][1] if base else 0.0 for name in text])
            difference = difference + sign * (kl - before) / self._savings[block]
        if len(tokens) < _FEWEST_DOCUMENTS:
            return math.inf
        return mean_of_documents(difference, tokens)[1]


def _to_scale(sets: MeasuredSets, rough: Mapping[Block, float]) -> tuple[dict[Block, float], float]:
    """``rough`` losses of single blocks as lower bounds of those on all rows, and how much larger those are.

    Two small ones are measured there.
    """
    small = sorted((block for block in rough if rough[block] > 0), key=lambda b: (rough[b], b))[:2]
    sets.settle(())
    sets.announce([block] for block in small)
    exact = {block: sets.loss([block]).cost for block in small}
    whole = sum(exact.values())
    scale = whole / sum(rough[block] for block in small) if whole > 0 else 1.0
    return {block: exact.get(block, cost * scale / _ROUGH) for block, cost in rough.items()}, scale


def ranked_path(order: Iterable[Block]) -> Iterator[tuple[Block, ...]]:
    """Set after set, each the one before it and the next block of ``order`` that can be added."""
    chosen: tuple[Block, ...] = ()
    for block in order:
        if (larger := with_block(chosen, block)) is not None:
            chosen = larger
            yield chosen


def _nexts(chosen: Sequence[Block], blocks: Iterable[Block]) -> dict[Block, tuple[Block, ...]]:
    """What ``chosen`` becomes with each of ``blocks`` that can be added."""
    found = ((block, with_block(chosen, block)) for block in blocks)
    return {block: larger for block, larger in found if larger is not None}


class Prefixes:
    """The sets of a ``path`` by the number K of attentions and MLPs that they replace, which grows.

    With ``spans``, it may stay where a span takes the place of all that it has: the last set of a K counts.
    """

    def __init__(self, path: Iterator[tuple[Block, ...]], spans: bool = False) -> None:
        self._path, self._spans = path, spans
        self._sets: list[tuple[Block, ...]] = [()]

    def __call__(self, k: int) -> tuple[Block, ...]:
        """The largest set of at most ``k``; empty where the first one has more."""
        while self._goes_on(k) and (larger := next(self._path, None)) is not None:
            self._sets.append(larger)
        return next(found for found in reversed(self._sets) if len(all_parts(found)) <= k)

    def _goes_on(self, k: int) -> bool:
        size = len(all_parts(self._sets[-1]))
        return size < k or (size == k and self._spans)


# The curve is followed this many points beyond its budget: it is not strictly rising.
_POINTS_BEYOND = 2


def loss_curve(
    prefix: Callable[[int], Sequence[Block]],
    loss: Callable[[Sequence[Block]], Loss],
    count: int,
    budget: Budget,
) -> list[CurvePoint]:
    """The losses of K = 1, 2 … ``count``, until the budget is exceeded for good.

    ``prefix(k)`` are the best blocks of at most k attentions and MLPs; where they are fewer, there is no point of k.
    """
    points: list[CurvePoint] = []
    beyond = 0
    for k in range(1, count + 1):
        layers = tuple(prefix(k))
        if len(all_parts(layers)) < k:
            continue
        points.append(CurvePoint.of(layers, loss(layers)))
        beyond = 0 if keeps(budget, points[-1]) else beyond + 1
        if beyond > _POINTS_BEYOND:
            break
    return points


def largest_within(points: Sequence[CurvePoint], budget: Budget) -> int:
    """The largest K of the curve that keeps the bounds of loss; 0 if none does."""
    return max((p.k for p in points if keeps(budget, p)), default=0)


def sensitivity(meter: LossMeter, layer: BlockModules[Block], energy: float) -> Sums:
    """The loss caused by noise with a share :data:`NOISE` of the layer's variance ``energy`` = E‖y - μ_y‖², divided by
    that share.

    The noise is white and the same in every run.
    """
    meter.settle({})
    found = meter.measure_within(_noisy(meter.model, layer, NOISE * energy), layer_of(layer.index))
    return usable(found, [layer.index], "made noisy").divided(NOISE)


@contextmanager
def _noisy(model: torch.nn.Module, layer: BlockModules[Block], energy: float) -> Iterator[None]:
    generator = torch.Generator().manual_seed(layer_of(layer.index))

    def add(_module: Any, _args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        noise = torch.randn(y.shape, generator=generator) * (energy / y.shape[-1]) ** 0.5
        y = y + noise.to(y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    hook = model.get_submodule(layer.output).register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
