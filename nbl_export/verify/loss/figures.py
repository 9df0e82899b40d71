"""What linearizing costs, as reports have it: values alone, which import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodLoss:
    """Perplexities on the same tokens, their ratio, mean KL in nats; standard errors over documents."""

    documents: int
    tokens: int
    perplexity_original: float
    perplexity_linearized: float
    perplexity_ratio: float
    perplexity_ratio_se: float
    kl: float
    kl_se: float


@dataclass(frozen=True)
class Measure:
    """``what`` was averaged over ``count`` vectors, and its standard error over documents."""

    what: str
    value: float
    se: float
    count: int


@dataclass(frozen=True)
class Likeness:
    """The measures of every output of an encoder on ``documents`` held-out documents or images (``unit``)."""

    documents: int
    unit: str
    measures: tuple[Measure, ...]
