"""The tables that only an encoder has: every output's parity, and how like the original it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nbl_export.report.drawing import Table, figure, number, one_minus, percent

_FIGURES = {
    "max |Δ|": "max_abs",
    "mean |Δ|": "mean_abs",
    "p99 |Δ|": "p99_abs",
    "max rel": "max_rel",
    "mean rel": "mean_rel",
    "1-cos": "min_cosine",
}
_BRIEF = ("max |Δ|", "max rel", "1-cos")
_LOGITS = "logits"


def agreement_table(parity: Mapping[str, Any], brief: bool = False) -> Table:
    """One row for each output of the parity run; ``brief`` keeps what 80 columns hold."""
    columns = _BRIEF if brief else tuple(_FIGURES)
    heads = any(o["output"] == _LOGITS for o in parity["outputs"])
    rows = []
    for o in parity["outputs"]:
        keys = [_FIGURES[c] for c in columns]
        figures = [figure(one_minus(o[k]) if k == "min_cosine" else o[k]) for k in keys]
        classes = [figure(o["max_kl"]), percent(o["top1"])] if o["output"] == _LOGITS else ["", ""]
        rows.append((o["output"], str(o["tokens"]), *figures, *(classes if heads else [])))
    lengths = ", ".join(map(str, parity["lengths"]))
    what = (
        f"Texts of {lengths} tokens, padded to one batch"
        if lengths
        else f"One batch of {parity['rows']} images"
    )
    return Table(
        "Parity: linearized PyTorch against the rewritten graph",
        ("", "n", *columns, *(("KL", "top-1") if heads else ())),
        tuple(rows),
        f"{_gates(parity['gates'], heads)}{what}; only real tokens are compared.{_own(parity)}",
    )


def _gates(gates: Mapping[str, Any], heads: bool) -> str:
    texts = {"max_rel_state": "states and vectors: max rel ≤ {:g}", "min_cosine": "cosine ≥ {:g}"}
    if heads:
        texts |= {"max_abs_logit": "|Δlogit| ≤ {:g}", "max_kl": "KL ≤ {:g}", "top1": "top-1 {:.0%}"}
    bounds = {name: value for name in texts if math.isfinite(value := float(gates[name]))}
    return f"Gates: {', '.join(texts[name].format(value) for name, value in bounds.items())}. "


def _own(parity: Mapping[str, Any]) -> str:
    """What is lost in the graph's precision anyway, for a graph that is not float32."""
    if not (own := parity.get("pytorch_in_precision")):
        return ""
    means = "; ".join(
        f"{o['output']} {figure(theirs['mean_abs'])}"
        for o, theirs in zip(parity["outputs"], own, strict=True)
    )
    return (
        f" PyTorch itself in {parity['precision']}, on the same batch, has a mean |Δ| of: {means}; this graph's may be "
        f"{parity['gates']['max_vs_own']:g} times that."
    )


def likeness_table(loss: Mapping[str, Any]) -> Table:
    """What linearizing cost, as the likeness of the two models' outputs."""
    rows = tuple(
        (m["what"], number(m["value"], ".6f"), f"± {number(m['se'], '.6f')}", f"{m['count']:,}")
        for m in loss["measures"]
    )
    return Table(
        f"Method loss: original against linearized, held-out {loss['unit']}",
        ("", "mean", "standard error", "n"),
        rows,
        f"{loss['documents']:,} {loss['unit']} that calibration did not see; standard errors over {loss['unit']}.",
    )
