"""How layers were chosen and fitted: which score counts, what each K would have cost, and what the maps cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nbl_export.report.drawing import Table, finite, number, spans

# The scores a layer may have, as a reader knows them.
SCORES = {
    "cca": "CCA bound",
    "nmse": "NMSE",
    "kl": "KL, nats per token",
    "sensitivity": "sensitivity",
    "predicted": "predicted loss",
    "drop": "KL when left out",
}
# What a criterion goes by, where it is no score of that name; greedy search begins with each layer's KL alone.
_GOES_BY = {"greedy": "kl", "linearity": "predicted"}
# How a fit is said, after "W and b are"; nbl_export/linearize/fits.py has them all.
_FITS = {
    "lmmse": "the LMMSE fit",
    "weighted": "the weighted fit (tokens by 1/‖h‖²)",
    "sequential": "the sequential fit",
    "drop": "nil (the layers are left out)",
}
# One row for each budget: its name in the report, the figure of a point it bounds, and how it is said.
BUDGETS = (
    ("max_perplexity_ratio", "perplexity_ratio", "perplexity ratio ≤ {:g}"),
    ("max_kl", "kl", "KL ≤ {:g}"),
    ("min_speedup", "speedup", "speedup ≥ {:g}×"),
)


def score_key(selection: Mapping[str, Any]) -> str:
    """The score that the layers are shown by: the criterion's, or the paper's for a choice by hand."""
    criterion = str(selection["criterion"])
    key = _GOES_BY.get(criterion, criterion)
    return key if any(finite(c.get(key)) is not None for c in selection["candidates"]) else "cca"


def fit_in_words(selection: Mapping[str, Any]) -> str:
    """How W and b were fitted, and repaired."""
    fit = str(selection.get("fit", "lmmse"))  # reports of earlier versions know one fit alone
    words = _FITS.get(fit, fit)
    if fit != "drop":
        ridge = selection["ridge"]
        by = "chosen by held-out error" if ridge is None else f"{number(ridge, 'g')}"
        words += f" on the {selection['fit_input']} input, ridge {by}"
    steps = selection.get("repair", 0)
    words += f"; then {steps:,} steps of distillation" if steps else ""
    if rank := selection.get("rank"):
        lost = list(((selection.get("result") or {}).get("rank_lost") or {}).values())
        words += f"; W of rank {rank}"
        words += f", which loses at most {max(lost):.2%} of the variance of a layer's output" if lost else ""
    return words


def curve_points(selection: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points of the K curve by K; none where it was not measured."""
    curve = selection.get("curve") or {}
    return sorted(curve.get("points") or (), key=lambda p: p["k"])


def curve_table(curve: Mapping[str, Any], brief: bool = False) -> Table:
    """Loss and speed of every K that was measured; ``brief`` leaves out which layers go."""
    points = curve_points({"curve": curve})
    timed = any(p.get(f"{phase}_speedup") is not None for p in points for phase in ("prefill", "decode"))
    rows: list[tuple[str, ...]] = []
    marked = []
    for p in points:
        chosen = p["k"] == curve.get("chosen")
        if chosen:
            marked.append(len(rows))
        rows.append(
            (
                f"{p['k']}{', chosen' * chosen}",
                _with_error(p, "perplexity_ratio"),
                _with_error(p, "kl"),
                *((_times(p.get("prefill_speedup")), _times(p.get("decode_speedup"))) if timed else ()),
                *(() if brief else (spans(p.get("layers") or ()),)),
            )
        )
    return Table(
        "Loss and speed by K",
        (
            "K",
            "perplexity ratio",
            "KL, nats per token",
            *(("prefill", "decode") if timed else ()),
            *(() if brief else ("layers",)),
        ),
        tuple(rows),
        _curve_note(curve, timed),
        plot="k-curve",
        marked=tuple(marked),
    )


def result_table(selection: Mapping[str, Any]) -> Table:
    """What the maps that were kept cost, and what the distillation was worth; where that was measured."""
    result = selection["result"]
    # Each is what the one before became of.
    names = {"before_repair": "as fitted", "before_rank": "as fitted", "loss": "as fitted"}
    if "before_repair" in result:
        names["before_rank"] = names["loss"] = f"after {selection.get('repair', 0):,} steps of distillation"
    if "before_rank" in result:
        names["loss"] = f"of rank {selection['rank']}"
    rows = tuple(
        (
            name,
            _with_error(_as_ratio(result[key]), "perplexity_ratio"),
            _with_error(result[key], "kl"),
        )
        for key, name in names.items()
        if key in result
    )
    if (predicted := finite(result.get("predicted_excess"))) is not None:
        rows = (("as predicted, layer by layer", f"{math.exp(min(predicted, 700.0)):.4f}", "–"), *rows)
    return Table(
        "Loss of the maps that were kept, selection text",
        ("", "perplexity ratio", "KL, nats per token"),
        rows,
        f"W and b are {fit_in_words(selection)}. All chosen layers replaced, on the text that they were chosen by; "
        "± standard errors over documents. The K curve is of the maps that layers are chosen by.",
    )


def _as_ratio(loss: Mapping[str, Any]) -> dict[str, Any]:
    excess, error = finite(loss["excess"]), finite(loss["excess_se"])
    if excess is None:
        return {"perplexity_ratio": loss["excess"]}
    ratio = math.exp(min(excess, 700.0))
    return {"perplexity_ratio": ratio, "perplexity_ratio_se": None if error is None else ratio * error}


def _curve_note(curve: Mapping[str, Any], timed: bool) -> str:
    sentences = []
    if curve.get("tokens") and curve.get("documents"):
        sentences.append(
            f"Loss on {curve['tokens']:,} tokens of {curve['documents']:,} documents, ± standard errors over documents."
        )
    if timed and curve.get("context"):
        sentences.append(f"Speedup of the linearized graph at {curve['context']:,} tokens.")
    budget = curve.get("budget") or {}
    bounds = [
        text.format(bound) for name, _, text in BUDGETS if (bound := finite(budget.get(name))) is not None
    ]
    if bounds:
        sentences.append(f"Budget: {', '.join(bounds)}.")
    return " ".join(sentences)


def _with_error(point: Mapping[str, Any], key: str) -> str:
    value, error = point.get(key), point.get(f"{key}_se")
    if value is None:
        return ""
    return number(value, ".4f") + (f" ± {number(error, '.4f')}" if error is not None else "")


def _times(speedup: Any) -> str:
    return "" if speedup is None else f"{number(speedup, '.2f')}×"
