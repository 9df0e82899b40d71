"""The loss caused by replacing layers of a decoder: original against changed model, on one text.

Per token, the negative log-likelihood of both models and KL(original ‖ changed) are computed. With n_i tokens and a
summed difference D_i in document i,

    excess = Σ D_i / Σ n_i        perplexity ratio = exp(excess)

and the standard error over documents is that of a ratio estimator (documents are the sampling unit, since tokens of
one document are not independent).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch import F64
from nbl_export.blocks import Block, layer_of
from nbl_export.calibrate.synthetic import SyntheticRow
from nbl_export.errors import CalibrationError
from nbl_export.linearize.plan import Plan, Replacement
from nbl_export.linearize.selection import Loss, Sums, mean_of_documents
from nbl_export.linearize.swap import ORIGINAL, Version, linearized, replaced, sweep, version_of
from nbl_export.models.candidates import blocks_of
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import block_stack, hidden_size, vocabulary
from nbl_export.models.media_tokens import written
from nbl_export.models.running import logits_at, states_in
from nbl_export.models.walk import after_blocks, first_needed, recording_inputs, starting_at
from nbl_export.models.weights import device_of, streams, weights_like
from nbl_export.progress import Listener
from nbl_export.settings.choices import FitInput

I32 = NDArray[np.int32]
# Positions of a row that are processed at a time: the distributions of a full row, over a large vocabulary, would not
# fit into the CPU caches.
_CHUNK = 64
# The original's predictions are kept if they take no more than this. Beyond it, its states are, and the predictions of
# a row are made again from them.
_KEPT_BYTES = 1 << 30
# What goes through the blocks together has states of no more than this.
_STATES_BYTES = 2 << 30
# The first part of the rows is a quarter of them, and has no fewer tokens than this.
_FIRST_TOKENS = 1024
# The parts of the rows that sets are measured on one after the other, as long as their order is open.
PARTS = 3
# The states of the best set measured are kept, beside the settled ones, if they take no more than this.
_NEXT_BYTES = 1 << 29


@dataclass(frozen=True)
class Reference:
    """The original model's predictions of one row: ``p`` [positions, vocab], ``negentropy`` Σ p ln P [positions] with
    P the value before rounding to p, and ``nll`` [positions] of the actual next tokens.
    """

    p: torch.Tensor
    negentropy: torch.Tensor
    nll: torch.Tensor


def reference(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype = torch.float32) -> Reference:
    """The predictions of ``logits`` [positions, vocab], of which ``targets`` [positions] int64 are the actual next
    tokens; ``p`` is in ``dtype``.

    In bfloat16 the mean KL is accurate to about 0.1 %: the rounding errors of many entries average out.
    """
    p = torch.empty(len(targets), logits.shape[-1], dtype=dtype, device=logits.device)
    negentropy = torch.empty(len(p), device=logits.device)
    nll = torch.empty_like(negentropy)
    for chunk in chunks(len(p)):
        log_p = torch.log_softmax(logits[chunk].float(), dim=-1)
        nll[chunk] = -log_p.gather(1, targets[chunk, None])[:, 0]
        p[chunk] = log_p.exp()
        # The rounded p only weights the logarithms, which are exact, so the divergence of a model from itself is 0.
        negentropy[chunk] = torch.linalg.vecdot(p[chunk].float(), log_p)
    return Reference(p, negentropy, nll)


def compare(original: Reference, logits: torch.Tensor, targets: torch.Tensor) -> tuple[F64, F64]:
    """KL(original ‖ changed) and the increase of the negative log-likelihood, [positions] each, float64."""
    kl, excess = (np.empty(len(original.p)) for _ in range(2))
    for chunk in chunks(len(original.p)):
        log_q = torch.log_softmax(logits[chunk].float(), dim=-1)
        p = original.p[chunk].float()
        gap = original.negentropy[chunk] - torch.linalg.vecdot(p, log_q)
        kl[chunk] = (gap / p.sum(-1)).cpu().numpy()
        nll = -log_q.gather(1, targets[chunk, None])[:, 0]
        excess[chunk] = (nll - original.nll[chunk]).cpu().numpy()
    return kl, excess


def chunks(positions: int) -> Iterator[slice]:
    """The slices in which the distributions of ``positions`` are processed."""
    return (slice(at, min(at + _CHUNK, positions)) for at in range(0, positions, _CHUNK))


def sums_of(kl: F64, excess: F64, owner: I32) -> Sums:
    """Per-token ``kl`` and ``excess`` by the document, ``owner``, of each token."""
    documents, index = np.unique(owner, return_inverse=True)
    columns = (np.bincount(index, weights=values) for values in (np.ones_like(kl), kl, excess))
    return Sums({str(n): sums for n, *sums in zip(documents, *(c.tolist() for c in columns), strict=True)})


def mean_over_documents(values: F64, owner: I32) -> tuple[float, float]:
    """Mean of per-token values and its standard error; ``owner`` is the document of each token."""
    _, index, tokens = np.unique(owner, return_inverse=True, return_counts=True)
    return mean_of_documents(np.bincount(index, weights=values).astype(np.float64), tokens.astype(np.float64))


def row_logits(model: torch.nn.Module, row: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [positions, vocab] at ``positions`` of one row of tokens [seq] int64."""
    with logits_at(model, positions) as kept:
        return kept(model(input_ids=row[None], use_cache=False).logits[0])


class LossMeter:
    """Measures the loss of sets of linear layers in ``model`` on ``rows`` [rows, seq] with their ``document`` numbers.

    Predictions of tokens without a document, which is -1, are not counted: those of images. The ``synthetic`` rows are
    measured, too.

    It stores the original's predictions and, for one set at a time, the states at each layer's input. A set that adds
    layers to that set is run from the first added layer on. The states of the best set that was measured since are
    kept, too, where they have room: a search settles on that one next.

    The predictions take 2 bytes per token and vocabulary entry: the mean KL is accurate to about 0.1 %. If they take
    more than 1 GiB, the original's states after its last block are stored instead, d values per token, and the
    predictions of one row at a time are made from them by the head: the same bits, for the time of the head.

    A model whose weights do not stay in memory is run block by block instead, with all rows, and with all sets that are
    asked for together: its weights are read once for them, or once for as many as have 2 GiB of states between two
    blocks. ``together`` says so. The ``listener`` is then told of each block.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: I32,
        document: I32,
        fit_input: FitInput,
        advance: Callable[[int], None] = lambda _tokens: None,
        listener: Listener | None = None,
        synthetic: Sequence[SyntheticRow] = (),
    ) -> None:
        self.model, self.fit_input, self._listener = model, fit_input, listener
        device = device_of(model)
        tokens = [*(row.tokens for row in synthetic), *rows]
        self._rows = [torch.from_numpy(row.astype(np.int64)).to(device) for row in tokens]
        # Of each row its kind, None for text.
        self._kinds = [*(row.kind for row in synthetic), *[None] * len(rows)]
        # The positions whose predictions are counted, what comes next there, and its document. Of the embeddings of
        # images, which nobody predicts, nothing is counted.
        owners = [*(row.owner for row in synthetic), *document[:, 1:]]
        self._positions = [torch.from_numpy(np.flatnonzero(owner >= 0)).to(device) for owner in owners]
        self._targets = [written(row)[1:][at] for row, at in zip(self._rows, self._positions, strict=True)]
        self._owners = [owner[owner >= 0] for owner in owners]
        self._blocks = [one.index for one in blocks_of(model)]
        self._linear: dict[Block, Replacement] = {}
        # Of the original: the predictions, or, where these are large, the states after the last block.
        self._references: list[Reference] = []
        self._ends: list[torch.Tensor] = []
        self._states: list[dict[int, torch.Tensor]] = []
        # The best set measured since, its Σ KL, and for each row the states at the inputs of later layers.
        self._next: tuple[dict[Block, Replacement], float, list[dict[int, torch.Tensor]]] | None = None
        self.together = streams(model)
        large = 2 * sum(map(len, self._targets)) * vocabulary(model) > _KEPT_BYTES
        with ExitStack() as hooks:
            if large:
                dummy_run(model)  # before any hook is registered, since its own run would trigger it
                *_, last = block_stack(model)[1].children()
                hook = last.register_forward_hook(lambda _m, _a, output: self._ends.append(states_in(output)))
                hooks.callback(hook.remove)
            how: Any = {"advance": advance, "listener": listener}
            swept = (found[2] for found in sweep(model, self._rows, [ORIGINAL], fit_input, **how))
            counted = (logits[at] for logits, at in zip(swept, self._positions, strict=False))
            for number, logits in enumerate(counted if self.together else self._settled({}, advance)):
                original = reference(logits, self._targets[number], torch.bfloat16)
                if not (original.nll.isfinite().all() and original.negentropy.isfinite().all()):
                    raise CalibrationError(
                        f"The model's own predictions are NaN or infinite in row {number} of the selection text: check "
                        "its weights, or calibrate on other text."
                    )
                if not large:
                    self._references.append(original)

    @cached_property
    def parts(self) -> list[LossMeter | None]:
        """Meters of :data:`PARTS` parts of the rows: half of the synthetic rows and a quarter of the text, as much of
        both again, the rest.

        This one itself and None where the first part would be all rows, and where sets are measured ``together``:
        reading the weights takes the time then.
        """
        synthetic = len(self._rows) - self._kinds.count(None)
        lengths = np.cumsum([len(row) for row in self._rows[synthetic:]])
        count = max(-(-len(lengths) // 4), 1 + int(np.searchsorted(lengths, _FIRST_TOKENS)))
        if self.together or count >= len(lengths):
            return [self, None, None]
        half, number = -(-synthetic // 2), range(len(self._rows))
        made, text = number[:synthetic], number[synthetic:]
        parts = (
            [*made[:half], *text[:count]],
            [*made[half:], *text[count : 2 * count]],
            text[2 * count :],
        )
        return [self._part(rows) if rows else None for rows in parts]

    def _part(self, rows: Sequence[int]) -> LossMeter:
        part = copy.copy(self)
        # What it has of each row; what the original predicts there is not computed again.
        for name in (
            "_rows",
            "_positions",
            "_targets",
            "_owners",
            "_kinds",
            "_references",
            "_ends",
            "_states",
        ):
            of_rows = getattr(self, name)
            setattr(part, name, [of_rows[row] for row in rows] if of_rows else [])
        part._next = None
        return part

    @property
    def tokens(self) -> int:
        """Number of compared predictions of the text."""
        return sum(len(owner) for owner, kind in zip(self._owners, self._kinds, strict=True) if kind is None)

    def settle(self, layers: Mapping[Block, Replacement]) -> None:
        """Store the states of the model with the linear ``layers``; sets that add to it are then measured faster."""
        if _same(self._linear, layers):
            return
        kept, self._next = self._next, None
        if self.together:
            self._linear = dict(layers)
        elif kept is not None and _same(kept[0], layers):
            self._linear = kept[0]
            self._states = [before | after for before, after in zip(self._states, kept[2], strict=True)]
        else:
            for _ in self._settled(dict(layers), lambda _tokens: None):
                pass

    def measure(self, layers: Mapping[Block, Replacement]) -> Sums:
        """The loss of the model with exactly the linear ``layers``."""
        if self.together:
            return self.measure_all([layers])[0]
        # The states of another set have room where those of the best one, and of the one that is measured, do.
        each = sum(states.nbytes for row in self._states for states in row.values())
        states: list[dict[int, torch.Tensor]] | None = [] if 2 * each <= _NEXT_BYTES else None
        change = replaced(self.model, layers, self.fit_input)
        found = self.measure_within(change, self._first_new(layers), states)
        if states is not None and (self._next is None or found.kl < self._next[1]):
            self._next = dict(layers), found.kl, states
        return found

    def measure_all(self, sets: Sequence[Mapping[Block, Replacement]]) -> list[Sums]:
        """The losses of ``sets`` of linear layers, each the same as by :meth:`measure`; the weights are read once."""
        if not self.together:
            return [self.measure(layers) for layers in sets]
        return self.measure_versions([Version(self._first_new(layers), layers) for layers in sets])

    def measure_versions(self, versions: Sequence[Version]) -> list[Sums]:
        """The losses of ``versions`` of a model whose weights are read once for all of them that have room."""
        states = sum(len(row) for row in self._rows) * hidden_size(self.model)
        at_once = max(1, _STATES_BYTES // (states * weights_like(self.model).element_size()))
        return [
            loss
            for at in range(0, len(versions), at_once)
            for loss in self._swept(versions[at : at + at_once])
        ]

    def _swept(self, versions: Sequence[Version]) -> list[Sums]:
        found: list[list[tuple[F64, F64]]] = [[] for _ in versions]
        known = [Version(0, ends=self._ends)] if self._ends else []
        for number, which, logits in sweep(
            self.model, self._rows, [*known, *versions], self.fit_input, self._linear, listener=self._listener
        ):
            logits, targets = logits[self._positions[number]], self._targets[number]
            if which < len(known):
                original = reference(logits, targets, torch.bfloat16)
                continue
            if not known:
                original = self._references[number]
            found[which - len(known)].append(compare(original, logits, targets))
        return [self._sums(rows) for rows in found]

    def _sums(self, rows: Sequence[tuple[F64, F64]]) -> Sums:
        total = Sums()
        for (kl, excess), owner, kind in zip(rows, self._owners, self._kinds, strict=True):
            found = sums_of(kl, excess, owner)
            total += found if kind is None else Sums(synthetic={kind: found.text["0"]})
        return total

    def _predicted(self, number: int) -> Reference:
        """The original's predictions of the row ``number``, whatever of its blocks is changed now."""
        if not self._ends:
            return self._references[number]
        row, at = self._rows[number], self._positions[number]
        with after_blocks(self.model) as finish, logits_at(self.model, at) as kept:
            logits = kept(finish({"input_ids": row[None]}, self._ends[number]).logits[0])
        return reference(logits, self._targets[number], torch.bfloat16)

    def measure_within(
        self,
        change: AbstractContextManager[Any],
        first: int,
        kept: list[dict[int, torch.Tensor]] | None = None,
    ) -> Sums:
        """The loss of the settled model within ``change``, which affects only layer ``first`` and subsequent layers.

        The states of each row at the inputs of layers after ``first`` are added to ``kept``.
        """
        if self.together:
            return self.measure_versions([Version(first, change=change)])[0]
        found, first = [], first_needed(self.model, first)
        later = {layer_of(i) for i in self._blocks if layer_of(i) > first}
        with torch.inference_mode(), change:
            for number, (states, row) in enumerate(zip(self._states, self._rows, strict=True)):
                original, at = self._predicted(number), self._positions[number]
                with (
                    recording_inputs(self.model, later if kept is not None else ()) as inputs,
                    starting_at(self.model, first, states[first]),
                ):
                    logits = row_logits(self.model, row, at)
                found.append(compare(original, logits, self._targets[number]))
                if kept is not None:
                    kept.append(dict(inputs))
        return self._sums(found)

    def _first_new(self, layers: Mapping[Block, Replacement]) -> int:
        # The first layer where this set and the settled one differ; the last one if they are equal.
        differs = [i for i in self._blocks if layers.get(i) is not self._linear.get(i)]
        return layer_of(differs[0] if differs else self._blocks[-1])

    def _settled(
        self, layers: dict[Block, Replacement], advance: Callable[[int], None]
    ) -> Iterator[torch.Tensor]:
        # A generator, so that the logits of only one row are in memory.
        self._linear, self._states = layers, []
        with torch.inference_mode(), replaced(self.model, layers, self.fit_input):
            for row, at in zip(self._rows, self._positions, strict=True):
                with recording_inputs(self.model, {layer_of(i) for i in self._blocks}) as states:
                    logits = row_logits(self.model, row, at)
                self._states.append(dict(states))
                advance(len(row))
                yield logits


def _same(one: Mapping[Block, Replacement], other: Mapping[Block, Replacement]) -> bool:
    """Whether they replace the same layers by the same."""
    return {i: id(m) for i, m in one.items()} == {i: id(m) for i, m in other.items()}


def loss_of_plan(meter: LossMeter, plan: Plan) -> Loss:
    """The loss of the meter's model with ``plan`` applied."""
    if not plan.chosen:
        return meter.measure({}).loss
    meter.settle({})
    if meter.together:
        return meter.measure_versions([version_of(meter.model, plan)])[0].loss
    return meter.measure_within(linearized(meter.model, plan), layer_of(min(plan.chosen))).loss
