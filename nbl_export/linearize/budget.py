"""The largest K within a budget, read off the measured K curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbl_export.settings import Budget

if TYPE_CHECKING:
    from nbl_export.linearize.loss import Loss

# The curve is followed this many points beyond its budget: it is not strictly rising.
_BEYOND = 2


def keeps(budget: Budget, loss: Loss) -> bool:
    """Whether ``loss`` is within the bounds of loss."""
    within_kl = budget.max_kl is None or loss.kl <= budget.max_kl
    ratio = budget.max_perplexity_ratio
    return within_kl and (ratio is None or loss.perplexity_ratio <= ratio)


@dataclass(frozen=True)
class CurvePoint:
    """What K layers cost, and what they gain where it was measured: speedups over the unmodified graph."""

    k: int
    layers: tuple[int, ...]
    loss: Loss
    prefill_speedup: float | None = None
    decode_speedup: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "layers": sorted(self.layers),
            "kl": self.loss.kl,
            "kl_se": self.loss.kl_se,
            "perplexity_ratio": self.loss.perplexity_ratio,
            "perplexity_ratio_se": self.loss.perplexity_ratio_se,
            "prefill_speedup": self.prefill_speedup,
            "decode_speedup": self.decode_speedup,
        }


def loss_curve(
    prefix: Callable[[int], Sequence[int]], loss: Callable[[Sequence[int]], Loss], count: int, budget: Budget
) -> list[CurvePoint]:
    """The losses of K = 1, 2 … ``count``, until the budget is exceeded for good. ``prefix(k)`` are the k best."""
    points: list[CurvePoint] = []
    beyond = 0
    for k in range(1, count + 1):
        layers = tuple(prefix(k))
        points.append(CurvePoint(k, layers, loss(layers)))
        beyond = 0 if keeps(budget, points[-1].loss) else beyond + 1
        if beyond > _BEYOND:
            break
    return points


def largest_within(points: Sequence[CurvePoint], budget: Budget) -> int:
    """The largest K of the curve that keeps the bounds of loss; 0 if none does."""
    return max((p.k for p in points if keeps(budget, p.loss)), default=0)
