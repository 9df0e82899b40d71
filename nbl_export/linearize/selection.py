"""What choosing layers found, as ``nbl/candidates.json`` and reports keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbl_export.linearize.budget import CurvePoint
from nbl_export.linearize.figures import Candidate, Loss
from nbl_export.settings import Budget
from nbl_export.settings.budget import NO_BUDGET


@dataclass(frozen=True)
class ScoredLayer(Candidate):
    """A candidate, and what its attention sees: ``"full"``, ``"sliding window"`` …"""

    kind: str = "full"


@dataclass(frozen=True)
class Line:
    """One way to save time: ``name`` says what became linear or was dropped, ``points`` what each K of it costs."""

    name: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Curve:
    """What each K costs; ``chosen`` is the K that was taken, ``context`` the tokens that speeds were measured at.

    Losses are means over ``tokens`` predictions of ``documents`` documents of the selection text. ``name`` says what
    became linear; ``others`` are the other ways that were measured, of which none ships.
    """

    points: tuple[CurvePoint, ...]
    chosen: int | None = None
    budget: Budget = NO_BUDGET
    context: int | None = None
    tokens: int | None = None
    documents: int | None = None
    name: str = ""
    others: tuple[Line, ...] = ()

    @property
    def frontier(self) -> list[Line]:
        """Every way that was measured for the workload, the chosen one first."""
        return [Line(self.name, tuple(self.by_k)), *self.others]

    @property
    def by_k(self) -> list[CurvePoint]:
        """The points, smallest K first."""
        return sorted(self.points, key=lambda p: p.k)


@dataclass(frozen=True)
class PlanLoss:
    """What the maps that were kept cost together on the selection text, each None where it was not measured.

    ``predicted_excess`` in nats per token, by the linearity theorem; ``rank_lost`` by layer: the share of the
    output's variance that a map of low rank leaves out; ``ranks`` where they were chosen, of the maps that have one.
    ``loss`` is of the maps as they are in the plan.
    """

    predicted_excess: float | None = None
    before_repair: Loss | None = None
    before_rank: Loss | None = None
    rank_lost: Mapping[str, float] | None = None
    loss: Loss | None = None
    ranks: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Scores:
    """Every layer's scores, the layers that are no candidates (``others``: what they are), the K curve, the result.

    ``calibration_dtype`` is that in which the model read the calibration text. ``workload`` is what the model is used
    for, of which the unmodified graph takes ``workload_ms``: the least, as counted, or ``measured_cost``; empty where
    layers are chosen by loss alone. ``kl_tokens`` are the predictions that a single layer's KL is a mean of: a search
    looks at fewer for it than for sets.
    """

    candidates: tuple[ScoredLayer, ...]
    others: Mapping[str, str] = field(default_factory=dict)
    curve: Curve | None = None
    result: PlanLoss | None = None
    calibration_dtype: str | None = None
    workload: tuple[str, ...] = ()
    workload_ms: float | None = None
    measured_cost: bool = False
    kl_tokens: int | None = None
