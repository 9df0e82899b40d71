"""The tables a person reads, built once and drawn by the terminal and by Markdown alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbl_export.report.drawing import Table, figure, finite, mebibytes, number, one_minus, percent, worse
from nbl_export.report.encoders import agreement_table, likeness_table
from nbl_export.report.schema import Report
from nbl_export.report.selection import SCORES, curve_points, curve_table, result_table, score_key
from nbl_export.report.speed import BENCH, ENGINES, VERIFIED, speed_tables

if TYPE_CHECKING:
    from nbl_export.evaluate.results import Evaluation
    from nbl_export.report.bench import BenchReport


def checks_table(report: Report | Evaluation | BenchReport) -> Table:
    return Table(
        "Checks", ("check", "result", "detail"), tuple((c.name, c.status, c.detail) for c in report.checks)
    )


def graph_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """The graph before and after: sizes, the cache, and each op whose count changed."""
    rows: list[tuple[str, str, str, str]] = []

    def row(name: str, a: float, b: float, text: Any = lambda v: f"{v:,}") -> None:
        change = f"{(b - a) / a:+.1%}" if a else ""
        rows.append((name, text(a), text(b), change if a != b else "="))

    row("size on disk", before["file_bytes"], after["file_bytes"], mebibytes)
    row("parameters", before["parameters"], after["parameters"])
    if before["kv_pairs"]:
        row("KV pairs (layers with a cache)", before["kv_pairs"], after["kv_pairs"])
        row("KV cache, bytes per token", before["kv_bytes_per_token"], after["kv_bytes_per_token"])
    row("inputs", before["inputs"], after["inputs"])
    row("outputs", before["outputs"], after["outputs"])
    row("nodes", before["nodes"], after["nodes"])
    for op in sorted(before["ops"].keys() | after["ops"].keys()):
        a, b = before["ops"].get(op, 0), after["ops"].get(op, 0)
        if a != b:
            row(f"  {op}", a, b)
    return Table("Graph", ("", "base", "linearized", "change"), tuple(rows))


def layers_table(selection: Mapping[str, Any], proofs: Sequence[Mapping[str, Any]]) -> Table:
    """Every layer's scores, best first by the criterion, and which were chosen."""
    chosen, candidates = set(selection["layers"]), selection["candidates"]
    key = score_key(selection)
    proof = {p["layer"]: p for p in proofs}
    more = [
        k
        for k in SCORES
        if k not in ("cca", "nmse") and any(finite(c.get(k)) is not None for c in candidates)
    ]
    rows: list[tuple[str, ...]] = []
    marked = []
    for c in sorted(candidates, key=lambda c: (_rank(c.get(key)), c["layer"])):
        error = proof.get(c["layer"])
        if c["layer"] in chosen:
            marked.append(len(rows))
        rows.append(
            (
                str(c["layer"]),
                c["kind"],
                "linear" if c["layer"] in chosen else "attention",
                number(c["cca"], ".2f"),
                number(c["nmse"], ".4f"),
                *("" if c.get(k) is None else figure(c[k]) for k in more),
                worse(error["input_error"], error["output_error"]) if error else "",
            )
        )
    for index, what in selection["others"].items():
        rows.append((index, what, "no candidate", "", "", *("" for _ in more), ""))
    return Table(
        f"Layers by {selection['criterion']}",
        ("layer", "attention", "now", "CCA bound", "NMSE", *(SCORES[k] for k in more), "graph vs PyTorch"),
        tuple(rows),
        "CCA bound: the paper's Σ(1-ρ²) on the residual stream; NMSE: share of the attention output's variance "
        "that W, b leave unexplained (both: lower is more linear); last column: relative difference of the tensors "
        "found in the graph to PyTorch's, before replacing." + "".join(f" {_MEANING[k]}" for k in more),
        plot="layers",
        marked=tuple(marked),
    )


_MEANING = {
    "kl": "KL: to the original, with that layer alone replaced; greedy search takes layers one after the other, so "
    "that its order is another.",
    "sensitivity": "Sensitivity: KL by noise in the layer's output, for each share of its variance.",
    "predicted": "Predicted loss: sensitivity × NMSE.",
    "drop": "KL when left out: to the original, with that layer's attention writing nothing.",
}


def _rank(score: Any) -> float:
    """A layer that was not scored comes last."""
    return math.inf if (value := finite(score)) is None else value


_PARITY = {
    "max |Δ|": "max_abs",
    "mean |Δ|": "mean_abs",
    "p99 |Δ|": "p99_abs",
    "max rel": "max_rel",
    "mean rel": "mean_rel",
    "p99 rel": "p99_rel",
    "1-cos": "min_cosine",
    "KL": "max_kl",
}
_BRIEF = ("max |Δ|", "p99 |Δ|", "max rel", "1-cos", "KL")


def parity_table(parity: Mapping[str, Any], brief: bool = False) -> Table:
    """One row for each step of the parity run; ``brief`` keeps what 80 columns hold."""
    columns = _BRIEF if brief else tuple(_PARITY)
    keys = [_PARITY[c] for c in columns]
    rows = []
    for s in parity["steps"]:
        figures = [figure(s[k] if k != "min_cosine" else one_minus(s[k])) for k in keys]
        name = "prefill" if s["step"] == 0 else f"step {s['step']}"
        rows.append((name, str(s["tokens"]), *figures, percent(s["top1"]), figure(s["kv_max_rel"])))
    return Table(
        "Parity: linearized PyTorch against the rewritten graph",
        ("", "n", *columns, "top-1", "KV rel"),
        tuple(rows),
        f"{_gates(parity['gates'])}Prompts of {', '.join(map(str, parity['prompt_lengths']))} tokens, ragged in "
        "one batch; then teacher-forced decode steps with each side's own cache. Changing the embeddings' last bit "
        f"moves the PyTorch model's own logits by {figure(parity['rounding_noise'])}.{_own_loss(parity)}",
    )


def _gates(gates: Mapping[str, Any]) -> str:
    """The limits that there are; one without bound is "inf" in a report."""
    texts = {
        "max_abs_logit": "max |Δlogit| ≤ {:g}",
        "min_cosine": "cosine ≥ {:g}",
        "max_kl": "KL ≤ {:g}",
        "top1": f"top-1 {{:.0%}} up to near-ties of {gates['near_tie']:g}",
        "max_rel_kv": "KV ≤ {:g}",
    }
    bounds = {name: value for name in texts if math.isfinite(value := float(gates[name]))}
    held = [texts[name].format(value) for name, value in bounds.items() if (name, value) not in _NO_BOUND]
    return f"Gates: {', '.join(held)}. " if held else ""


_NO_BOUND = {("min_cosine", -1.0), ("top1", 0.0)}
_OWN = {
    "pytorch_in_precision": "PyTorch itself in {precision}, on the same tokens",
    "base_graph": "The unmodified {precision} graph against unmodified PyTorch, on the same tokens",
}


def _own_loss(parity: Mapping[str, Any]) -> str:
    """What is lost in the graph's precision anyway, for a graph that is not float32."""
    for key, whose in _OWN.items():
        if own := parity.get(key):
            worst, mean = max(s["max_abs"] for s in own), sum(s["mean_abs"] for s in own) / len(own)
            here = sum(s["mean_abs"] for s in parity["steps"]) / len(parity["steps"])
            return (
                f" {whose.format(precision=parity['precision'])}: max |Δlogit| {figure(worst)}, mean "
                f"{figure(mean)}; this graph's mean, {figure(here)}, may be "
                f"{parity['gates']['max_vs_own']:g} times that."
            )
    return ""


def method_table(loss: Mapping[str, Any]) -> Table:
    """What linearizing cost on held-out text."""
    return Table(
        "Method loss: original against linearized, held-out text",
        ("", "value", "standard error"),
        (
            ("perplexity, original", f"{number(loss['perplexity_original'], '.3f')}", ""),
            ("perplexity, linearized", f"{number(loss['perplexity_linearized'], '.3f')}", ""),
            (
                "perplexity ratio",
                f"{number(loss['perplexity_ratio'], '.4f')}",
                f"± {number(loss['perplexity_ratio_se'], '.4f')}",
            ),
            (
                "KL to the original, nats per token",
                f"{number(loss['kl'], '.4f')}",
                f"± {number(loss['kl_se'], '.4f')}",
            ),
        ),
        f"{loss['tokens']:,} tokens of {loss['documents']:,} documents that calibration did not see; "
        "standard errors over documents.",
    )


def engines_table(manifests: Sequence[Mapping[str, Any]]) -> Table:
    """What was built: one row for each engine."""
    rows = []
    for m in manifests:
        network = m["network"]
        count, fused = network["attention"], m["attention"]
        rows.append(
            (
                m["role"],
                mebibytes(m["size"]),
                f"{count} {fused}" if count else "in its parts" if m["kv_layers"] else "none",
                str(network["kv_cache_updates"] or ""),
                f"{sum(t['name'].startswith('past_key') for t in network['inputs'])}",
                f"{network['layers']:,}",
                f"{m['build_seconds']:.1f}",
            )
        )
    first = manifests[0]
    limits = first["limits"]
    targets = ", ".join(first["capabilities"])
    return Table(
        f"Engines: {first['library']} {first['library_version']}, {first['precision']}, {first['kv_cache']} cache",
        ("", "size", "attention", "cache updates", "KV inputs", "layers", "seconds"),
        tuple(rows),
        f"{'Ahead of time for' if first['ahead_of_time'] else 'For'} {targets}; batch ≤ {limits['max_batch']}, "
        f"prefill ≤ {limits['max_seq']:,} tokens, context ≤ {limits['max_context']:,}.",
    )


def precision_table(graph: Mapping[str, Any]) -> Table:
    """Which nodes of a half graph stay float32, and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kept in graph["kept_float32"]:
        reason = re.sub(r"^.* reaches [^ ]+ on", "reaches beyond the format on", kept["reason"])
        groups.setdefault((kept["op"], reason), []).append(kept["node"])
    rows = tuple((op, str(len(nodes)), reason, nodes[0]) for (op, reason), nodes in groups.items())
    return Table(
        f"What stays fp32 in the {graph['precision']} graph", ("op", "nodes", "why", "the first"), rows
    )


def report_tables(report: Report, brief: bool = False) -> list[Table]:
    """The tables of a report, in reading order; ``brief`` leaves out what a terminal has no room for."""
    tables = [graph_table(report.graph["before"], report.graph["after"])]
    if curve_points(report.selection):
        tables.append(curve_table(report.selection["curve"], brief))
    if "loss" in (report.selection.get("result") or {}):
        tables.append(result_table(report.selection))
    if report.method_loss:
        draw = likeness_table if "measures" in report.method_loss else method_table
        tables.append(draw(report.method_loss))
    if report.speed:
        tables += speed_tables(VERIFIED, report.speed, brief)
    if report.bench:
        tables += speed_tables(BENCH, report.bench.speed, brief)
    if report.parity:
        draw_parity = agreement_table if "outputs" in report.parity else parity_table
        tables.append(draw_parity(report.parity, brief))
    if report.engines:
        tables.append(engines_table(report.engines))
    if report.engine_speed:
        tables += speed_tables(ENGINES, report.engine_speed, brief)
    if not brief and report.graph.get("kept_float32"):
        tables.append(precision_table(report.graph))
    if not brief:
        tables.append(layers_table(report.selection, report.graph["proofs"]))
    return tables
