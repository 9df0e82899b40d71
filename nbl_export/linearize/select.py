"""Score every layer and choose the K that lose least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from nbl_export.calibrate.moments import Moments
from nbl_export.errors import CalibrationError, InputError
from nbl_export.linearize.lmmse import (
    DEFAULT_RIDGE,
    FitInput,
    LinearFit,
    UnusableMoments,
    cca_bound,
    fit_lmmse,
)
from nbl_export.progress import Listener, Silent


@dataclass(frozen=True)
class Candidate:
    """What is known of one layer before choosing. Both scores: lower is more linear.

    ``nmse`` in [0, 1] is of the fit itself; ``cca`` in [0, d] is the paper's bound. ``ridge`` and
    ``cca_ridge`` are the λ that the two Cholesky factorizations needed.
    """

    layer: int
    nmse: float
    cca: float
    ridge: float
    cca_ridge: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# Adding a criterion is adding a row; lower is better.
CRITERIA: Mapping[str, Callable[[Candidate], float]] = {
    "cca": lambda c: c.cca,
    "nmse": lambda c: c.nmse,
}


def score_layers(
    moments: Moments,
    fit_input: FitInput = "normed",
    ridge: float = DEFAULT_RIDGE,
    listener: Listener | None = None,
) -> tuple[Candidate, ...]:
    """Fit and score every layer; raises :class:`CalibrationError` naming a layer that cannot be fitted."""
    listener = Silent() if listener is None else listener
    candidates = []
    with listener.task("Scoring layers", len(moments.layers), "layers") as task:
        for layer in sorted(moments.layers):
            fit = fit_layer(moments, layer, fit_input, ridge)
            with _naming(layer):
                cca, cca_ridge = cca_bound(moments.layers[layer], ridge)
            candidates.append(Candidate(layer, fit.nmse, cca, fit.ridge, cca_ridge))
            for what, used in (("fit", fit.ridge), ("CCA bound", cca_ridge)):
                if used != ridge:
                    listener.note(
                        f"Layer {layer}: the {what} needed a ridge of {used:g} instead of {ridge:g}."
                    )
            task.advance(1)
    return tuple(candidates)


def fit_layer(moments: Moments, layer: int, fit_input: FitInput, ridge: float) -> LinearFit:
    """The LMMSE fit of one layer; raises :class:`CalibrationError` naming it."""
    with _naming(layer):
        return fit_lmmse(moments.layers[layer], fit_input, ridge)


def choose_layers(
    candidates: Sequence[Candidate],
    k: int | None = None,
    criterion: str = "cca",
    layers: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The layers to linearize, ascending: the ``k`` best by ``criterion``, or exactly ``layers``.

    Raises :class:`InputError` for a K or a layer that the model does not have.
    """
    count = len(candidates)
    if layers is not None:
        if k is not None and k != len(layers):
            raise InputError(
                f"--k {k} and --layers with {len(layers)} layers contradict each other: give one."
            )
        known = {c.layer for c in candidates}
        if unknown := sorted(set(layers) - known):
            raise InputError(f"--layers names layer {unknown[0]}; the model has layers 0 to {count - 1}.")
        if len(set(layers)) != len(layers):
            raise InputError("--layers names a layer twice.")
        return tuple(sorted(layers))
    if k is None:
        raise InputError("Say how many layers to linearize: --k K (or name them with --layers).")
    check_k(k, count)
    return tuple(sorted(c.layer for c in ranking(candidates, criterion)[:k]))


def check_k(k: int, count: int | None) -> None:
    """Refuse a K that the model of ``count`` attention layers does not have (None: not known yet)."""
    if k < 0 or (count is not None and k > count):
        most = (
            f"{count} (the model's attention layers)" if count is not None else "the model's attention layers"
        )
        raise InputError(f"--k is {k}; it must be between 0 and {most}.")


def check_criterion(criterion: str) -> None:
    """Refuse a criterion that is not in the table."""
    if criterion not in CRITERIA:
        raise InputError(f"--criterion {criterion!r} is unknown; choose one of {', '.join(CRITERIA)}.")


def ranking(candidates: Sequence[Candidate], criterion: str) -> list[Candidate]:
    """All candidates, best first; ties go to the lower layer."""
    check_criterion(criterion)
    score = CRITERIA[criterion]
    return sorted(candidates, key=lambda c: (score(c), c.layer))


@contextmanager
def _naming(layer: int) -> Iterator[None]:
    # The mathematics knows no layer numbers; the user needs one.
    try:
        yield
    except UnusableMoments as error:
        raise CalibrationError(f"Layer {layer} cannot be linearized: {error}.") from error
