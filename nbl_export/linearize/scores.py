"""Score and rank the layers: the K best are the first K. Refuse what cannot be asked of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from nbl_export.blocks import (
    ATTENTION,
    LONGEST_SPAN,
    MLP,
    PARTS,
    SPAN,
    Block,
    Span,
    all_parts,
    described,
    layer_of,
    part_of,
)
from nbl_export.calibrate.moments import LayerMoments
from nbl_export.errors import CalibrationError, InputError
from nbl_export.linearize.lmmse import UnusableMoments, cca_bound, fit_lmmse
from nbl_export.linearize.selection import Candidate, Loss, per_saving
from nbl_export.progress import Listener
from nbl_export.settings import SelectSettings
from nbl_export.settings.choices import FitInput


@dataclass(frozen=True)
class Criterion:
    """``score`` is the field that ranks the layers, ``measures`` what runs of the model find of a layer alone.

    ``searched``: sets of layers are measured, too.
    """

    score: str
    measures: str | None = None
    searched: bool = False


# To add a criterion that ranks layers, add a row; lower is better.
CRITERIA: Mapping[str, Criterion] = {
    "greedy": Criterion("kl", "kl", searched=True),
    "kl": Criterion("kl", "kl"),
    "linearity": Criterion("predicted", "sensitivity"),
    "nmse": Criterion("nmse"),
    "cca": Criterion("cca"),
    "drop": Criterion("drop", "drop"),
}


def with_loss(candidate: Candidate, what: str, loss: Loss) -> Candidate:
    """``candidate`` with the ``loss`` that was measured of ``what`` a criterion measures."""
    predicted = loss.kl * candidate.nmse if what == "sensitivity" else candidate.predicted
    found: dict[str, Any] = {what: loss.kl, f"{what}_se": loss.kl_se, "predicted": predicted}
    return replace(candidate, synthetic=loss.synthetic or None, **found)


def score_layers(
    layers: Iterable[Block],
    ridge: float,
    listener: Listener,
    score: Callable[[Sequence[Block]], Sequence[Candidate]],
    at_once: int = 1,
) -> tuple[Candidate, ...]:
    """Fit and score every layer, ascending, by ``score`` of ``at_once`` layers (:func:`score_layer` of each)."""
    order, candidates = sorted(layers), []
    with listener.task("Scoring layers", len(order), "layers") as task:
        for at in range(0, len(order), at_once):
            for candidate in score(order[at : at + at_once]):
                candidates.append(candidate)
                for what, used in (("fit", candidate.ridge), ("CCA bound", candidate.cca_ridge)):
                    if used != ridge:
                        listener.note(
                            f"Layer {candidate.layer}: the {what} needed a ridge of {used:g} instead of {ridge:g}."
                        )
                task.advance(1)
    return tuple(candidates)


def score_layer(moments: LayerMoments, layer: Block, fit_input: FitInput, ridge: float) -> Candidate:
    """Fit and score one layer; raises :class:`CalibrationError` naming it if it cannot be fitted."""
    with naming(layer):
        fit = fit_lmmse(moments, fit_input, ridge)
        cca, cca_ridge = cca_bound(moments, ridge)
    return Candidate(layer, fit.nmse, _finite(cca, layer, "CCA bound"), fit.ridge, cca_ridge)


_PLURAL = {ATTENTION: "attention layers", MLP: "MLPs", SPAN: "spans"}


def check_selection(
    settings: SelectSettings,
    layers: Sequence[Block],
    d: int | None,
    others: Mapping[str, str] | None = None,
) -> None:
    """Refuse what a model with these candidate ``layers`` and width ``d`` cannot be asked, before any work.

    ``others`` says what its other layers are, by index; without ``d``, the width is not known yet.
    """
    odd = {
        "--fit sequential": settings.fit == "sequential",
        "--fit-input residual": settings.fit_input == "residual",
        "--criterion linearity": settings.criterion == "linearity",
    }
    found = next((option for option, given in odd.items() if given), None)
    if found and any(isinstance(block, Span) for block in layers):
        raise InputError(
            f"{found} is for attentions and MLPs, and the moments are also of spans of layers: leave it out, or "
            "calibrate with --blocks both."
        )
    if settings.layers is not None:
        _check_layers(layers, settings.layers, others or {})
    elif settings.k is not None and settings.k > len(parts := all_parts(layers)):
        named = [_PLURAL[part] for part in PARTS if any(part_of(one) == part for one in parts)]
        raise InputError(
            f"--k is {settings.k}; it must be between 0 and {len(parts)} (the model's {' and '.join(named)})."
        )
    if settings.rank is not None and d is not None and 2 * settings.rank >= d:
        raise InputError(
            f"--rank is {settings.rank}; two factors of that rank are not smaller than W of a model of width {d}: give "
            f"less than {-(-d // 2)}, or leave --rank out."
        )


def _check_layers(candidates: Sequence[Block], layers: Sequence[Block], others: Mapping[str, str]) -> None:
    unknown = min(set(layers) - set(candidates), default=None)
    if unknown is None:
        return
    part = part_of(unknown)
    there = sorted(block for block in candidates if part_of(block) == part)
    if not there:
        raise InputError(
            f"--layers names {described(unknown)}, and there are no moments of {_PLURAL[part]}: "
            f"calibrate with --blocks {'all' if part == SPAN else 'both'}."
        )
    if part == SPAN:
        raise InputError(
            f"--layers names {unknown}, which is not among the spans with moments: these have up to "
            f"{LONGEST_SPAN} of the layers {', '.join(map(str, sorted({layer_of(b) for b in there})))}."
        )
    what = f", which cannot be linearized ({others[str(unknown)]})" if str(unknown) in others else ""
    raise InputError(
        f"--layers names {described(unknown)}{what}; the layers that can be are {', '.join(map(str, there))}."
    )


def ranking(
    candidates: Sequence[Candidate], criterion: str, saved: Callable[[Block], float] = lambda _: 1.0
) -> list[Candidate]:
    """All candidates, best first, by their score for what each has ``saved``; ties go to the lower layer.

    Raises :class:`CalibrationError` naming one whose score is no number.
    """

    def key(candidate: Candidate) -> tuple[float, Block]:
        value = _finite(
            getattr(candidate, CRITERIA[criterion].score), candidate.layer, f"score by {criterion}"
        )
        return per_saving(value, saved(candidate.layer)), candidate.layer

    return sorted(candidates, key=key)


def _finite(value: float, layer: Block, what: str) -> float:
    if not math.isfinite(value):
        raise CalibrationError(
            f"Layer {layer} cannot be ranked: its {what} is {value:g}: calibrate on more or other text."
        )
    return value


def predicted_excess(candidates: Sequence[Candidate], chosen: Sequence[Block]) -> float | None:
    """The excess of the ``chosen`` layers predicted by the linearity theorem: the sum of their ``predicted`` scores.

    In nats per token; None if sensitivities were not measured.
    """
    scores = [c.predicted for c in candidates if c.layer in chosen]
    return sum(p for p in scores if p is not None) if scores and None not in scores else None


@contextmanager
def naming(layer: Block) -> Iterator[None]:
    """Within the block, add the number of the ``layer`` to the error for moments that cannot be fitted."""
    try:
        yield
    except UnusableMoments as error:
        raise CalibrationError(f"Layer {layer} cannot be linearized: {error}.") from error
