"""Method loss: what linearizing costs, original against linearized model, on held-out text.

Apart from parity, and never mixed with it. Per token the negative log-likelihood of both models and
KL(original ‖ linearized) are taken; with n_i tokens and a summed difference D_i in document i,

    excess = Σ D_i / Σ n_i        perplexity ratio = exp(excess)

and the standard error over documents is that of a ratio estimator (documents are the sampling unit,
tokens of one document are not independent).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.progress import Listener, Silent

if TYPE_CHECKING:
    import torch

F64 = NDArray[np.float64]


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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_method_loss(
    model: torch.nn.Module,
    plan: Plan,
    heldout: NDArray[np.int32],
    document: NDArray[np.int32],
    listener: Listener | None = None,
) -> MethodLoss:
    """The method loss of ``plan`` on ``heldout`` [rows, seq_len], whose tokens belong to ``document``."""
    import torch

    nll: list[tuple[F64, F64]] = []
    kl: list[F64] = []
    with (
        (listener or Silent()).task("Measuring method loss", heldout.size, "tokens") as task,
        torch.inference_mode(),
    ):
        for row in heldout:
            ids = torch.from_numpy(row.astype(np.int64))[None]
            original = _log_probabilities(model, ids)
            with linearized(model, plan):
                changed = _log_probabilities(model, ids)
            target = ids[0, 1:, None]
            nll.append(
                tuple(-p[:-1].gather(1, target)[:, 0].double().numpy() for p in (original, changed))  # type: ignore[arg-type]
            )
            divergence = torch.sum(original.exp() * (original - changed), dim=-1)[:-1]
            kl.append(divergence.double().numpy())
            task.advance(len(row))
    before, after = (np.concatenate([pair[i] for pair in nll]) for i in range(2))
    owner = document[:, 1:].reshape(-1)
    excess, excess_se = mean_over_documents(after - before, owner)
    mean_kl, kl_se = mean_over_documents(np.concatenate(kl), owner)
    return MethodLoss(
        documents=len(np.unique(owner)),
        tokens=len(owner),
        perplexity_original=math.exp(before.mean()),
        perplexity_linearized=math.exp(after.mean()),
        perplexity_ratio=math.exp(excess),
        perplexity_ratio_se=math.exp(excess) * excess_se,
        kl=mean_kl,
        kl_se=kl_se,
    )


def _log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)


def mean_over_documents(values: F64, owner: NDArray[np.int32]) -> tuple[float, float]:
    """Mean of per-token ``values`` and its standard error with documents as the sampling unit.

    se² = D/(D-1) Σ_i (Σ_{t in i} (v_t - mean))² / n² for D documents and n tokens; 0 for one document,
    where there is nothing to estimate it from.
    """
    mean = float(values.mean())
    _, index = np.unique(owner, return_inverse=True)
    sums = np.bincount(index, weights=values - mean)
    count = len(sums)
    if count < 2:
        return mean, 0.0
    return mean, float(math.sqrt(count / (count - 1) * float(np.sum(sums**2))) / len(values))
