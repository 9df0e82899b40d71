"""How much may be lost, or must be gained: bounds on K, and gates on what was made with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from nbl_export.settings.choices import AUTO_PERPLEXITY_RATIO
from nbl_export.settings.definition import COST, LAYERS, MORE, Settings, at_least, options, setting
from nbl_export.settings.size import SIZE


@options
@dataclass(frozen=True)
class LossBound(Settings):
    """What linearizing may cost, each None where the user bounds nothing.

    max_kl: KL to the original, in nats: the largest K within X, and a gate of verify.
    max_perplexity_ratio: Perplexity over the original's: the largest K within X, and a gate of verify.
    """

    max_kl: float | None = setting(None, COST, at_least(0, "0 nats or more"))
    max_perplexity_ratio: float | None = setting(
        None, COST, at_least(1, "1 or more (1.05 allows 5 % more)"), key="max-ppl-ratio"
    )

    def __bool__(self) -> bool:
        return any(v is not None for v in asdict(self).values())

    @property
    def bounds_loss(self) -> bool:
        return self.max_kl is not None or self.max_perplexity_ratio is not None


@options
@dataclass(frozen=True)
class Budget(LossBound):
    """Bounds that K must keep: each None where the user gave none. Speedups are those of prefill and of decode.

    min_speedup: Smallest K with prefill and decode X times as fast.
    max_weight_bytes: Weights of at most that size, by the smallest K.
    max_kv_bytes: KV cache of at most that size for --workload, by the least K.
    """

    min_speedup: float | None = setting(None, LAYERS, at_least(1, "1 or more (1.2 is a fifth faster)"))

    max_weight_bytes: str | None = setting(None, MORE, SIZE, metavar="SIZE")
    max_kv_bytes: str | None = setting(None, MORE, SIZE, metavar="SIZE")

    @property
    def bounds_size(self) -> bool:
        return self.max_weight_bytes is not None or self.max_kv_bytes is not None

    def as_json(self) -> dict[str, Any]:
        """Without the bounds that are None and that budgets did not always have: what was made within one is kept."""
        new = ("max_weight_bytes", "max_kv_bytes")
        return {
            name: value for name, value in super().as_json().items() if value is not None or name not in new
        }

    @property
    def of_loss(self) -> LossBound:
        """The bounds on the loss alone."""
        return LossBound(self.max_kl, self.max_perplexity_ratio)


NO_BOUND = LossBound()
NO_BUDGET = Budget()


def auto_budget(budget: Budget) -> Budget:
    """``--k auto``: the bounds that the user gave, or the documented default where none bounds the loss."""
    return budget if budget.bounds_loss else replace(budget, max_perplexity_ratio=AUTO_PERPLEXITY_RATIO)
