"""Build the tables a person reads, drawn by the terminal, by Markdown and by the page alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nbl_export.engine.manifest import Manifest
from nbl_export.graph.summary import GraphSummary
from nbl_export.records import Check
from nbl_export.report.drawing import (
    Table,
    figure,
    finite,
    mebibytes,
    milliseconds,
    number,
)
from nbl_export.report.schema import Conversion, Graph, Report
from nbl_export.report.selection import curve_table, layers_table, result_table
from nbl_export.verify.parity.figures import (
    LOGITS,
    DecoderParity,
    EncoderParity,
    Gates,
    Likeness,
    MethodLoss,
    OutputParity,
    Parity,
    StepParity,
)
from nbl_export.verify.speed.values import DECODE, ENCODE, PREFILL, Ratio, Result, Speed, Timing


def verdicts_table(checks: Sequence[Check]) -> Table:
    """What each check has found."""
    return Table("Checks", ("check", "result", "detail"), tuple((c.name, c.status, c.detail) for c in checks))


def graph_table(before: GraphSummary, after: GraphSummary) -> Table:
    """The graph before and after: sizes, the cache, and each op whose count changed."""
    figures = {
        "size on disk": "file_bytes",
        "parameters": "parameters",
        **({"KV pairs (layers with a cache)": "kv_pairs"} if before.kv_pairs else {}),
        **({"KV cache, bytes per token": "kv_bytes_per_token"} if before.kv_pairs else {}),
        **{name: name for name in ("inputs", "outputs", "nodes")},
    }
    ops = ((op, before.ops.get(op, 0), after.ops.get(op, 0)) for op in sorted({**before.ops, **after.ops}))
    counts = [
        *((name, getattr(before, of), getattr(after, of)) for name, of in figures.items()),
        *((f"  {op}", a, b) for op, a, b in ops if a != b),
    ]
    rows = (
        (
            name,
            *(mebibytes(v) if name == "size on disk" else f"{v:,}" for v in (a, b)),
            "=" if a == b else f"{(b - a) / a:+.1%}" if a else "",
        )
        for name, a, b in counts
    )
    return Table("Graph", ("", "base", "linearized", "change"), tuple(rows))


# parity ------------------------------------------------------------------------------------------

_FIGURES: Mapping[str, Callable[[Any], str]] = {
    "max |Δ|": lambda f: figure(f.max_abs),
    "mean |Δ|": lambda f: figure(f.mean_abs),
    "p99 |Δ|": lambda f: figure(f.p99_abs),
    "max rel": lambda f: figure(f.max_rel),
    "mean rel": lambda f: figure(f.mean_rel),
    "p99 rel": lambda f: figure(f.p99_rel),
    "1-cos": lambda f: figure(1 - f.min_cosine),
    "KL": lambda f: figure(f.max_kl),
    "top-1": lambda f: number(f.top1, ".1%").replace(".0%", "%"),
    "KV rel": lambda f: figure(f.kv_max_rel),
}
_BRIEF = ("max |Δ|", "p99 |Δ|", "max rel", "1-cos", "KL", "top-1", "KV rel")
_OF_LOGITS = ("KL", "top-1")  # of other outputs they say nothing


def parity_table(parity: DecoderParity | EncoderParity, brief: bool = False) -> Table:
    """One row for each step or output of the parity run; ``brief`` keeps what 80 columns hold."""
    found: dict[str, StepParity | OutputParity]
    if isinstance(parity, EncoderParity):
        found, none = {o.output: o for o in parity.outputs}, ["KV rel"]
        lengths = ", ".join(map(str, parity.lengths))
        batch = f"One batch of {parity.rows} images"
        what = f"Texts of {lengths} tokens, padded to one batch" if lengths else batch
        rest = "; only real tokens are compared."
    else:
        found, none = {f"step {s.step}" if s.step else "prefill": s for s in parity.steps}, []
        what = f"Prompts of {', '.join(map(str, parity.prompt_lengths))} tokens, ragged in one batch"
        rest = (
            "; then teacher-forced decode steps with each side's own cache. Changing the embeddings' last bit moves "
            f"the PyTorch model's own logits by {figure(parity.rounding_noise)}."
            f"{f' {parity.routing.said}.' if parity.routing else ''}"
        )
    of_logits = [isinstance(one, StepParity) or name == LOGITS for name, one in found.items()]
    left_out = {*none, *(() if any(of_logits) else _OF_LOGITS)}
    columns = [name for name in (_BRIEF if brief else _FIGURES) if name not in left_out]
    rows = tuple(
        (name, str(one.tokens), *(_FIGURES[c](one) if logits or c not in _OF_LOGITS else "" for c in columns))
        for (name, one), logits in zip(found.items(), of_logits, strict=True)
    )
    prompts = sorted({prompt for one in parity.crossings for prompt in one.prompts})
    alone = f", and of {', '.join(map(str, prompts))} tokens each by itself" if prompts else ""
    crossed = "; ".join(c.said for c in parity.crossings)
    # Of limits that bound nothing nothing is said.
    held = [f"{n.replace('_', ' ')} {v:g}" for n, v in vars(parity.gates).items() if v != getattr(Gates, n)]
    notes = [
        f"Gates: {', '.join(held)}." if held else "",
        what + alone + rest,
        _own_loss(parity),
        f"Lengths from which on the model computes something else: {crossed}." if crossed else "",
    ]
    title = "Parity: linearized PyTorch against the rewritten graph"
    return Table(title, ("", "n", *columns), rows, " ".join(filter(None, notes)))


def _own_loss(parity: DecoderParity | EncoderParity) -> str:
    """What is lost in the graph's precision anyway, for a graph that is not float32."""
    times, own = f"may be {parity.gates.max_vs_own:g} times that", parity.pytorch_in_precision
    whose = f"PyTorch itself in {parity.precision}"
    if isinstance(parity, EncoderParity):
        means = "; ".join(f"{o.output} {figure(o.mean_abs)}" for o in parity.pytorch_in_precision or ())
        return f"{whose}, on the same batch, has a mean |Δ| of: {means}; this graph's {times}." if own else ""
    if not (steps := parity.pytorch_in_precision or parity.base_graph):
        return ""
    theirs = Parity(parity.prompt_lengths, steps, parity.gates)
    whose = whose if own else f"The unmodified {parity.precision} graph against unmodified PyTorch"
    return (
        f"{whose}, on the same tokens: max |Δlogit| {figure(theirs.worst)}, mean {figure(theirs.mean_abs)}; "
        f"this graph's mean, {figure(parity.mean_abs)}, {times}."
    )


def loss_table(loss: MethodLoss | Likeness) -> Table:
    """What linearizing cost on held-out text or images; of one document there is no standard error."""
    title, some = "Method loss: original against linearized, held-out", loss.documents > 1
    if isinstance(loss, Likeness):
        rows = tuple(
            (
                m.what,
                number(m.value, ".6f"),
                f"± {number(m.se, '.6f')}" if some else "unknown",
                f"{m.count:,}",
            )
            for m in loss.measures
        )
        note = (
            f"{loss.documents:,} {loss.unit} that calibration did not see; standard errors over {loss.unit}."
        )
        return Table(f"{title} {loss.unit}", ("", "mean", "standard error", "n"), rows, note)
    errors = (loss.perplexity_ratio_se, loss.kl_se)
    ratio, kl = (f"± {number(se, '.4f')}" if some else "unknown" for se in errors)
    return Table(
        f"{title} text",
        ("", "value", "standard error"),
        (
            ("perplexity, original", number(loss.perplexity_original, ".3f"), ""),
            ("perplexity, linearized", number(loss.perplexity_linearized, ".3f"), ""),
            ("perplexity ratio", number(loss.perplexity_ratio, ".4f"), ratio),
            ("KL to the original, nats per token", number(loss.kl, ".4f"), kl),
        ),
        f"{loss.tokens:,} tokens of {loss.documents:,} documents that calibration did not see; "
        "standard errors over documents.",
    )


# The three races of a report, by the names of their plots.
VERIFIED, ENGINES, BENCH = "speed", "engines", "bench"
_TITLES = {
    VERIFIED: "Speed on ONNX Runtime, batch 1",
    ENGINES: "Speed on {device}, batch 1",
    BENCH: "Bench",
}
_MEANING = {
    PREFILL: "Prefill from an empty cache: the time to the first token.",
    DECODE: "Decode: one token per row after that many, with a filled cache.",
    ENCODE: "Encode: one pass over that many tokens.",
}


def speed_table(race: str, speed: Speed, brief: bool = False) -> Table:
    """Of the ``race`` :data:`VERIFIED`, :data:`ENGINES` or :data:`BENCH`: a row for each candidate in each cell.

    ``brief`` keeps what 80 columns hold; a column that nobody has a figure for is left out.
    """
    every = [(cell, i, result) for cell in speed.cells for i, result in enumerate(cell.results)]
    # Over the base alone that is the linearized one's own speedup, which stands beside it.
    others = any(r.linearized_over for _, _, r in every if r.name != speed.base)
    noise = " ~" if brief else " not resolved"
    columns: Sequence[tuple[str, Callable[[Result], str], bool]] = (
        ("ms", lambda r: spread(r.timing), True),
        ("p99", lambda r: "" if r.timing.p99_ms is None else milliseconds(r.timing.p99_ms), True),
        ("tokens/s", lambda r: f"{r.tokens_per_second:,.0f}", True),
        ("over own base", lambda r: _ratio(r.over_base, noise), True),
        (
            "quartiles",
            lambda r: (
                "" if (o := r.over_base) is None or finite(o.low) is None else f"{o.low:.2f}–{o.high:.2f}"
            ),
            False,
        ),
        ("ceiling", lambda r: "" if r.ceiling is None else f"{number(r.ceiling, '.2f')}×", True),
        ("of roofline", lambda r: f"{r.of_roofline:.0%}" if r.of_roofline else "", False),
        ("linearized over it", lambda r: _ratio(r.linearized_over, noise) if others else "", False),
        ("cache MiB", lambda r: f"{r.cache_bytes / 2**20:,.1f}" if r.cache_bytes else "", False),
        ("peak MiB", lambda r: f"{r.peak_bytes / 2**20:,.0f}" if r.peak_bytes else "", False),
        ("rounds", lambda r: str(r.rounds), False),
    )
    shown = [
        (heading, text)
        for heading, text, always in columns
        if (always or not brief) and any(text(result) for _, _, result in every)
    ]
    rows = tuple(
        # Where there is little room, a cell is named once.
        ("" if brief and i else cell.name, result.name, *(text(result) for _, text in shown))
        for cell, i, result in every
    )
    title = _TITLES[race].format(device=speed.machine.device)
    headings = ("", "candidate", *(heading for heading, _ in shown))
    return Table(title, headings, rows, _note(speed, [r for _, _, r in every], brief), plot=race)


def _note(speed: Speed, results: list[Result], brief: bool) -> str:
    machine = speed.machine
    threads = f", {machine.threads} thread{'s' * (machine.threads > 1)}" if machine.threads else ""
    on = "any machine"
    if found := machine.roofline:
        on = (
            f"a machine that does {2e-9 * found.macs_per_second:,.0f} GFLOP/s and reads "
            f"{1e-9 * found.bytes_per_second:,.1f} GB/s, measured in the same run"
        )
    said = {
        f"{machine.device}{threads}: interleaved in one process, {speed.rounds} rounds, and more if needed; medians "
        "± half the interquartile range.": True,
        **{_MEANING[phase]: True for phase in speed.phases},
        f"{'~: not' if brief else 'Not'} resolved, the noise exceeds the effect, by a 95 % interval of the median of "
        "at least six rounds.": any(r.over_base for r in results),
        f"Ceiling: what the multiplications of both graphs, and the bytes that they read, allow on {on}. It does not "
        "count transposes, masks, softmax and copies of the cache, which are gone too: a speedup can be above it.": any(
            r.ceiling for r in results
        ),
        "Of roofline: over 100 % where what is read lies in the processor's caches.": not brief
        and any((r.of_roofline or 0) > 1 for r in results),
        "p99: of single passes and steps.": speed.has_percentiles,
        "Cache: filled, with an engine's work space, without weights.": not brief,
        **{
            f"Not timed: {name} in {', '.join(cell.name for cell in cells)} ({why}).": True
            for (name, why), cells in speed.absent().items()
        },
    }
    return " ".join(sentence for sentence, there in said.items() if there)


def spread(timing: Timing) -> str:
    """The median and half the interquartile range, in milliseconds; the median alone where quartiles are not known."""
    half, median = finite((timing.high_ms - timing.low_ms) / 2), timing.median_ms
    return milliseconds(median) + ("" if half is None else f" ± {milliseconds(half, like=median)}")


def _ratio(found: Ratio | None, noise: str) -> str:
    return "" if found is None else f"{number(found.value, '.2f')}×" + ("" if found.resolved else noise)


# engines, forms, precision -----------------------------------------------------------------------


def engines_table(manifests: Sequence[Manifest]) -> Table:
    """What was built: one row for each engine."""
    rows = (
        (
            m.role,
            mebibytes(m.size),
            f"{m.network.attention} {m.attention}"
            if m.network.attention
            else ("decomposed" if m.kv_layers else "none"),
            str(m.network.kv_cache_updates or ""),
            f"{sum(t.name.startswith('past_key') for t in m.network.inputs)}",
            f"{m.network.layers:,}",
            f"{m.build_seconds:.1f}",
        )
        for m in manifests
    )
    first = manifests[0]
    limits = first.limits
    return Table(
        f"Engines: {first.library} {first.library_version}, {first.precision}, {first.kv_cache} cache",
        ("", "size", "attention", "cache updates", "KV inputs", "layers", "seconds"),
        tuple(rows),
        f"{'Ahead of time for' if first.ahead_of_time else 'For'} {', '.join(first.capabilities)}; "
        f"batch ≤ {limits.max_batch}, prefill ≤ {limits.max_seq:,} tokens, context ≤ {limits.max_context:,}.",
    )


def forms_table(forms: Mapping[str, Conversion]) -> Table:
    """A row for each check of each form."""
    rows = (
        (
            name,
            one.file,
            mebibytes(one.bytes),
            figure(one.parity.worst) if one.parity else "",
            check.name,
            check.status,
            check.detail,
        )
        for name, one in forms.items()
        for check in one.checks
    )
    return Table(
        "Other engines",
        ("form", "file", "size", "max |Δlogit|", "check", "result", "detail"),
        tuple(rows),
        "The same plan in the forms of other engines, each run there against linearized PyTorch (nbl-export convert).",
    )


def _precision_table(graph: Graph) -> Table:
    """Which nodes of a half graph stay float32, and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kept in graph.kept_float32:
        reason = re.sub(r"^.* reaches [^ ]+ on", "reaches beyond the format on", kept.reason)
        groups.setdefault((kept.op, reason), []).append(kept.node)
    rows = tuple((op, str(len(nodes)), reason, nodes[0]) for (op, reason), nodes in groups.items())
    return Table(
        f"Nodes that stay fp32 in the {graph.precision} graph", ("op", "nodes", "why", "the first"), rows
    )


# all of them -------------------------------------------------------------------------------------


def report_tables(report: Report, brief: bool = False) -> list[Table]:
    """The tables of a report, in reading order; ``brief`` leaves out what a terminal has no room for."""
    selection, graph, bench = report.selection, report.graph, report.bench
    curve, result, engines = selection.curve, selection.result, report.engine_speed
    tables = (
        graph_table(graph.before, graph.after),
        curve and curve.points and curve_table(curve, brief),
        result and result.loss and result_table(selection, result),
        report.method_loss and _dated(loss_table(report.method_loss), report, "method_loss"),
        report.speed and _dated(speed_table(VERIFIED, report.speed, brief), report, "speed"),
        bench and speed_table(BENCH, bench.speed, brief),
        report.parity and parity_table(report.parity, brief),
        report.engines and engines_table(report.engines),
        engines and _dated(speed_table(ENGINES, engines, brief), report, "engine_speed"),
        report.forms and forms_table(report.forms),
        not brief and graph.kept_float32 and _precision_table(graph),
        not brief and layers_table(selection, graph.proofs),
    )
    return [table for table in tables if isinstance(table, Table)]


def _dated(table: Table, report: Report, section: str) -> Table:
    """The ``table`` of a section, with when it was measured if that was in an earlier verification."""
    kept = report.kept.get(section)
    if kept is None:
        return table
    there = kept.environment.processor
    named = [f"{n} {value}" for n, value in kept.settings.items() if n in ("contexts", "rounds")]
    asked = f" ({', '.join(named)})" if named and "speed" in section else ""
    on = f" on {there}" if there != report.environment.processor else ""
    note = "Kept from an earlier verification of the same graphs: measured"
    said = f"{table.note} {note} {kept.created} with nbl-export {kept.tool_version}{on}{asked}."
    return replace(table, note=said)
