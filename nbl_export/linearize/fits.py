"""The methods to fit W and b, by name.

lmmse       the linear minimum mean squared error fit on the original model's activations (the paper's method)
weighted    the same with each token weighted by 1 / ‖h‖² of its residual stream, so that outlier tokens, which have
            up to 10⁴ times the median energy, do not dominate; no token has more than 10 times the weight of the median
            one, so that those of next to no energy, such as a zero row of the embedding, do not dominate either
sequential  layer by layer: the input is that of the model with the previous layers linearized, the target is the
            output of the original attention
drop        the block is dropped: no fit, but the baseline of all fits

The first needs only the moments; the second and the third need another pass over the calibration text, which reads the
weights once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from nbl_export.batch import TOKENS
from nbl_export.blocks import ATTENTION, Block, layer_of
from nbl_export.calibrate.collect import States, moments_of
from nbl_export.calibrate.moments import Accumulator, LayerMoments, Moments
from nbl_export.errors import InputError
from nbl_export.linearize.lmmse import LinearFit, branch_covariances, constant_direction
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.linearize.swap import replaced
from nbl_export.models.candidates import block_modules
from nbl_export.models.layers import hidden_size
from nbl_export.models.running import observed
from nbl_export.models.walk import Batch, Step, segments, walking
from nbl_export.models.weights import device_of
from nbl_export.progress import Listener
from nbl_export.settings.choices import FitInput

Solve = Callable[[Block, LayerMoments], LinearFit]
Advance = Callable[[int], None]
_BATCH_ROWS = 2
# No token weighs more than this many times the median one.
_MOST_WEIGHT = 10.0


def as_layer(fit: LinearFit) -> LinearLayer:
    """A fit as float32, the precision of plans."""
    return LinearLayer(fit.w.astype(np.float32), fit.b.astype(np.float32))


def weighted_moments(
    model: torch.nn.Module,
    tokens: Any,
    fit_input: FitInput,
    listener: Listener | None = None,
    parts: Collection[str] = (ATTENTION,),
) -> Iterator[tuple[Block, LayerMoments]]:
    """Each attention, MLP and span, as ``parts`` say, and its moments over ``tokens`` [rows, seq].

    Each token is weighted by 1 / ‖h‖². The median token, which bounds the weights, is that of the first rows. The
    weights of each block are read once.
    """
    sums = partial(WeightedSums, fit_input)
    return moments_of(
        model, tokens, parts, listener, task="Weighing tokens", accumulator=sums, batch_rows=_BATCH_ROWS
    )


def sequential_fits(
    model: torch.nn.Module,
    tokens: Any,
    chosen: Sequence[Block],
    fit_input: FitInput,
    solve: Solve,
    advance: Advance,
) -> dict[Block, LinearLayer]:
    """The linear layers of ``chosen``, each fitted after the previous ones are linearized, over ``tokens`` [rows, seq].

    Both models process the text together, block by block: the weights of each block up to the last of ``chosen`` are
    read once, and the states of the two models take 2 × tokens × d values, in memory where they have room, else in
    files. ``solve`` must not run the model.
    """
    order = sorted(chosen)
    fitted: dict[Block, LinearLayer] = {}
    device = device_of(model)
    batches: list[Batch] = [
        {TOKENS: torch.from_numpy(tokens[at : at + _BATCH_ROWS].astype(np.int64)).to(device)}
        for at in range(0, len(tokens), _BATCH_ROWS)
    ]

    def states() -> States:
        return States(model, range(len(batches)), batches[0][TOKENS].numel() * hidden_size(model))

    original = changed = states()
    with torch.inference_mode(), walking(model) as run:
        for part in (part for part in segments(model) if part.start <= layer_of(order[-1])):
            inside = [index for index in order if part.start <= layer_of(index) < part.stop]
            before: dict[Block, LinearLayer] = {}
            with run(part) as step:
                for index in inside:
                    sums = WeightedSums(fit_input, [index], hidden_size(model), device_of(model))
                    for number, batch in enumerate(batches):
                        _, _, y = _seen(model, index, step, batch, original.get(number))
                        with replaced(model, before, fit_input):
                            h, x, _ = _seen(model, index, step, batch, changed.get(number))
                        u = x if fit_input == "normed" else h
                        sums.weigh(
                            index, u, y, torch.ones(u.shape[:-1], dtype=torch.float64, device=u.device)
                        )
                        advance(batch[TOKENS].numel())
                    before[index] = as_layer(solve(*next(sums.results())))
                fitted |= before
                if order[-1] in before:
                    break
                if fitted:
                    was, changed = changed, states() if changed is original else changed
                    with replaced(model, before, fit_input):
                        _pass(step, batches, was, changed)
                _pass(step, batches, original, original)
    return fitted


def _pass(step: Step, batches: Sequence[Batch], before: States, after: States) -> None:
    """Run all ``batches`` through a part, from their states ``before`` it to those ``after``."""
    for number, batch in enumerate(batches):
        after.put(number, step(batch, before.get(number)))
    after.turn()


class _Seen(Exception):
    """Raised to end a run when the layer has been seen."""


def _seen(
    model: torch.nn.Module, index: Block, step: Step, batch: Batch, states: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, x and y of layer ``index``, which the ``step`` runs."""
    seen: list[torch.Tensor] = []

    def take(_index: Block, *activations: torch.Tensor) -> None:
        seen.extend(activations)
        raise _Seen

    with suppress(_Seen), observed(model, (block_modules(model, index),), take):
        step(batch, states)
    h, x, y = seen
    return h, x, y


class WeightedSums(Accumulator):
    """Weighted sums of u (x or h, as ``fit_input`` says), y and their products; those are full matrices."""

    arrays = ("x", "y", "xx", "yx", "yy")

    def __init__(self, fit_input: FitInput, blocks: Iterable[Block], *of: Any) -> None:
        super().__init__(blocks, *of)
        self._normed, self._least, self._mass = (
            fit_input == "normed",
            dict[Block, float](),
            dict.fromkeys(self.sums, 0.0),
        )

    def add(self, block: Block, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens, each weighted by 1 / ‖h‖²; those that are added first have the median one."""
        energy = h.double().square().sum(-1)
        if block not in self._least:
            some = energy[energy > 0]
            self._least[block] = (float(some.median()) if len(some) else 1.0) / _MOST_WEIGHT
        self.weigh(block, x if self._normed else h, y, energy.clamp_min(self._least[block]).reciprocal())

    def weigh(self, block: Block, u: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Add tokens: ``u``, ``y`` [..., d] and ``weight`` [...]."""
        u, y = (t.reshape(-1, t.shape[-1]).double() for t in (u, y))
        weight = weight.reshape(-1, 1)
        weighted_u, weighted_y = u * weight, y * weight
        s = self.sums[block]
        s["n"] += len(u)
        self._mass[block] += float(weight.sum())
        s["x"] += weighted_u.sum(0)
        s["y"] += weighted_y.sum(0)
        s["xx"].addmm_(weighted_u.T, u)
        s["yx"].addmm_(weighted_y.T, u)
        s["yy"].addmm_(weighted_y.T, y)

    def moments(self, block: Block, n: int, sums: Mapping[str, torch.Tensor]) -> LayerMoments:
        """The moments with the weights scaled to a mean of 1; u is stored as both x and h."""
        scale = n / self._mass[block]
        found = {name: (scale * value).cpu().numpy() for name, value in sums.items()}
        return LayerMoments(n, **found, h=found["x"], hh=found["xx"], yh=found["yx"])


def without_bias(plan: Plan, moments: Moments) -> Plan:
    """``plan`` with W₀ in the place of each W, and b = 0. Raises :class:`InputError` without a layer's moments."""
    layers: Mapping[Block, LayerMoments] = moments.layers
    if gone := [block for block in plan.layers if block not in layers]:
        raise InputError(f"There are no moments of layer {gone[0]}: run `nbl-export calibrate` again.")
    made = {}
    for block, one in plan.layers.items():
        v = constant_direction(branch_covariances(layers[block], plan.fit_input))
        w = one.w + np.outer(one.b, v)
        made[block] = LinearLayer(w.astype(np.float32), np.zeros_like(one.b))
    return replace(plan, layers=made, rank=None, ranks={})
