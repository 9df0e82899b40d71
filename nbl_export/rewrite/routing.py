"""The proof of a mixture of experts: the routers of a graph, which are told what PyTorch's have chosen on the probe.

Where rounding sends one token to another expert, its stream is another one, and no longer says whether the graph is of
the plan's model. So the graph is run with PyTorch's choices, and each choice is judged by itself: the graph's own score
for it may fall short of those that it prefers by no more than rounding moves a score of that router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.choices import moved, shortfall
from nbl_export.graph.io import load_graph
from nbl_export.graph.routers import routers, scores_of, told_ranks
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.probe_runner import Found

# Of the scores' size, beside what is measured.
_FLOAT32 = 1e-3


@dataclass(frozen=True)
class RouterProof:
    """How far the scores of PyTorch's choices fall short in the router ``number`` of a graph, and how far they may.

    ``differing`` of ``tokens`` are those that the graph would send elsewhere.
    """

    number: int
    tokens: int
    differing: int
    shortfall: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.shortfall <= self.allowed

    def __str__(self) -> str:
        return (
            f"PyTorch's choices of experts fall short in its router {self.number} by {self.shortfall:.1e} of a score, "
            f"more than the {self.allowed:.1e} that its own rounding explains"
        )


def told_scores(path: Path, plan: Plan) -> list[str]:
    """Names of the scores of each router of the graph at ``path``; none if one cannot be told the plan's choices."""
    if not plan.probe_routes:
        return []
    model = load_graph(path)
    told = told_ranks(model, plan.probe_routes)
    return [scores_of(node) for node in routers(model)] if told else []


def router_proofs(
    names: Sequence[str], plan: Plan, own: Found, draws: Sequence[Found] = (), room: float = 1.0
) -> list[RouterProof]:
    """A proof of each router by its scores ``names`` in the graph's ``own`` run and where rounding has moved them."""

    def joined(found: Found, name: str, places: NDArray[np.int64]) -> NDArray[np.float32]:
        parts = [row[name] for row in found]
        return np.concatenate([p[0] if p.ndim > places.ndim else p for p in parts]).astype(np.float32)

    proofs = []
    for number, name in enumerate(names):
        taken = plan.probe_routes[number]
        scores = joined(own, name, taken)
        short = shortfall(scores, taken)
        size = float(np.sqrt(np.mean(np.where(np.isfinite(scores), scores, 0.0) ** 2)))
        by_rounding = max((moved(scores, joined(draw, name, taken)) for draw in draws), default=0.0)
        proofs.append(
            RouterProof(
                number,
                len(taken),
                int((short > 0).sum()),
                float(short.max(initial=0.0)),
                max(room * by_rounding, _FLOAT32 * size),
            )
        )
    return proofs
