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
It begins with the rough losses of single layers, on the first rows of the text; every set that it takes, or compares
with one that it takes, is measured on all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nbl_export.blocks import Block, Span, all_parts, layer_of, with_block
from nbl_export.errors import CalibrationError
from nbl_export.linearize.loss import LossMeter
from nbl_export.linearize.plan import Replacement, by_part
from nbl_export.linearize.selection import CurvePoint, Loss, keeps, per_saving
from nbl_export.models.layers import BlockModules
from nbl_export.settings import Budget

# The share of a layer's output that is noise when its sensitivity is measured: about the error of the fits. The theorem
# is about small errors, but with a share of 5 % bfloat16 rounding dominated, and the ranking was random.
NOISE = 0.5
# The maximum number of candidates measured for each layer that greedy search chooses.
GREEDY_TRIES = 8
# A rough loss may be this much larger than the loss on all rows would be, for the same layer and on the same scale.
_ROUGH = 1.25


class MeasuredSets:
    """The losses of sets of linear layers, ``known`` by name or measured.

    The ``meter`` is created at the first measurement. ``measure`` is :func:`measured_losses`, of which several
    processes may each do a share: ``at_once`` sets are measured in the time of one.
    """

    def __init__(
        self,
        meter: Callable[[], LossMeter],
        candidates: Iterable[Block],
        known: dict[str, Loss],
        measure: Callable[[Sequence[Sequence[Block]], frozenset[Block], bool], Sequence[Loss]],
        at_once: int = 1,
    ) -> None:
        self.candidates = tuple(sorted(candidates))
        self._meter, self._known, self._measure, self._at_once = meter, known, measure, at_once
        self._settled: frozenset[Block] = frozenset()
        self._announced: list[list[Block]] = []

    def loss(self, layers: Iterable[Block]) -> Loss:
        """The loss with exactly ``layers`` replaced; raises :class:`CalibrationError` for one that is no number."""
        return self._loss(sorted(set(layers)), False, self._settled)

    def rough_loss(self, layers: Iterable[Block]) -> Loss:
        """As :meth:`loss`, on the first rows of the text alone: a fraction of the time.

        On all rows of a short text, and where sets are measured together: reading the weights takes the time then.
        """
        wanted = sorted(set(layers))
        if (name := _name(wanted, True)) not in self._known and self._meter().rough is self._meter():
            self._known.update({name: self._loss(wanted, False, frozenset())})
        return self._loss(wanted, True, frozenset())

    def announce(self, sets: Iterable[Iterable[Block]]) -> None:
        """Say which ``sets`` may be asked for: where that is less work, the first unknown one brings all of them."""
        self._announced = [sorted(set(layers)) for layers in sets]

    def settle(self, layers: Iterable[Block]) -> None:
        """Announce sets that add to ``layers``: the first unknown one makes the meter settle on ``layers``."""
        self._settled = frozenset(layers)

    def _loss(self, layers: list[Block], rough: bool, settled: frozenset[Block]) -> Loss:
        if (name := _name(layers, rough)) not in self._known:
            unknown = [w for w in self._announced if w != layers and _name(w, rough) not in self._known]
            sets = [layers, *unknown]
            if not self._meter().together:
                sets = sets[: self._at_once]
            losses = self._measure(sets, settled, rough)
            self._known.update({_name(w, rough): usable(x, w) for w, x in zip(sets, losses, strict=True)})
        return usable(self._known[name], layers)


def _name(layers: Sequence[Block], rough: bool) -> str:
    return ",".join(map(str, layers)) + " roughly" * rough


def measured_losses(
    meter: LossMeter,
    linear: Mapping[Block, Replacement],
    sets: Sequence[Sequence[Block]],
    settled: frozenset[Block] = frozenset(),
    roughly: bool = False,
) -> list[Loss]:
    """The losses of ``sets`` of the ``linear`` layers; if all add to ``settled``, the meter settles on those.

    ``roughly`` on the first rows of its text alone.
    """
    meter = meter.rough if roughly else meter
    if all(settled <= set(layers) for layers in sets):
        meter.settle(by_part({i: linear[i] for i in settled}))
    return meter.measure_all([by_part({i: linear[i] for i in layers}) for layers in sets])


def usable(loss: Loss, layers: Sequence[Block], changed: str = "replaced") -> Loss:
    """``loss``, if it is a number: NaN is smaller than nothing and would be taken for the best.

    Raises :class:`CalibrationError` naming the ``layers`` that were ``changed`` when it was measured.
    """
    if loss.finite:
        return loss
    named = f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers)) or 'none'}"
    raise CalibrationError(
        f"With {named} {changed}, the model's loss on the selection text is not a number (KL {loss.kl:g}, excess "
        f"{loss.excess:g}): choose other layers with --layers, or calibrate on more or other text."
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
    added = {block: usable(loss, [block]).kl for block, loss in singles.items()}
    added |= {span: sum(added.get(Span(i, i), 0.0) for i in span.layers) for span in longer}
    added = _to_scale(sets, added)
    chosen: tuple[Block, ...] = ()
    base = 0.0
    while nexts := _nexts(chosen, added):
        sets.settle(chosen)
        already = saved(chosen)
        savings = {block: saved(larger) - already for block, larger in nexts.items()}
        # What the blocks have added whose place a block takes: that much less is added by it.
        gone = {block: sum(added[b] for b in chosen if b not in larger) for block, larger in nexts.items()}
        bounds = {block: added[block] - gone[block] for block in nexts}
        order = sorted(nexts, key=lambda b: (per_saving(bounds[b], savings[b]), b))
        sets.announce(nexts[block] for block in order[:GREEDY_TRIES])
        totals: dict[Block, float] = {}
        rates: dict[Block, float] = {}
        for block in order:
            known = len(rates) == GREEDY_TRIES
            if rates and (known or per_saving(bounds[block], savings[block]) > min(rates.values())):
                break
            totals[block] = usable(sets.loss(nexts[block]), nexts[block]).kl
            rates[block] = per_saving(totals[block] - base, savings[block])
            added[block] = totals[block] - base + gone[block]
        best = min(rates, key=lambda b: (rates[b], totals[b], b))
        chosen, base = nexts[best], totals[best]
        yield chosen


def _to_scale(sets: MeasuredSets, rough: Mapping[Block, float]) -> dict[Block, float]:
    """``rough`` losses of single blocks as lower bounds of those on all rows; two small ones are measured there."""
    small = sorted((block for block in rough if rough[block] > 0), key=lambda b: (rough[b], b))[:2]
    sets.settle(())
    sets.announce([block] for block in small)
    exact = {block: sets.loss([block]).kl for block in small}
    scale = sum(exact.values()) / sum(rough[block] for block in small) if small else 1.0
    return {block: exact.get(block, kl * scale / _ROUGH) for block, kl in rough.items()}


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


def sensitivity(meter: LossMeter, layer: BlockModules[Block], energy: float) -> Loss:
    """The loss caused by noise with a share :data:`NOISE` of the layer's variance ``energy`` = E‖y - μ_y‖², divided by
    that share.

    The noise is white and the same in every run.
    """
    meter.settle({})
    loss = meter.measure_within(_noisy(meter.model, layer, NOISE * energy), layer_of(layer.index))
    loss = usable(loss, [layer.index], "made noisy")
    return Loss(*(value / NOISE for value in loss.as_json().values()))


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
