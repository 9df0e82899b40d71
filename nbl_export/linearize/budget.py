"""How much may be lost, or must be gained: the largest K within a budget, read off the measured K curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from nbl_export.errors import InputError
from nbl_export.linearize.figures import Loss

# What `--k auto` means: the largest K whose perplexity on the selection text stays within a tenth of the original's.
AUTO_PERPLEXITY_RATIO = 1.10
# The curve is followed this many points beyond its budget: it is not strictly rising.
_BEYOND = 2


@dataclass(frozen=True)
class Budget:
    """Bounds that K must keep: each None where the user gave none.

    ``max_kl`` in nats and ``max_perplexity_ratio`` bound K from above, ``min_speedup`` (of prefill and of decode, over
    the unmodified graph) from below.
    """

    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    min_speedup: float | None = None

    def __bool__(self) -> bool:
        return any(v is not None for v in asdict(self).values())

    @property
    def bounds_loss(self) -> bool:
        return self.max_kl is not None or self.max_perplexity_ratio is not None

    def check(self) -> None:
        """Refuse bounds that make no sense."""
        if self.max_kl is not None and not self.max_kl >= 0:
            raise InputError(f"--max-kl is {self.max_kl:g}; it must be 0 nats or more.")
        if self.max_perplexity_ratio is not None and not self.max_perplexity_ratio >= 1:
            raise InputError(
                f"--max-ppl-ratio is {self.max_perplexity_ratio:g}; it must be 1 or more (1.05 allows 5 % more)."
            )
        if self.min_speedup is not None and not self.min_speedup >= 1:
            raise InputError(
                f"--min-speedup is {self.min_speedup:g}; it must be 1 or more (1.2 is a fifth faster)."
            )

    def keeps(self, loss: Loss | CurvePoint) -> bool:
        """Whether ``loss`` is within the bounds of loss."""
        within_kl = self.max_kl is None or loss.kl <= self.max_kl
        return within_kl and (
            self.max_perplexity_ratio is None or loss.perplexity_ratio <= self.max_perplexity_ratio
        )


NO_BUDGET = Budget()


@dataclass(frozen=True)
class CurvePoint:
    """What K ``layers`` (ascending) cost, and what they gain where it was measured: speedups over the unmodified graph.

    ``kl`` in nats per token; standard errors over documents.
    """

    k: int
    layers: tuple[int, ...]
    kl: float
    kl_se: float | None
    perplexity_ratio: float
    perplexity_ratio_se: float | None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None

    @classmethod
    def of(cls, k: int, layers: Sequence[int], loss: Loss) -> CurvePoint:
        """The point of the ``k`` ``layers``, which were measured to cost ``loss``."""
        ratio, ratio_se = loss.perplexity_ratio, loss.perplexity_ratio_se
        return cls(k, tuple(sorted(layers)), loss.kl, loss.kl_se, ratio, ratio_se)


def loss_curve(
    prefix: Callable[[int], Sequence[int]], loss: Callable[[Sequence[int]], Loss], count: int, budget: Budget
) -> list[CurvePoint]:
    """The losses of K = 1, 2 … ``count``, until the budget is exceeded for good. ``prefix(k)`` are the k best."""
    points: list[CurvePoint] = []
    beyond = 0
    for k in range(1, count + 1):
        layers = prefix(k)
        points.append(CurvePoint.of(k, layers, loss(layers)))
        beyond = 0 if budget.keeps(points[-1]) else beyond + 1
        if beyond > _BEYOND:
            break
    return points


def largest_within(points: Sequence[CurvePoint], budget: Budget) -> int:
    """The largest K of the curve that keeps the bounds of loss; 0 if none does."""
    return max((p.k for p in points if budget.keeps(p)), default=0)
