"""Score and rank the layers: the K best are the first K."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
from nbl_export.calibrate.moments import Moments
from nbl_export.errors import CalibrationError, InputError
from nbl_export.linearize.figures import Candidate, per_saving
from nbl_export.linearize.lmmse import (
    UnusableMoments,
    cca_bound,
    fit_lmmse,
)
from nbl_export.progress import Listener, Silent
from nbl_export.settings import SelectSettings
from nbl_export.settings.choices import DEFAULT_RIDGE, FitInput


@dataclass(frozen=True)
class Criterion:
    """``score`` ranks the layers; ``measured``: it needs runs of the model; ``searched``: with sets of layers."""

    score: Callable[[Candidate], float | None]
    measured: bool = False
    searched: bool = False


# To add a criterion that ranks layers, add a row; lower is better.
CRITERIA: Mapping[str, Criterion] = {
    "greedy": Criterion(lambda c: c.kl, measured=True, searched=True),
    "kl": Criterion(lambda c: c.kl, measured=True),
    "linearity": Criterion(lambda c: c.predicted, measured=True),
    "nmse": Criterion(lambda c: c.nmse),
    "cca": Criterion(lambda c: c.cca),
    "drop": Criterion(lambda c: c.drop, measured=True),
}


def score_layers(
    moments: Moments,
    fit_input: FitInput = "normed",
    ridge: float = DEFAULT_RIDGE,
    listener: Listener | None = None,
    score: Callable[[Sequence[Block]], Sequence[Candidate]] | None = None,
    at_once: int = 1,
) -> tuple[Candidate, ...]:
    """Fit and score every layer; raises :class:`CalibrationError` naming a layer that cannot be fitted.

    ``score`` does it for ``at_once`` layers; without it they are scored here, by :func:`score_layer`.
    """
    listener = Silent() if listener is None else listener
    layers, candidates = sorted(moments.layers), []
    with listener.task("Scoring layers", len(layers), "layers") as task:
        for at in range(0, len(layers), at_once):
            some = layers[at : at + at_once]
            scored = score(some) if score else [score_layer(moments, i, fit_input, ridge) for i in some]
            for candidate in scored:
                candidates.append(candidate)
                for what, used in (("fit", candidate.ridge), ("CCA bound", candidate.cca_ridge)):
                    if used != ridge:
                        listener.note(
                            f"Layer {candidate.layer}: the {what} needed a ridge of {used:g} instead of {ridge:g}."
                        )
                task.advance(1)
    return tuple(candidates)


def score_layer(moments: Moments, layer: Block, fit_input: FitInput, ridge: float) -> Candidate:
    """Fit and score one layer; raises :class:`CalibrationError` naming it if it cannot be fitted."""
    with naming(layer):
        own = moments.layers[layer]  # once: it is read from a file
        fit = fit_lmmse(own, fit_input, ridge)
        cca, cca_ridge = cca_bound(own, ridge)
    _finite(fit.nmse, layer, "error")
    _finite(cca, layer, "CCA bound")
    return Candidate(layer, fit.nmse, cca, fit.ridge, cca_ridge)


_PLURAL = {ATTENTION: "attention layers", MLP: "MLPs", SPAN: "spans"}


def check_layers(
    candidates: Sequence[Block],
    layers: Sequence[Block],
    others: Mapping[str, str] | None = None,
) -> None:
    """Refuse ``layers``, named by the user, of which one is no candidate: :class:`InputError`.

    ``others`` says what the model's other layers are, by index.
    """
    if unknown := sorted(set(layers) - set(candidates)):
        if not any(part_of(unknown[0]) == part_of(block) for block in candidates):
            raise InputError(
                f"--layers names {described(unknown[0])}, and there are no moments of {_PLURAL[part_of(unknown[0])]}: "
                f"calibrate with --blocks {'all' if part_of(unknown[0]) == SPAN else 'both'}."
            )
        candidates = [block for block in candidates if part_of(block) == part_of(unknown[0])]
        there, what = sorted(candidates), (others or {}).get(str(unknown[0]))
        if what:
            raise InputError(
                f"--layers names {described(unknown[0])}, which cannot be linearized ({what}); the layers that can be "
                f"are {', '.join(map(str, there))}."
            )
        if part_of(unknown[0]) == SPAN:
            raise InputError(
                f"--layers names {unknown[0]}, which is not among the spans with moments: these have up to "
                f"{LONGEST_SPAN} of the layers {', '.join(map(str, sorted({layer_of(b) for b in there})))}."
            )
        whole = there == list(range(len(there)))
        have = (
            f"layers 0 to {there[-1]}"
            if whole
            else f"{part_of(there[0])} layers {', '.join(map(str, there))}"
        )
        raise InputError(f"--layers names {described(unknown[0])}; the model has {have}.")


def check_rank(rank: int, d: int | None) -> None:
    """Refuse a rank whose factors are not smaller than W in a model of width ``d`` (None: not known yet).

    Raises :class:`InputError`.
    """
    if rank < 1:
        raise InputError(f"--rank is {rank}; it must be 1 or more.")
    if d is not None and 2 * rank >= d:
        raise InputError(
            f"--rank is {rank}; two factors of that rank are not smaller than W of a model of width {d}: give less "
            f"than {-(-d // 2)}, or leave --rank out."
        )


def check_k(k: int, candidates: Iterable[Block]) -> None:
    """Refuse a K larger than the number of attentions and MLPs in the ``candidates``."""
    parts = all_parts(candidates)
    if not 0 <= k <= len(parts):
        named = [_PLURAL[part] for part in PARTS if any(part_of(one) == part for one in parts)]
        raise InputError(
            f"--k is {k}; it must be between 0 and {len(parts)} (the model's {' and '.join(named)})."
        )


def check_selection(
    settings: SelectSettings,
    layers: Sequence[Block],
    d: int | None,
    others: Mapping[str, str] | None = None,
) -> None:
    """Refuse what a model with these candidate ``layers`` and width ``d`` cannot be asked, before any work.

    ``others`` says what its other layers are, by index; without ``d``, the width is not known yet.
    """
    check_fit(settings, layers)
    if settings.layers is not None:
        check_layers(layers, settings.layers, others)
    elif settings.k is not None:
        check_k(settings.k, layers)
    if settings.rank is not None:
        check_rank(settings.rank, d)


def check_fit(settings: SelectSettings, candidates: Iterable[Block]) -> None:
    """Refuse a fit or a criterion that there is not for spans, if there are any among the ``candidates``."""
    if not any(isinstance(block, Span) for block in candidates):
        return
    odd = {
        "--fit sequential": settings.fit == "sequential",
        "--fit-input residual": settings.fit_input == "residual",
        "--criterion linearity": settings.criterion == "linearity",
    }
    if found := next((option for option, given in odd.items() if given), None):
        raise InputError(
            f"{found} is for attentions and MLPs, and the moments are also of spans of layers: leave it out, or "
            "calibrate with --blocks both."
        )


def check_criterion(criterion: str) -> Criterion:
    """The criterion with that name; refuses an unknown one."""
    if criterion not in CRITERIA:
        raise InputError(f"--criterion {criterion!r} is unknown; choose one of {', '.join(CRITERIA)}.")
    return CRITERIA[criterion]


def ranking(
    candidates: Sequence[Candidate], criterion: str, saved: Callable[[Block], float] = lambda _: 1.0
) -> list[Candidate]:
    """All candidates, best first, by their score for what each has ``saved``; ties go to the lower layer.

    Raises ``ValueError`` if one has no such score, and :class:`CalibrationError` naming one whose score is no number.
    """
    score = check_criterion(criterion).score

    def key(candidate: Candidate) -> tuple[float, Block]:
        value = score(candidate)
        if value is None:
            raise ValueError(f"layer {candidate.layer} was not measured for {criterion}")
        value = _finite(value, candidate.layer, f"score by {criterion}")
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
