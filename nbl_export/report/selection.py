"""What was known when the layers were chosen: which score counts, and what each K would have cost."""

from __future__ import annotations

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
    return criterion if any(finite(c.get(criterion)) is not None for c in selection["candidates"]) else "cca"


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


def _curve_note(curve: Mapping[str, Any], timed: bool) -> str:
    sentences = []
    if curve.get("tokens") and curve.get("documents"):
        sentences.append(
            f"Loss on {curve['tokens']:,} tokens of {curve['documents']:,} documents, ± standard errors over documents."
        )
    if timed and curve.get("context"):
        sentences.append(f"Speedup of the linearized graph at {curve['context']:,} tokens.")
    budget = curve.get("budget") or {}
    bounds = [text.format(bound) for name, _, text in BUDGETS if (bound := finite(budget.get(name)))]
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
