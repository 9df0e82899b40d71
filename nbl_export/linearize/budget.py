"""The largest K within a budget, read off the measured K curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbl_export.blocks import Block, all_parts
from nbl_export.linearize.figures import Loss
from nbl_export.settings import Budget

# The curve is followed this many points beyond its budget: it is not strictly rising.
_BEYOND = 2


def keeps(budget: Budget, loss: Loss | CurvePoint) -> bool:
    """Whether ``loss`` is within the bounds of loss."""
    within_kl = budget.max_kl is None or loss.kl <= budget.max_kl
    ratio = budget.max_perplexity_ratio
    return within_kl and (ratio is None or loss.perplexity_ratio <= ratio)


@dataclass(frozen=True)
class CurvePoint:
    """What K ``layers`` (ascending) cost, and what they gain where it was measured: speedups over the unmodified graph.

    K counts attentions and MLPs, of which a span has two for each of its layers.

    ``kl`` in nats per token; standard errors over documents. ``workload_speedup`` is what the workload gains by what
    each block saves of it; ``timed_speedup`` is that of the graph with these layers, measured.
    """

    k: int
    layers: tuple[Block, ...]
    kl: float
    kl_se: float | None
    perplexity_ratio: float
    perplexity_ratio_se: float | None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    workload_speedup: float | None = None
    timed_speedup: float | None = None

    @classmethod
    def of(cls, layers: Sequence[Block], loss: Loss) -> CurvePoint:
        """The point of the ``layers``, which were measured to cost ``loss``."""
        ratio, ratio_se = loss.perplexity_ratio, loss.perplexity_ratio_se
        return cls(len(all_parts(layers)), tuple(sorted(layers)), loss.kl, loss.kl_se, ratio, ratio_se)


def loss_curve(
    prefix: Callable[[int], Sequence[Block]],
    loss: Callable[[Sequence[Block]], Loss],
    count: int,
    budget: Budget,
) -> list[CurvePoint]:
    """The losses of K = 1, 2 … ``count``, until the budget is exceeded for good.

    ``prefix(k)`` are the best blocks of at most k attentions and MLPs; where they are fewer, there is no point of k.
    """
    points: list[CurvePoint] = []
    beyond = 0
    for k in range(1, count + 1):
        layers = tuple(prefix(k))
        if len(all_parts(layers)) < k:
            continue
        points.append(CurvePoint.of(layers, loss(layers)))
        beyond = 0 if keeps(budget, points[-1]) else beyond + 1
        if beyond > _BEYOND:
            break
    return points


def largest_within(points: Sequence[CurvePoint], budget: Budget) -> int:
    """The largest K of the curve that keeps the bounds of loss; 0 if none does."""
    return max((p.k for p in points if keeps(budget, p)), default=0)
