"""How layers were chosen and fitted: which score counts, what each K would have cost, and what the maps cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nbl_export.linearize.figures import Candidate, Loss
from nbl_export.linearize.selection import Curve, PlanLoss
from nbl_export.report.drawing import Table, figure, finite, listed, number
from nbl_export.report.schema import Selection
from nbl_export.settings import Budget
from nbl_export.settings.size import bytes_of


def milliseconds(value: float) -> str:
    """A time, with three digits."""
    return number(value, ".3g")


@dataclass(frozen=True)
class Score:
    """A score that a layer may have: as a reader knows it, its value and standard error, what it means, and how it is
    shown."""

    name: str
    of: Callable[[Candidate], float | None]
    se: Callable[[Candidate], float | None] = lambda _: None
    meaning: str = ""
    shown: Callable[[float], str] = figure


SCORES: Mapping[str, Score] = {
    "cca": Score("CCA bound", lambda c: c.cca),
    "nmse": Score("NMSE", lambda c: c.nmse),
    "kl": Score(
        "KL, nats per token",
        lambda c: c.kl,
        lambda c: c.kl_se,
        "KL: to the original, with only that layer replaced; greedy search adds layers one after another, so its "
        "order differs.",
    ),
    "sensitivity": Score(
        "sensitivity",
        lambda c: c.sensitivity,
        lambda c: c.sensitivity_se,
        "Sensitivity: KL caused by noise in the layer's output, per share of its variance.",
    ),
    "predicted": Score(
        "predicted loss", lambda c: c.predicted, meaning="Predicted loss: sensitivity × NMSE."
    ),
    "drop": Score(
        "KL when left out",
        lambda c: c.drop,
        lambda c: c.drop_se,
        "KL when left out: to the original, without that layer's attention.",
    ),
    "saved_ms": Score(
        "saves, ms",
        lambda c: c.saved_ms,
        meaning="Saves: of the workload; layers are ranked by their score for each millisecond.",
        shown=milliseconds,
    ),
}
# What the workload gains by what is known of its blocks.
BY_BLOCKS = "workload, by its blocks"
# What a criterion goes by, where it is no score of that name; greedy search begins with each layer's KL alone.
_GOES_BY = {"greedy": "kl", "linearity": "predicted"}
# How a fit is said, after "W and b are"; nbl_export/linearize/fits.py has them all.
_FITS = {
    "lmmse": "the LMMSE fit",
    "weighted": "the weighted fit (tokens by 1/‖h‖²)",
    "sequential": "the sequential fit",
    "drop": "zero (the layers are dropped)",
}


@dataclass(frozen=True)
class Bound:
    """One bound of a budget: how it is said, its value, and the name of the figure that it bounds."""

    text: str
    of: Callable[[Budget], float | None]
    figure: str


def _bytes(size: str | None) -> float | None:
    """The bytes of a bound; None for one that is none, as of a file that was changed."""
    try:
        return None if size is None else float(bytes_of(size))
    except ValueError:
        return None


BUDGETS = (
    Bound("perplexity ratio ≤ {:g}", lambda b: b.max_perplexity_ratio, "perplexity_ratio"),
    Bound("KL ≤ {:g}", lambda b: b.max_kl, "kl"),
    Bound("speedup ≥ {:g}×", lambda b: b.min_speedup, "speedup"),
    Bound("weights ≤ {:,.0f} bytes", lambda b: _bytes(b.max_weight_bytes), "weight_bytes"),
    Bound("KV cache ≤ {:,.0f} bytes", lambda b: _bytes(b.max_kv_bytes), "kv_bytes"),
)


def scored_by(criterion: str, candidates: Sequence[Candidate]) -> Score:
    """The score that the layers are shown by: the criterion's, or the paper's for a choice by hand."""
    score = SCORES.get(_GOES_BY.get(criterion, criterion))
    return score if score and any(finite(score.of(c)) is not None for c in candidates) else SCORES["cca"]


def fit_in_words(selection: Selection) -> str:
    """How W and b were fitted, and repaired."""
    words = _FITS.get(selection.fit, selection.fit)
    if selection.fit != "drop":
        ridge = selection.ridge
        by = "chosen by held-out error" if ridge is None else f"{number(ridge, 'g')}"
        words += f" on the {selection.fit_input} input, ridge {by}"
    steps = selection.repair
    words += f"; then {steps:,} steps of distillation" if steps else ""
    if rank := rank_in_words(selection):
        lost = list(((selection.result and selection.result.rank_lost) or {}).values())
        words += f"; W {rank}"
        words += f", which loses at most {max(lost):.2%} of the variance of a layer's output" if lost else ""
    return words


def rank_in_words(selection: Selection) -> str:
    """The rank that every W has, or those that were chosen; empty where W is whole."""
    if selection.rank:
        return f"of rank {selection.rank}"
    ranks = selection.result.ranks if selection.result else None
    if ranks is None:
        return ""
    low, high = min(ranks.values(), default=0), max(ranks.values(), default=0)
    if not ranks:
        return "whole, since no rank is without loss"
    return f"of rank {low}{f' to {high}' if high > low else ''} in {len(ranks)} of {len(selection.layers)} layers"


def curve_table(curve: Curve, brief: bool = False) -> Table:
    """Loss and speed of every K that was measured; ``brief`` leaves out which layers go."""
    points = curve.by_k
    used = any(p.workload_speedup is not None for p in points)
    raced = any(p.timed_speedup is not None for p in points)
    timed = any(p.prefill_speedup is not None or p.decode_speedup is not None for p in points)
    rows: list[tuple[str, ...]] = []
    marked = []
    for p in points:
        chosen = p.k == curve.chosen
        if chosen:
            marked.append(len(rows))
        rows.append(
            (
                f"{p.k}{', chosen' * chosen}",
                _with_error(p.perplexity_ratio, p.perplexity_ratio_se),
                _with_error(p.kl, p.kl_se),
                *((_times(p.workload_speedup),) if used else ()),
                *((_times(p.timed_speedup),) if raced else ()),
                *((_times(p.prefill_speedup), _times(p.decode_speedup)) if timed else ()),
                *(() if brief else (listed(p.layers),)),
            )
        )
    return Table(
        "Loss and speed by K" if used or raced or timed else "Loss by K",
        (
            "K",
            "perplexity ratio",
            "KL, nats per token",
            *((BY_BLOCKS,) if used else ()),
            *(("workload, timed",) if raced else ()),
            *(("prefill", "decode") if timed else ()),
            *(() if brief else ("layers",)),
        ),
        tuple(rows),
        _curve_note(curve, timed, used),
        plot="k-curve",
        marked=tuple(marked),
    )


def frontier_table(curve: Curve) -> Table:
    """What each way loses for what the workload gains, with as much of it as was measured."""
    rows = [
        (
            line.name,
            str(p.k),
            _times(p.workload_speedup),
            _with_error(p.perplexity_ratio, p.perplexity_ratio_se),
        )
        for line in curve.frontier
        for p in sorted(line.points, key=lambda p: p.k)
    ]
    marked = [i for i, p in enumerate(curve.by_k) if p.k == curve.chosen]
    return Table(
        "Loss by speed, each way",
        ("linear", "K", BY_BLOCKS, "perplexity ratio"),
        tuple(rows),
        "What the workload gains and loses in each way, as far as it was measured: with attention, MLPs or spans of "
        "layers alone linear, with both attention and MLPs, with all of them, and with blocks dropped.",
        plot="frontier",
        marked=tuple(marked),
    )


def result_table(selection: Selection, result: PlanLoss) -> Table:
    """What the maps that were kept cost, and what the distillation was worth; where that was measured."""
    # Each is what the one before became of.
    before_rank = loss = "as fitted"
    if result.before_repair:
        before_rank = loss = f"after {selection.repair:,} steps of distillation"
    if result.before_rank:
        loss = rank_in_words(selection)
    measured = (("as fitted", result.before_repair), (before_rank, result.before_rank), (loss, result.loss))
    rows = tuple((name, _ratio(cost), _with_error(cost.kl, cost.kl_se)) for name, cost in measured if cost)
    if (predicted := finite(result.predicted_excess)) is not None:
        rows = (("as predicted, layer by layer", f"{_exp(predicted):.4f}", "–"), *rows)
    return Table(
        "Loss of the chosen layers, selection text",
        ("", "perplexity ratio", "KL, nats per token"),
        rows,
        f"W and b are {fit_in_words(selection)}. All chosen layers replaced, on the selection text; ± standard "
        "errors over documents. The K curve uses the W and b that layers are chosen by.",
    )


def _exp(excess: float) -> float:
    """A perplexity ratio; one beyond the largest number is that."""
    return math.exp(min(excess, 700.0))


def _ratio(loss: Loss) -> str:
    excess, error = finite(loss.excess), finite(loss.excess_se)
    if excess is None:
        return _with_error(loss.excess, None)
    ratio = _exp(excess)
    return _with_error(ratio, None if error is None else ratio * error)


def _curve_note(curve: Curve, timed: bool, used: bool) -> str:
    sentences = []
    if curve.tokens and curve.documents:
        sentences.append(
            f"Loss on {curve.tokens:,} tokens of {curve.documents:,} documents, ± standard errors over documents."
        )
    if timed and curve.context:
        sentences.append(f"Speedup of the linearized graph at {curve.context:,} tokens.")
    if used:
        sentences.append(
            "Workload, by its blocks: its time less what each of them saves, which is with the layers."
        )
    bounds = [b.text.format(limit) for b in BUDGETS if (limit := finite(b.of(curve.budget))) is not None]
    if bounds:
        sentences.append(f"Budget: {', '.join(bounds)}.")
    return " ".join(sentences)


def _with_error(value: float, error: float | None) -> str:
    return number(value, ".4f") + (f" ± {number(error, '.4f')}" if error is not None else "")


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{number(speedup, '.2f')}×"
