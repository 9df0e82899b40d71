"""Score recovery = linearized / base, with its standard error.

Both models answer the same documents, so the scores are paired: a document with equal scores says nothing about their
difference. With b_i and l_i the scores of document i and R = Σ l / Σ b, the delta method gives

    se(R) = sd(l − R b) / (√n · mean b)

For several tasks R is the ratio of the mean scores of the tasks (each task counts once, whatever its size), and the
variances of the tasks add. Recovery above chance subtracts the chance score from both first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.batch.arrays import F64

# A base score within this many standard errors of chance gives no meaningful recovery.
_CLEAR = 2.0


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is 0 for a single document."""

    value: float
    se: float


@dataclass(frozen=True)
class Paired:
    """Scores of the same documents, [n] each, by the base and the linearized model, and of random guessing."""

    base: F64
    linearized: F64
    chance: F64

    @classmethod
    def of(cls, base: Sequence[Any], linearized: Sequence[Any], chance: Sequence[Any]) -> Paired:
        """From lists; raises ``ValueError`` if they are not of the same documents."""
        values = [np.asarray(v, dtype=np.float64) for v in (base, linearized, chance)]
        if len({v.shape for v in values}) != 1 or values[0].ndim != 1 or not len(values[0]):
            raise ValueError(f"paired scores of different documents: {[v.shape for v in values]}")
        return cls(*values)

    @property
    def difference(self) -> Estimate:
        """Linearized minus base."""
        return mean(self.linearized - self.base)

    @property
    def clear(self) -> bool:
        """Whether the base model is better than chance by two standard errors."""
        over = mean(self.base - self.chance)
        return over.value > 0 and over.value >= _CLEAR * over.se


def mean(values: F64) -> Estimate:
    """Mean of documents' scores [n] and its standard error."""
    count = len(values)
    se = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return Estimate(float(values.mean()), se)


def recovery(tasks: Sequence[Paired], above_chance: bool = False) -> Estimate | None:
    """Ratio of the linearized model's mean score to the base's; None if the base's is 0.

    ``above_chance`` subtracts chance from both scores first; it gives None if the base is not clearly above chance.
    """
    if not tasks or (above_chance and not all(t.clear for t in tasks)):
        return None
    pairs = [
        (t.base - t.chance, t.linearized - t.chance) if above_chance else (t.base, t.linearized)
        for t in tasks
    ]
    base = sum(float(b.mean()) for b, _ in pairs)
    if base <= 0:
        return None
    ratio = sum(float(lin.mean()) for _, lin in pairs) / base
    variance = sum(mean(lin - ratio * b).se ** 2 for b, lin in pairs)
    return Estimate(ratio, math.sqrt(variance) / base)
