"""Tell how layers were chosen and fitted: their scores, what each K would have cost, and what the maps cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nbl_export.blocks import ATTENTION, Block, all_parts, part_of
from nbl_export.graph.summary import ProofErrors
from nbl_export.linearize.selection import Candidate, Curve, PlanLoss, per_saving
from nbl_export.report.drawing import (
    Table,
    figure,
    finite,
    fit_in_words,
    listed,
    number,
    rank_in_words,
)
from nbl_export.report.schema import Selection
from nbl_export.settings import Budget
from nbl_export.settings.definition import bytes_of


class Score(NamedTuple):
    """A score that a layer may have: the field of its candidate, its name, what it means, and how it is shown."""

    field: str
    name: str
    meaning: str = ""
    shown: Callable[[Any], str] = figure

    def known(self, candidate: Candidate) -> bool:
        value = getattr(candidate, self.field)
        return bool(value) if isinstance(value, Mapping) else finite(value) is not None


def _by_kind(kl: Mapping[str, float]) -> str:
    """The mean of the kinds, and the one that costs most."""
    worst = max(kl, key=lambda kind: kl[kind])
    return f"{figure(sum(kl.values()) / len(kl))} ({worst} {figure(kl[worst])})"


SCORES: Mapping[str, Score] = {
    score.field: score
    for score in (
        Score("cca", "CCA bound"),
        Score("nmse", "NMSE"),
        Score(
            "kl",
            "KL, nats per token",
            "KL: to the original, with only that layer replaced; greedy search adds layers one after another, so its "
            "order differs.",
        ),
        Score(
            "synthetic",
            "KL, synthetic rows",
            "KL, synthetic rows: where the context alone tells what comes next (repeats, formats, look-ups, few-shot), "
            "the mean of all kinds and the kind that costs most: what a layer does that has much of it is to copy. "
            "Greedy search adds half of it to the KL.",
            _by_kind,
        ),
        Score(
            "stable",
            "chosen in",
            "Chosen in: the share of resampled documents by which the layer is chosen.",
            "{:.0%}".format,
        ),
        Score(
            "sensitivity",
            "sensitivity",
            "Sensitivity: KL caused by noise in the layer's output, per share of its variance.",
        ),
        Score("predicted", "predicted loss", "Predicted loss: sensitivity × NMSE."),
        Score(
            "drop",
            "KL when left out",
            "KL when left out: to the original, without that layer's attention.",
        ),
        Score(
            "saved_ms",
            "saves, ms",
            "Saves: of the workload; layers are ranked by their score for each millisecond.",
        ),
    )
}
# What the workload gains by what is known of its blocks.
BY_BLOCKS = "workload, by its blocks"
# What a criterion goes by, where it is no score of that name; greedy search begins with each layer's KL alone.
_GOES_BY = {"greedy": "kl", "linearity": "predicted"}
# Each bound of a budget: the figure that it bounds, how it is said, and its value.
BUDGETS: Sequence[tuple[str, str, Callable[[Budget], float | None]]] = (
    ("perplexity_ratio", "perplexity ratio ≤ {:g}", lambda b: b.max_perplexity_ratio),
    ("kl", "KL ≤ {:g}", lambda b: b.max_kl),
    ("speedup", "speedup ≥ {:g}×", lambda b: b.min_speedup),
    (
        "weight_bytes",
        "weights ≤ {:,.0f} bytes",
        lambda b: bytes_of(b.max_weight_bytes) if b.max_weight_bytes else None,
    ),
    ("kv_bytes", "KV cache ≤ {:,.0f} bytes", lambda b: bytes_of(b.max_kv_bytes) if b.max_kv_bytes else None),
)


def bounds_of(budget: Budget) -> list[tuple[str, str, float]]:
    """The figures that a budget bounds: each with how that is said, and the limit."""
    return [
        (figure, text.format(limit), limit)
        for figure, text, of in BUDGETS
        if (limit := finite(of(budget))) is not None
    ]


def scored_by(criterion: str, candidates: Sequence[Candidate]) -> Score:
    """The score that the layers are shown by: the criterion's, or the paper's for a choice by hand."""
    score = SCORES.get(_GOES_BY.get(criterion, criterion))
    return score if score and any(map(score.known, candidates)) else SCORES["cca"]


def layers_table(selection: Selection, proofs: Sequence[ProofErrors]) -> Table:
    """Every layer's scores, best first by the criterion, and which were chosen."""
    chosen, candidates = set(selection.layers), selection.candidates
    parts, score = set(all_parts(chosen)), scored_by(selection.criterion, selection.candidates)
    proof = {p.layer: figure(max(p.input_error, p.output_error)) for p in proofs}
    more = [s for s in SCORES.values() if s.field not in ("cca", "nmse") and any(map(s.known, candidates))]

    def rank(c: Candidate) -> tuple[float, Block]:
        """A layer that was not scored comes last."""
        value, saved = finite(getattr(c, score.field)), 1.0 if c.saved_ms is None else c.saved_ms
        return (math.inf if value is None else per_saving(value, saved), c.layer)

    ranked = sorted(candidates, key=rank)
    rows = [
        (
            str(c.layer),
            c.kind,
            "linear" if c.layer in chosen else "in a span" if c.layer in parts else part_of(c.layer),
            number(c.cca, ".2f"),
            number(c.nmse, ".4f"),
            *(s.shown(getattr(c, s.field)) if s.known(c) else "" for s in more),
            proof.get(c.layer, ""),
        )
        for c in ranked
    ]
    rows += [(i, what, "no candidate", *[""] * (3 + len(more))) for i, what in selection.others.items()]
    kind = "attention" if all(part_of(c.layer) == ATTENTION for c in candidates) else "block"
    notes = [
        "CCA bound: the paper's Σ(1-ρ²) on the residual stream; NMSE: share of the attention output's variance "
        "that W, b leave unexplained (both: lower is more linear); last column: relative difference of the tensors "
        "found in the graph to PyTorch's, before replacing.",
        *(s.meaning for s in more),
        f"A layer's KL is over {selection.kl_tokens:,} tokens." if selection.kl_tokens else "",
        f"Workload: {'; '.join(selection.workload)}: {number(selection.workload_ms, '.3g')} ms."
        if selection.workload and selection.workload_ms is not None
        else "",
    ]
    return Table(
        f"Layers by {selection.criterion}",
        ("layer", kind, "now", "CCA bound", "NMSE", *(s.name for s in more), "graph vs PyTorch"),
        tuple(rows),
        " ".join(filter(None, notes)),
        plot="layers",
        marked=tuple(i for i, c in enumerate(ranked) if c.layer in chosen),
    )


# Speedups of the K curve, by their heading; a column that no point has is left out.
SPEEDUPS = {
    BY_BLOCKS: "workload_speedup",
    "workload, timed": "timed_speedup",
    "prefill": "prefill_speedup",
    "decode": "decode_speedup",
}


def speedups_of(curve: Curve) -> dict[str, str]:
    """The fields of :class:`CurvePoint` of the speedups that were measured anywhere, by their heading."""
    return {
        name: of for name, of in SPEEDUPS.items() if any(getattr(p, of) is not None for p in curve.points)
    }


def curve_table(curve: Curve, brief: bool = False) -> Table:
    """Loss and speed of every K that was measured; ``brief`` leaves out which layers go."""
    points, fast = curve.by_k, speedups_of(curve)
    rows = (
        (
            f"{p.k}{', chosen' * (p.k == curve.chosen)}",
            _with_error(p.perplexity_ratio, p.perplexity_ratio_se),
            _with_error(p.kl, p.kl_se),
            *("" if (one := getattr(p, of)) is None else f"{number(one, '.2f')}×" for of in fast.values()),
            *(() if brief else (listed(p.layers),)),
        )
        for p in points
    )
    bounds = [said for _, said, _ in bounds_of(curve.budget)]
    notes = [
        f"Loss on {curve.tokens:,} tokens of {curve.documents:,} documents, ± standard errors over documents."
        if curve.tokens and curve.documents
        else "",
        f"Speedup of the linearized graph at {curve.context:,} tokens."
        if curve.context and {"prefill", "decode"} & fast.keys()
        else "",
        "Workload, by its blocks: its time less what each of them saves, which is with the layers."
        if BY_BLOCKS in fast
        else "",
        f"Budget: {', '.join(bounds)}." if bounds else "",
    ]
    return Table(
        "Loss and speed by K" if fast else "Loss by K",
        ("K", "perplexity ratio", "KL, nats per token", *fast, *(() if brief else ("layers",))),
        tuple(rows),
        " ".join(filter(None, notes)),
        plot="k-curve",
        marked=tuple(i for i, p in enumerate(points) if p.k == curve.chosen),
    )


def result_table(selection: Selection, result: PlanLoss) -> Table:
    """What the maps that were kept cost, and what the distillation was worth; where that was measured."""
    # Each is what the one before became of.
    repaired = f"after {selection.repair:,} steps of distillation" if result.before_repair else "as fitted"
    last = rank_in_words(selection) if result.before_rank else repaired
    measured = (("as fitted", result.before_repair), (repaired, result.before_rank), (last, result.loss))
    rows = tuple(
        (name, _with_error(c.perplexity_ratio, finite(c.perplexity_ratio_se)), _with_error(c.kl, c.kl_se))
        for name, c in measured
        if c
    )
    if (predicted := finite(result.predicted_excess)) is not None:
        rows = (("as predicted, layer by layer", f"{math.exp(min(predicted, 700)):.4f}", "–"), *rows)
    return Table(
        "Loss of the chosen layers, selection text",
        ("", "perplexity ratio", "KL, nats per token"),
        rows,
        f"W and b are {fit_in_words(selection)}. All chosen layers replaced, on the selection text; ± standard "
        "errors over documents. The K curve uses the W and b that layers are chosen by.",
    )


def _with_error(value: float, error: float | None) -> str:
    return number(value, ".4f") + (f" ± {number(error, '.4f')}" if error is not None else "")
