"""What replacing layers costs a decoder's predictions: original against changed model, on one text.

Per token the negative log-likelihood of both models and KL(original ‖ changed) are taken; with n_i tokens and a
summed difference D_i in document i,

    excess = Σ D_i / Σ n_i        perplexity ratio = exp(excess)

and the standard error over documents is that of a ratio estimator (documents are the sampling unit, tokens of
one document are not independent).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch.arrays import F64
from nbl_export.linearize.figures import Loss
from nbl_export.linearize.lmmse import FitInput
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.linearize.swap import linearized, replaced
from nbl_export.models.layers import attention_layers
from nbl_export.models.resume import beginning_at, inputs_kept

I32 = NDArray[np.int32]
# Places of a row whose distributions are worked on at a time: a whole row's, over a large vocabulary, would leave
# the caches and be paged in anew each time.
_PLACES = 64


@dataclass(frozen=True)
class Reference:
    """The original model's predictions of one row: ``p`` [places, vocab], ``negentropy`` Σ p ln P [places] with P
    before it was rounded to p, and ``nll`` [places] of the tokens that came.
    """

    p: torch.Tensor
    negentropy: torch.Tensor
    nll: torch.Tensor


def reference(logits: torch.Tensor, tokens: torch.Tensor, kept_in: torch.dtype = torch.float32) -> Reference:
    """The predictions, in ``kept_in``, that ``logits`` [seq, vocab] make of each next token of ``tokens`` [seq] int64.

    In bfloat16 the mean KL is right to about a thousandth of itself: the rounding of many entries evens out.
    """
    p = torch.empty(len(tokens) - 1, logits.shape[-1], dtype=kept_in, device=logits.device)
    negentropy = torch.empty(len(p), device=logits.device)
    nll = torch.empty_like(negentropy)
    for part in parts(len(p)):
        log_p = torch.log_softmax(logits[part].float(), dim=-1)
        nll[part] = -log_p.gather(1, tokens[1:][part, None])[:, 0]
        p[part] = log_p.exp()
        # What is rounded only weighs the logarithms, which are exact: a model's divergence from itself is nil.
        negentropy[part] = torch.linalg.vecdot(p[part].float(), log_p)
    return Reference(p, negentropy, nll)


def compare(original: Reference, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[F64, F64]:
    """KL(original ‖ changed) and the increase of the negative log-likelihood, [seq - 1] each, float64."""
    kl, excess = (np.empty(len(original.p)) for _ in range(2))
    for part in parts(len(original.p)):
        log_q = torch.log_softmax(logits[part].float(), dim=-1)
        p = original.p[part].float()
        gap = original.negentropy[part] - torch.linalg.vecdot(p, log_q)
        kl[part] = (gap / p.sum(-1)).cpu().numpy()
        nll = -log_q.gather(1, tokens[1:][part, None])[:, 0]
        excess[part] = (nll - original.nll[part]).cpu().numpy()
    return kl, excess


def parts(places: int) -> Iterator[slice]:
    """The slices in which ``places`` distributions are worked on."""
    return (slice(at, min(at + _PLACES, places)) for at in range(0, places, _PLACES))


def loss_over_documents(kl: F64, excess: F64, owner: I32) -> Loss:
    """The means of per-token ``kl`` and ``excess``, whose tokens belong to the documents ``owner``."""
    return Loss(*mean_over_documents(kl, owner), *mean_over_documents(excess, owner))


def mean_over_documents(values: F64, owner: I32) -> tuple[float, float]:
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


def row_logits(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    """Logits [seq, vocab] of one row of tokens [seq] int64."""
    logits: torch.Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return logits


class LossMeter:
    """Measures what sets of replacements cost ``model`` on ``rows`` [rows, seq], whose tokens belong to ``document``.

    It keeps the original's predictions (2 bytes for each token and entry of the vocabulary) and, for one set at a
    time, the states at each layer's input: a set that adds layers to it is run from the first of them on.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: I32,
        document: I32,
        fit_input: FitInput,
        advance: Callable[[int], None] = lambda _tokens: None,
    ) -> None:
        self.model, self.fit_input = model, fit_input
        device = next(model.parameters()).device
        self._rows = [torch.from_numpy(row.astype(np.int64)).to(device) for row in rows]
        self._owner = document[:, 1:].reshape(-1)
        self._layers = attention_layers(model)
        self._maps: dict[int, LinearLayer] = {}
        self._references: list[Reference] = []
        self._states: list[dict[int, torch.Tensor]] = []
        for row, logits in zip(self._rows, self._settled({}, advance), strict=True):
            self._references.append(reference(logits, row, torch.bfloat16))

    @property
    def tokens(self) -> int:
        """How many predictions are compared."""
        return len(self._owner)

    @property
    def documents(self) -> int:
        return len(np.unique(self._owner))

    def settle(self, maps: Mapping[int, LinearLayer]) -> None:
        """Keep the states of the model with ``maps``, from which sets that add to it are measured faster."""
        if {i: id(m) for i, m in self._maps.items()} == {i: id(m) for i, m in maps.items()}:
            return
        for _ in self._settled(dict(maps), lambda _tokens: None):
            pass

    def measure(self, maps: Mapping[int, LinearLayer]) -> Loss:
        """The loss of the model with exactly ``maps``."""
        return self.measure_within(replaced(self.model, maps, self.fit_input), self._first_new(maps))

    def measure_within(self, change: AbstractContextManager[Any], first: int) -> Loss:
        """The loss of the settled model within ``change``, which touches layer ``first`` and later ones only."""
        kl, excess = [], []
        with torch.inference_mode(), change:
            for original, states, row in zip(self._references, self._states, self._rows, strict=True):
                with beginning_at(self.model, first, states[first]):
                    row_kl, row_excess = compare(original, row_logits(self.model, row), row)
                kl.append(row_kl)
                excess.append(row_excess)
        return loss_over_documents(np.concatenate(kl), np.concatenate(excess), self._owner)

    def _first_new(self, maps: Mapping[int, LinearLayer]) -> int:
        # The first layer where this set and the settled one differ; the last layer if nowhere.
        indices = [layer.index for layer in self._layers]
        differs = [i for i in indices if maps.get(i) is not self._maps.get(i)]
        return differs[0] if differs else indices[-1]

    def _settled(
        self, maps: dict[int, LinearLayer], advance: Callable[[int], None]
    ) -> Iterator[torch.Tensor]:
        # A generator: the logits of one row at a time are all that there is room for.
        self._maps, self._states = maps, []
        with torch.inference_mode(), replaced(self.model, maps, self.fit_input):
            for row in self._rows:
                with inputs_kept(self.model, self._layers) as kept:
                    logits = row_logits(self.model, row)
                self._states.append(dict(kept))
                advance(len(row))
                yield logits


def loss_of_plan(meter: LossMeter, plan: Plan) -> Loss:
    """The loss of the meter's model with ``plan`` applied."""
    if not plan.layers:
        return meter.measure({})
    meter.settle({})
    return meter.measure_within(linearized(meter.model, plan), min(plan.chosen))
