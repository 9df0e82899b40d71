"""The effect of changes of the closed-form fit and of the chosen layers on the loss, without gradients.

    python scripts/bench_fits.py OUT [--k K …]

OUT is an output folder of `nbl-export select` (or scripts/bench_quality.py). For the greedy order of its layers, the
script measures KL and excess (nats per token) on OUT's selection text of the K best with

share        linear layers fitted on a share of the calibration rows: shows the gain of more text
ridge        another ridge, times the diagonal of the input's covariance
scale        W scaled about its mean input: LMMSE shrinks the variance; subsequent layers may need more, or less
temperature  the linearized model's logits divided by T
lag          generalized least squares for residuals with correlation ρ from token to token: u_t - ρ u_(t-1) and
             y_t - ρ y_(t-1) are fitted, within rows
fisher       tokens weighted by a power of ‖g‖², with g the gradient at the attention's output of the likelihood of
             tokens sampled from the model: the second-order effect of an error there on the predictions
swap         the best exchange of one of the K layers for another one with a low single-layer loss

The first line of each K is the plain fit. The table is OUT/fits.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.blocks import Block, layer_of
from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.moments import LayerMoments, load_moments
from nbl_export.calibrate.text import load_text
from nbl_export.linearize.figures import Loss
from nbl_export.linearize.fits import WeightedSums, as_layer
from nbl_export.linearize.lmmse import branch_covariances, fit_lmmse
from nbl_export.linearize.loss import LossMeter
from nbl_export.linearize.plan import LinearLayer
from nbl_export.linearize.search import LossCache, MeasuredSets, Prefixes, greedy_path, single_layer_losses
from nbl_export.linearize.swap import replaced
from nbl_export.models.layers import attention_layers, hidden_size, observed
from nbl_export.models.loaded import LoadedModel
from nbl_export.models.source import same_model
from nbl_export.models.weights import dtype_of
from nbl_export.progress import Silent
from nbl_export.workspace import Workspace

Layers = Mapping[Block, LinearLayer]
SWAPPED_OUT, SWAPPED_IN = 3, 4  # number of candidates
FISHER_MOST = 30


def fitted(moments: Mapping[Block, LayerMoments], ridge: float = 1e-6) -> dict[Block, LinearLayer]:
    return {i: as_layer(fit_lmmse(m, "normed", ridge)) for i, m in moments.items()}


def scaled(linear: Layers, moments: Mapping[Block, LayerMoments], by: float) -> dict[Block, LinearLayer]:
    """W times ``by``, with the output at the mean input unchanged."""
    found = {}
    for i, m in linear.items():
        mean = (moments[i].x / moments[i].n).astype(np.float32)
        found[i] = LinearLayer(by * m.w, m.b + (1 - by) * (m.w @ mean))
    return found


def lagged_moments(model: torch.nn.Module, tokens: Any, rho: float) -> dict[Block, LayerMoments]:
    """Moments of x_t - ρ x_(t-1) and y_t - ρ y_(t-1) within rows, with float64 sums."""
    layers = attention_layers(model)
    found: dict[Block, LayerMoments] = {}

    def observe(index: int, _h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        dx, dy = ((t[:, 1:] - rho * t[:, :-1]).reshape(-1, t.shape[-1]).float() for t in (x, y))
        sums = {"x": dx.sum(0), "y": dy.sum(0), "xx": dx.T @ dx, "yx": dy.T @ dx, "yy": dy.T @ dy}
        new = {name: t.double().numpy() for name, t in sums.items()}
        before = found.get(index)
        if before is not None:
            new = {name: getattr(before, name) + t for name, t in new.items()}
        n = len(dx) + (before.n if before is not None else 0)
        found[index] = LayerMoments(n, h=new["x"], hh=new["xx"], yh=new["yx"], **new)

    with observed(model, layers, observe), torch.inference_mode():
        for row in tokens:
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    return found


def fisher_moments(
    model: Any, tokens: Any, powers: Sequence[float], wanted: Sequence[Block]
) -> dict[float, dict[Block, LayerMoments]]:
    """Moments of x and y with each token weighted by ‖g‖² to each of the powers, scaled to a mean weight of 1.

    A token's ‖g‖² comes from one sample, so it is clipped at FISHER_MOST medians of its row.
    """
    layers = tuple(layer for layer in attention_layers(model) if layer.index in wanted)
    sums = {(power, index): WeightedSums(hidden_size(model), model) for power in powers for index in wanted}
    generator = torch.Generator().manual_seed(0)
    seen: dict[Block, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(index: int, _h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        y.retain_grad()
        seen[index] = x, y

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embedded = model.get_input_embeddings().register_forward_hook(
        lambda _m, _a, y: y.detach().requires_grad_(True)
    )
    try:
        for row in tokens:
            with observed(model, layers, observe):
                ids = torch.from_numpy(row.astype(np.int64))[None]
                logits = model(input_ids=ids, use_cache=False).logits[0]
            gradient = torch.softmax(logits.detach().float(), dim=-1)
            drawn = torch.multinomial(gradient, 1, generator=generator)
            gradient.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=gradient.dtype))
            logits.backward(gradient.to(logits.dtype))
            for index, (x, y) in seen.items():
                assert y.grad is not None
                size = y.grad[0].float().square().sum(-1)
                size = size.clamp(max=FISHER_MOST * float(size.median()))
                for power in powers:
                    sums[power, index].add(x[0].detach(), y[0].detach(), size.double() ** power)
    finally:
        embedded.remove()
    return {power: {index: sums[power, index].result() for index in wanted} for power in powers}


def with_mean_of(linear: Layers, moments: Mapping[Block, LayerMoments]) -> dict[Block, LinearLayer]:
    """The same W, with the b that gives the correct mean output."""
    found = {}
    for i, m in linear.items():
        c = branch_covariances(moments[i], "normed")
        found[i] = LinearLayer(m.w, (c.mean_v - m.w.astype(np.float64) @ c.mean_u).astype(np.float32))
    return found


@contextmanager
def cooled(model: Any, temperature: float) -> Iterator[None]:
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _a, y: y / temperature)
    try:
        yield
    finally:
        hook.remove()


def best_swap(sets: MeasuredSets, chosen: list[Block]) -> tuple[str, Loss]:
    """The best single exchange, and its loss."""
    singles = single_layer_losses(sets)
    gone = sorted(chosen, key=lambda i: sets.loss(set(chosen) - {i}).kl)[:SWAPPED_OUT]
    left = sorted((i for i in sets.candidates if i not in chosen), key=lambda i: singles[i].kl)[:SWAPPED_IN]
    tried: dict[str, Loss] = {}
    for out in gone:
        rest = set(chosen) - {out}
        sets.settle(rest)
        tried |= {f"{out} for {i}": sets.loss(rest | {i}) for i in left}
    best = min(tried, key=lambda name: tried[name].kl)
    return best, tried[best]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 12])
    arguments = parser.parse_args()
    workspace = Workspace.open(arguments.out)
    info = workspace.model_info
    assert info is not None
    model = LoadedModel(same_model(info), Silent()).in_dtype("auto")
    text = load_text(workspace.text)
    moments = load_moments(workspace.moments)[0].layers
    meter = LossMeter(model, text.selection, text.selection_document, "normed")
    plain = fitted(moments)
    sets = MeasuredSets(lambda: meter, plain, LossCache({}, lambda _: None))
    order = list(Prefixes(greedy_path(sets, single_layer_losses(sets)))(max(arguments.k)))
    wanted = {i: moments[i] for i in order}
    variants: dict[str, Layers] = {"plain": plain}
    rows = text.calibration
    for share in (8, 4, 2):
        fewer = collect_moments(model, rows[: len(rows) // share]).layers
        variants[f"share 1/{share}"] = fitted({i: fewer[i] for i in order})
    variants |= {f"ridge {ridge:g}": fitted(wanted, ridge) for ridge in (1e-4, 1e-3, 1e-2)}
    variants |= {
        f"scale {by}": scaled({i: plain[i] for i in order}, moments, by) for by in (0.8, 0.9, 1.1, 1.2)
    }
    for rho in (0.2, 0.5):
        lagged = lagged_moments(model, rows, rho)
        variants[f"lag ρ = {rho}"] = with_mean_of(fitted({i: lagged[i] for i in order}), moments)
    weighted = fisher_moments(model, rows, (0.5, 1.0), order)
    variants |= {f"fisher^{power:g}": fitted(found) for power, found in weighted.items()}
    lines = ["| K | change | KL | excess |", "| --- | --- | --- | --- |"]

    def add(k: int, name: str, loss: Loss) -> None:
        lines.append(f"| {k} | {name} | {loss.kl:.4f} ± {loss.kl_se:.4f} | {loss.excess:.4f} |")
        print(lines[-1], flush=True)

    def loss_of(linear: Layers, k: int, change: AbstractContextManager[Any]) -> Loss:
        meter.settle({})
        with change:
            chosen = {i: linear[i] for i in order[:k]}
            return meter.measure_within(replaced(model, chosen, "normed"), layer_of(min(chosen)))

    for k in arguments.k:
        for name, linear in variants.items():
            add(k, name, loss_of(linear, k, nullcontext()))
        for temperature in (0.95, 1.05):
            add(k, f"temperature {temperature}", loss_of(plain, k, cooled(model, temperature)))
        swap, loss = best_swap(sets, order[:k])
        add(k, f"swap {swap}", loss)
    caption = f"{info['source']}, layers {' '.join(map(str, order))}; {dtype_of(model)}."
    (arguments.out / "fits.md").write_text("\n".join([*lines, "", caption, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
