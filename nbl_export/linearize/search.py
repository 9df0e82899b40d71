"""Which layers to linearize, by what replacing them was measured to cost.

Every criterion gives an order, best layer first; the K best are its beginning, so one order serves every K.

kl         KL of the model with that layer alone replaced
drop       the same with the layer left out (W = 0, b = 0): the baseline that users know as layer dropping
linearity  the layer's own error times a measured sensitivity (arXiv 2411.17525): the perplexity's increase is
           predicted as Σ α_l t_l², with t_l² the share of layer l's output that the fit misses (its NMSE) and α_l
           the KL by noise of a known share: what ln perplexity rises by on text of the model's own, without the
           chance of which words came
greedy     one layer after the other, each the one that costs least given those taken

Greedy search is lazy: what a layer adds to the loss mostly grows as others are taken, so a layer's last known
addition bounds its next one from below, and layers whose bound is above the best addition found need no run. Ties go to
the lower layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nbl_export.linearize.figures import Loss
from nbl_export.linearize.loss import LossMeter
from nbl_export.linearize.plan import LinearLayer
from nbl_export.models.layers import AttentionLayer

# The share of a layer's output that is noise when its sensitivity is measured: about what fits miss. The theorem is
# about small errors, but a twentieth of the output drowned in the rounding of bfloat16, and ranked layers by chance.
NOISE = 0.5
# Additions measured for each layer that greedy search takes, at most.
GREEDY_TRIES = 8


class LossCache:
    """Losses by name, each measured once, ever: ``record`` keeps them, ``known`` gives them back."""

    def __init__(
        self,
        known: Mapping[str, Mapping[str, float]],
        record: Callable[[Mapping[str, Mapping[str, float]]], None],
    ) -> None:
        # A loss that is no number is kept as text: JSON has none.
        self._known = {
            name: Loss(**{key: float(figure) for key, figure in value.items()})
            for name, value in known.items()
        }
        self._record = record

    def get(self, name: str, measure: Callable[[], Loss]) -> Loss:
        if name not in self._known:
            self._known[name] = measure()
            self._record({key: value.as_json() for key, value in self._known.items()})
        return self._known[name]


class MeasuredSets:
    """The losses of sets of layers, all replaced by their ``maps``, from a cache or measured.

    The ``meter`` is made when something is measured for the first time.
    """

    def __init__(
        self, meter: Callable[[], LossMeter], maps: Mapping[int, LinearLayer], cache: LossCache
    ) -> None:
        self._meter, self._maps, self._cache = meter, maps, cache
        self._wanted: frozenset[int] = frozenset()

    @property
    def candidates(self) -> tuple[int, ...]:
        return tuple(sorted(self._maps))

    def loss(self, layers: Iterable[int]) -> Loss:
        """The loss with exactly ``layers`` replaced."""
        wanted = sorted(set(layers))
        return self._cache.get(",".join(map(str, wanted)), lambda: self._measure(wanted))

    def settle(self, layers: Iterable[int]) -> None:
        """Sets that add to ``layers`` come next: the first that is not known yet makes the meter settle there."""
        self._wanted = frozenset(layers)

    def _measure(self, layers: Sequence[int]) -> Loss:
        meter = self._meter()
        if self._wanted <= set(layers):
            meter.settle({i: self._maps[i] for i in self._wanted})
        return meter.measure({i: self._maps[i] for i in layers})


def alone(sets: MeasuredSets) -> dict[int, Loss]:
    """The loss of each layer replaced alone."""
    return {layer: sets.loss([layer]) for layer in sets.candidates}


def greedy_order(sets: MeasuredSets, singles: Mapping[int, Loss], count: int) -> list[int]:
    """The first ``count`` layers, each the one whose addition costs least KL given those before it."""
    bounds = {layer: loss.kl for layer, loss in singles.items()}
    chosen: list[int] = []
    base = 0.0
    while len(chosen) < count:
        sets.settle(chosen)
        totals: dict[int, float] = {}
        for layer in sorted(bounds, key=lambda i: (bounds[i], i)):
            if totals and (base + bounds[layer] > min(totals.values()) or len(totals) == GREEDY_TRIES):
                break
            totals[layer] = sets.loss([*chosen, layer]).kl
            bounds[layer] = totals[layer] - base
        best = min(totals, key=lambda i: (totals[i], i))
        chosen.append(best)
        base = totals[best]
        del bounds[best]
    return chosen


def sensitivity(meter: LossMeter, layer: AttentionLayer, energy: float) -> Loss:
    """The loss for noise of the share :data:`NOISE` of the layer's variance ``energy`` = E‖y - μ_y‖², by that share.

    The noise is white and the same in every run.
    """
    meter.settle({})
    loss = meter.measure_within(_noisy(meter.model, layer, NOISE * energy), layer.index)
    return Loss(*(value / NOISE for value in loss.as_json().values()))


@contextmanager
def _noisy(model: torch.nn.Module, layer: AttentionLayer, energy: float) -> Iterator[None]:
    generator = torch.Generator().manual_seed(layer.index)

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
