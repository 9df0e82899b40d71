"""The ways to fit W and b, by name.

lmmse       the linear minimum mean squared error fit on the original model's activations (the paper's)
weighted    the same with each token weighted by 1 / ‖h‖² of its residual stream, so that outlier tokens, which carry
            up to 10⁴ times the median energy there, do not decide alone
sequential  layer after layer, each on what it reads behind the linearized ones before it; its target is what the
            original's attention wrote
drop        W = 0 and b = 0: the layer is left out; no fit, but the baseline of all fits

The first needs the moments alone, the second and the third one more pass over the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from nbl_export.calibrate.moments import LayerMoments
from nbl_export.linearize.lmmse import FitInput, LinearFit
from nbl_export.linearize.plan import LinearLayer
from nbl_export.linearize.swap import replaced
from nbl_export.models.layers import attention_layer, attention_layers, hidden_size, observed
from nbl_export.models.partial_forward import Reached, backbone, run_between

Solve = Callable[[int, LayerMoments], LinearFit]
Advance = Callable[[int], None]
_BATCH_ROWS = 2


def as_layer(fit: LinearFit) -> LinearLayer:
    """A fit in the precision that plans and graphs have."""
    return LinearLayer(fit.w.astype(np.float32), fit.b.astype(np.float32))


def dropped(d: int) -> LinearLayer:
    """The map of a layer that is left out."""
    return LinearLayer(np.zeros((d, d), np.float32), np.zeros(d, np.float32))


def weighted_moments(
    model: torch.nn.Module, tokens: Any, fit_input: FitInput, advance: Advance
) -> dict[int, LayerMoments]:
    """The moments of every attention layer over ``tokens`` [rows, seq], each token weighted by 1 / ‖h‖²."""
    layers = attention_layers(model)
    sums = {layer.index: WeightedSums(hidden_size(model), model) for layer in layers}

    def observe(index: int, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        weight = h.double().square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny).reciprocal()
        sums[index].add(x if fit_input == "normed" else h, y, weight)

    with observed(model, layers, observe), torch.inference_mode():
        for ids in _batches(model, tokens):
            backbone(model)(input_ids=ids, use_cache=False)
            advance(ids.numel())
    return {index: total.result() for index, total in sums.items()}


def sequential_fits(
    model: torch.nn.Module,
    tokens: Any,
    chosen: Sequence[int],
    fit_input: FitInput,
    solve: Solve,
    advance: Advance,
) -> dict[int, LinearLayer]:
    """The maps of ``chosen``, each fitted behind those before it, over ``tokens`` [rows, seq].

    Both models go through the text together, layer by layer; their states take 2 × tokens × d numbers.
    """
    order = sorted(chosen)
    maps: dict[int, LinearLayer] = {}
    ids = list(_batches(model, tokens))
    with torch.inference_mode():
        original = [run_between(model, batch, end=order[0]) for batch in ids]
        changed = list(original)
        for index, following in zip(order, [*order[1:], None], strict=True):
            sums = WeightedSums(hidden_size(model), model)
            for number, batch in enumerate(ids):
                _, _, y, original[number] = _seen(model, batch, index, original[number], following)
                h, x, _, _ = _seen(model, batch, index, changed[number], index)
                u = x if fit_input == "normed" else h
                sums.add(u, y, torch.ones(u.shape[:-1], dtype=torch.float64, device=u.device))
            maps[index] = as_layer(solve(index, sums.result()))
            with replaced(model, {index: maps[index]}, fit_input):
                for number, batch in enumerate(ids):
                    if following is not None:
                        start = (index, _there(changed[number]))
                        changed[number] = run_between(model, batch, start, following)
                    advance(batch.numel())
    return maps


def _seen(
    model: torch.nn.Module, ids: torch.Tensor, index: int, states: torch.Tensor | None, end: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """h, x and y of layer ``index``, whose input is ``states``, and the input of layer ``end`` after it.

    Where both are the same layer, or nothing comes after, the run ends when y is written.
    """
    seen: list[torch.Tensor] = []

    def take(_index: int, *activations: torch.Tensor) -> None:
        seen.extend(activations)
        if end in (None, index):
            raise Reached

    with observed(model, (attention_layer(model, index),), take):
        after = run_between(model, ids, (index, _there(states)), None if end == index else end)
    h, x, y = seen
    return h, x, y, after


def _there(states: torch.Tensor | None) -> torch.Tensor:
    assert states is not None  # only the last layer's run reaches no other layer
    return states


class WeightedSums:
    """Sums of u, y and their products, a weight for each token, float64; symmetric products whole."""

    def __init__(self, d: int, model: torch.nn.Module) -> None:
        self.tokens, self.mass = 0, 0.0

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=next(model.parameters()).device)

        self.u, self.y = zeros(d), zeros(d)
        self.uu, self.yu, self.yy = zeros(d, d), zeros(d, d), zeros(d, d)

    def add(self, u: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Add tokens: ``u``, ``y`` [..., d] and ``weight`` [...]."""
        u, y = (t.reshape(-1, t.shape[-1]).double() for t in (u, y))
        weight = weight.reshape(-1, 1)
        heavy_u, heavy_y = u * weight, y * weight
        self.tokens += len(u)
        self.mass += float(weight.sum())
        self.u += heavy_u.sum(0)
        self.y += heavy_y.sum(0)
        self.uu.addmm_(heavy_u.T, u)
        self.yu.addmm_(heavy_y.T, u)
        self.yy.addmm_(heavy_y.T, y)

    def result(self) -> LayerMoments:
        """As if each token had counted once: the weights scaled to a mean of 1; u stands for both inputs."""
        scale = self.tokens / self.mass
        u, y, uu, yu, yy = ((scale * t).cpu().numpy() for t in (self.u, self.y, self.uu, self.yu, self.yy))
        return LayerMoments(self.tokens, x=u, h=u, y=y, xx=uu, yx=yu, yy=yy, hh=uu, yh=yu)


def _batches(model: torch.nn.Module, tokens: Any) -> Iterator[torch.Tensor]:
    device = next(model.parameters()).device
    for at in range(0, len(tokens), _BATCH_ROWS):
        yield torch.from_numpy(tokens[at : at + _BATCH_ROWS].astype(np.int64)).to(device)
