"""The tables a person reads, built once and drawn by the terminal and by Markdown alike."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from nbl_export.blocks import ATTENTION, Block, all_parts, part_of
from nbl_export.checks import Check
from nbl_export.engine.manifest import Manifest
from nbl_export.graph.summary import GraphSummary
from nbl_export.linearize.figures import per_saving
from nbl_export.report.drawing import Table, figure, finite, mebibytes, number
from nbl_export.report.forms import forms_table
from nbl_export.report.header import Header
from nbl_export.report.loss import loss_table
from nbl_export.report.parity import parity_table
from nbl_export.report.schema import Graph, Report, Selection
from nbl_export.report.selection import (
    SCORES,
    curve_table,
    frontier_table,
    milliseconds,
    result_table,
    scored_by,
)
from nbl_export.report.speed import BENCH, ENGINES, VERIFIED, speed_tables
from nbl_export.rewrite.summary import ProofErrors


def checks_table(report: Header) -> Table:
    """The verdicts of any report."""
    return verdicts_table(report.checks)


def verdicts_table(checks: Sequence[Check]) -> Table:
    """What each check has found."""
    return Table("Checks", ("check", "result", "detail"), tuple((c.name, c.status, c.detail) for c in checks))


def graph_table(before: GraphSummary, after: GraphSummary) -> Table:
    """The graph before and after: sizes, the cache, and each op whose count changed."""
    rows: list[tuple[str, str, str, str]] = []

    def row(name: str, a: float, b: float, text: Any = lambda v: f"{v:,}") -> None:
        change = f"{(b - a) / a:+.1%}" if a else ""
        rows.append((name, text(a), text(b), change if a != b else "="))

    row("size on disk", before.file_bytes, after.file_bytes, mebibytes)
    row("parameters", before.parameters, after.parameters)
    if before.kv_pairs:
        row("KV pairs (layers with a cache)", before.kv_pairs, after.kv_pairs)
        row("KV cache, bytes per token", before.kv_bytes_per_token, after.kv_bytes_per_token)
    row("inputs", before.inputs, after.inputs)
    row("outputs", before.outputs, after.outputs)
    row("nodes", before.nodes, after.nodes)
    for op in sorted(before.ops.keys() | after.ops.keys()):
        a, b = before.ops.get(op, 0), after.ops.get(op, 0)
        if a != b:
            row(f"  {op}", a, b)
    return Table("Graph", ("", "base", "linearized", "change"), tuple(rows))


def layers_table(selection: Selection, proofs: Sequence[ProofErrors]) -> Table:
    """Every layer's scores, best first by the criterion, and which were chosen."""
    chosen, candidates = set(selection.layers), selection.candidates
    score = scored_by(selection.criterion, candidates)
    proof = {p.layer: p for p in proofs}
    always = (SCORES["cca"], SCORES["nmse"])
    more = [
        s for s in SCORES.values() if s not in always and any(finite(s.of(c)) is not None for c in candidates)
    ]
    kind = "attention" if all(part_of(c.layer) == ATTENTION for c in candidates) else "block"
    within = set(all_parts(chosen))
    rows: list[tuple[str, ...]] = []
    marked = []
    for c in sorted(candidates, key=lambda c: (_rank(score.of(c), c.saved_ms), c.layer)):
        error = proof.get(c.layer)
        if c.layer in chosen:
            marked.append(len(rows))
        rows.append(
            (
                str(c.layer),
                c.kind,
                _now(c.layer, chosen, within),
                number(c.cca, ".2f"),
                number(c.nmse, ".4f"),
                *("" if (value := s.of(c)) is None else s.shown(value) for s in more),
                figure(max(error.input_error, error.output_error)) if error else "",
            )
        )
    for index, what in selection.others.items():
        rows.append((index, what, "no candidate", "", "", *("" for _ in more), ""))
    return Table(
        f"Layers by {selection.criterion}",
        ("layer", kind, "now", "CCA bound", "NMSE", *(s.name for s in more), "graph vs PyTorch"),
        tuple(rows),
        "CCA bound: the paper's Σ(1-ρ²) on the residual stream; NMSE: share of the attention output's variance "
        "that W, b leave unexplained (both: lower is more linear); last column: relative difference of the tensors "
        "found in the graph to PyTorch's, before replacing."
        + "".join(f" {s.meaning}" for s in more)
        + (f" A layer's KL is over {selection.kl_tokens:,} tokens." if selection.kl_tokens else "")
        + _workload(selection),
        plot="layers",
        marked=tuple(marked),
    )


def _now(block: Block, chosen: Collection[Block], within: Collection[Block]) -> str:
    """What became of a candidate: that it is a part of something else that was chosen, too."""
    if block in chosen:
        return "linear"
    return "in a span" if block in within else part_of(block)


def _workload(selection: Selection) -> str:
    if not selection.workload or selection.workload_ms is None:
        return ""
    how = "measured" if selection.measured_cost else "at the least, counted from the graph"
    return f" Workload: {'; '.join(selection.workload)}: {milliseconds(selection.workload_ms)} ms, {how}."


def _rank(score: float | None, saved: float | None) -> float:
    """A layer that was not scored comes last."""
    return (
        math.inf if (value := finite(score)) is None else per_saving(value, 1.0 if saved is None else saved)
    )


def engines_table(manifests: Sequence[Manifest]) -> Table:
    """What was built: one row for each engine."""
    rows = []
    for m in manifests:
        network = m.network
        count = network.attention
        rows.append(
            (
                m.role,
                mebibytes(m.size),
                f"{count} {m.attention}" if count else "decomposed" if m.kv_layers else "none",
                str(network.kv_cache_updates or ""),
                f"{sum(t.name.startswith('past_key') for t in network.inputs)}",
                f"{network.layers:,}",
                f"{m.build_seconds:.1f}",
            )
        )
    first = manifests[0]
    limits = first.limits
    targets = ", ".join(first.capabilities)
    return Table(
        f"Engines: {first.library} {first.library_version}, {first.precision}, {first.kv_cache} cache",
        ("", "size", "attention", "cache updates", "KV inputs", "layers", "seconds"),
        tuple(rows),
        f"{'Ahead of time for' if first.ahead_of_time else 'For'} {targets}; batch ≤ {limits.max_batch}, "
        f"prefill ≤ {limits.max_seq:,} tokens, context ≤ {limits.max_context:,}.",
    )


def precision_table(graph: Graph) -> Table:
    """Which nodes of a half graph stay float32, and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kept in graph.kept_float32:
        reason = re.sub(r"^.* reaches [^ ]+ on", "reaches beyond the format on", kept.reason)
        groups.setdefault((kept.op, reason), []).append(kept.node)
    rows = tuple((op, str(len(nodes)), reason, nodes[0]) for (op, reason), nodes in groups.items())
    return Table(
        f"Nodes that stay fp32 in the {graph.precision} graph", ("op", "nodes", "why", "the first"), rows
    )


def report_tables(report: Report, brief: bool = False) -> list[Table]:
    """The tables of a report, in reading order; ``brief`` leaves out what a terminal has no room for."""
    selection, graph = report.selection, report.graph
    tables = [graph_table(graph.before, graph.after)]
    if selection.curve and selection.curve.points:
        tables.append(curve_table(selection.curve, brief))
        if selection.curve.others and not brief:
            tables.append(frontier_table(selection.curve))
    if selection.result and selection.result.loss:
        tables.append(result_table(selection, selection.result))
    if report.method_loss:
        tables.append(_dated(loss_table(report.method_loss), report, "method_loss"))
    if report.speed:
        first, *more = speed_tables(VERIFIED, report.speed, brief)
        tables += [_dated(first, report, "speed"), *more]
    if report.bench:
        tables += speed_tables(BENCH, report.bench.speed, brief)
    if report.parity:
        tables.append(parity_table(report.parity, brief))
    if report.engines:
        tables.append(engines_table(report.engines))
    if report.engine_speed:
        first, *more = speed_tables(ENGINES, report.engine_speed, brief)
        tables += [_dated(first, report, "engine_speed"), *more]
    if report.forms:
        tables.append(forms_table(report.forms))
    if not brief and graph.kept_float32:
        tables.append(precision_table(graph))
    if not brief:
        tables.append(layers_table(selection, graph.proofs))
    return tables


def _dated(table: Table, report: Report, section: str) -> Table:
    """The ``table`` of a section, with when it was measured if that was in an earlier verification."""
    kept = report.kept.get(section)
    if kept is None:
        return table
    here, there = report.environment.processor, kept.environment.processor
    asked = ", ".join(
        f"{name} {value}" for name, value in kept.settings.items() if name in ("contexts", "rounds")
    )
    return replace(
        table,
        note=f"{table.note} Kept from an earlier verification of the same graphs: measured {kept.created} with "
        f"nbl-export {kept.tool_version}{f' on {there}' if here != there else ''}"
        f"{f' ({asked})' if asked and 'speed' in section else ''}.".lstrip(),
    )
