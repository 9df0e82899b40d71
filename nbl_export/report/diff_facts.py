"""Read two sides of a comparison, and tell each as facts by name, which are compared one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbl_export.errors import InputError
from nbl_export.export.sidecars import graph_in
from nbl_export.files import read_json, sha256_of_file
from nbl_export.graph.facts import facts_of
from nbl_export.graph.summary import GraphFacts, GraphSummary
from nbl_export.records import Check, to_json
from nbl_export.report.drawing import listed, milliseconds, worst
from nbl_export.report.evaluation import NAMES, Evaluation, load_evaluation, without_recovery
from nbl_export.report.schema import BenchReport, Header, Report, load_bench, load_report
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, Likeness, MethodLoss, Parity
from nbl_export.verify.speed.values import Ratio, Speed
from nbl_export.workspace import Workspace, is_workspace

Kind = Literal["report", "bench", "eval", "graph"]
# Which way a figure is better; of a check: when it has passed.
Better = Literal["", "lower", "higher", "passed"]
LOSS, SPEED, ENGINE_SPEED, BENCH = "Method loss", "Speed", "Engine speed", "Bench"
_TAKEN = "name an output folder, a report.json, bench.json or eval.json, or an ONNX graph"


@dataclass(frozen=True)
class Figure:
    """A value and its noise, if it has any: a standard error, or a 95 % interval from ``least`` to ``most``.

    An error or a bound that is no number is not known.
    """

    value: float | int | str
    se: float | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Fact:
    """A figure of one side. ``better`` says which way it is, ``unit`` how it is drawn.

    ``headline``: it is among the first that a reader looks for. ``detail`` stands beside it; ``members`` are what it
    lists.
    """

    figure: Figure
    better: Better = ""
    unit: str = ""
    headline: bool = False
    detail: str = ""
    members: tuple[str, ...] = ()


Facts = dict[str, Fact]


# what is compared --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """One side: of a ``kind``, at ``path``. What it does not have is None.

    A report's bench is its own section of it; ``graph`` are the facts of the graph file, where there is one.
    """

    path: Path
    kind: Kind
    report: Report | None = None
    bench: BenchReport | None = None
    evaluation: Evaluation | None = None
    graph: GraphFacts | None = None
    notes: tuple[str, ...] = ()

    @property
    def header(self) -> Header | None:
        """What it says of itself; a graph says nothing."""
        return self.report or self.bench or self.evaluation

    @property
    def summary(self) -> GraphSummary | None:
        """The counts of its graph: those of the report, or of the file."""
        return self.report.graph.after if self.report else self.graph.summary if self.graph else None

    def checks(self) -> dict[str, Check]:
        """Those of its reports by name; a name that is there twice has a number."""
        every = [c for one in (self.report, self.bench, self.evaluation) if one for c in one.checks]
        times = [[c.name for c in every[:i]].count(check.name) + 1 for i, check in enumerate(every)]
        return {c.name + f" ({n})" * (n > 1): c for c, n in zip(every, times, strict=True)}


def opened(path: Path) -> Opened:
    """What lies at ``path``; raises :class:`InputError` for anything else, and for a report that was edited."""
    if not path.exists():
        raise InputError(f"{path} does not exist: {_TAKEN}.")
    if path.is_dir() and is_workspace(path):
        return _folder(path)
    file, inside = path, path / "report.json"
    if path.is_dir():
        file = inside if inside.is_file() else graph_in(path)
    if file.suffix == ".onnx":
        return Opened(path, "graph", graph=facts_of(file, weights=True))
    raw = read_json(file, "The file", "check its path") if file.suffix == ".json" else None
    schema = str(raw.get("schema", "")) if isinstance(raw, dict) else ""
    match schema.split("/")[:2]:
        case ["nbl-export", "report"]:
            report = load_report(file)
            return Opened(path, "report", report, report.bench)
        case ["nbl-export", "bench"]:
            return Opened(path, "bench", bench=load_bench(file))
        case ["nbl-export", "eval"]:
            return Opened(path, "eval", evaluation=load_evaluation(file))
    raise InputError(f"{file} is no report, bench or evaluation of nbl-export: {_TAKEN}.")


def _folder(path: Path) -> Opened:
    """An output folder: its report, which must be as it was written and of its graph, its evaluation, its graph."""
    ws = Workspace.open(path)
    file, again = ws.report / "report.json", f"run `nbl-export verify {path}`"
    if not file.is_file():
        raise InputError(f"{path} has no report: {again} first, or name its graph ({ws.model}).")
    record, name = ws.record("verify"), file.relative_to(ws.root).as_posix()
    if record and record.files.get(name, "") not in ("", sha256_of_file(file)):
        raise InputError(f"{file} was changed after `verify` wrote it: {again} again.")
    report, there = load_report(file), ws.model.is_file()
    known = report.hashes.get(ws.model.relative_to(ws.root).as_posix())
    if there and known not in (None, ws.digests.of(ws.model)):
        raise InputError(f"{ws.model} is not the graph that {file} is about: {again} again.")
    if there:
        ws.check_measured("rewrite")
    scored, current = ws.report / NAMES[0], ws.current("eval")
    left_out = (
        ()
        if current or not scored.is_file()
        else (f"{scored} is of other graphs, or was changed, and is left out.",)
    )
    evaluation, graph = load_evaluation(scored) if current else None, facts_of(ws.model) if there else None
    return Opened(path, "report", report, report.bench, evaluation, graph, left_out)


# facts -------------------------------------------------------------------------------------------


def sections_of(side: Opened) -> dict[str, Facts]:
    """What each section has of a side, in reading order; races are headlines of a report and of a bench alone."""
    report = side.report
    parts: Mapping[str, tuple[Callable[[Any], Facts], Any]] = {
        "Model and settings": (_model, side.header),
        LOSS: (_loss, report and report.method_loss),
        SPEED: (_speed, report and report.speed),
        ENGINE_SPEED: (_speed, report and report.engine_speed),
        BENCH: (lambda s: _speed(s, side.kind == "bench"), side.bench and side.bench.speed),
        "Tasks and retrieval": (_tasks, side.evaluation),
        "Checks": (lambda s: {n: Fact(Figure(c.status), "passed") for n, c in s.checks().items()}, side),
        "Parity": (_parity, report and report.parity),
        "Engines": (_engines, report),
        "Graph": (_summary, side.summary),
        "Graph file": (lambda g: _file(g, side.kind == "graph"), side.graph),
        "Unmodified graph": (lambda g: _summary(g, False), report and report.graph.before),
        "Environment": (_environment, side.header),
    }
    return {title: facts(value) if value is not None else {} for title, (facts, value) in parts.items()}


def _said(value: float | str, unit: str = "") -> Fact:
    return Fact(Figure(value), unit=unit)


def _measured(value: float, se: float, documents: int) -> Figure:
    """Of one document no error is known; 0 would look certain."""
    return Figure(value, se if documents > 1 else math.nan)


def _model(judged: Header) -> Facts:
    """The model, of a report its linear layers, and everything that was asked for."""
    model, asked = judged.model, judged.settings
    found = {"model": _said(model.source), "model's fingerprint": _said(model.fingerprint[:16])}
    if isinstance(judged, Report):
        chosen = judged.selection
        linear = Figure(
            f"{len(chosen.layers)} of {judged.model.layers}: {listed(chosen.layers)}".removesuffix(": ")
        )
        found |= {
            "hidden size": _said(judged.model.hidden_size),
            "linear layers": Fact(linear, headline=True, members=tuple(map(str, chosen.layers))),
            "criterion": _said(chosen.criterion),
            "calibration tokens": _said(chosen.calibration_tokens),
        }
    return found | _asked(asked if isinstance(asked, Mapping) else to_json(asked))


def _asked(settings: Mapping[str, Any], before: str = "") -> Facts:
    """Settings of stages, those within others too; one that was not given is not there."""
    found: Facts = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _asked(value, f"{before}{name}: ")
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            found[f"{before}{name}"] = _said({"True": "yes", "False": "no"}.get(text, text))
    return found


def _summary(graph: GraphSummary, headline: bool = True) -> Facts:
    """The counts of a graph, and its nodes by operator."""
    bytes_ = Figure(graph.kv_bytes_per_token)
    return {
        "size on disk": Fact(Figure(graph.file_bytes), "lower", "bytes", headline),
        "parameters": _said(graph.parameters),
        "KV pairs (layers with a cache)": _said(graph.kv_pairs),
        "inputs": _said(graph.inputs),
        "outputs": _said(graph.outputs),
        "initializers": _said(graph.initializers),
        "nodes": _said(graph.nodes),
        **{f"nodes: {op}": _said(count) for op, count in sorted(graph.ops.items())},
        **({"KV cache, bytes per token": Fact(bytes_, "lower", "", headline)} if bytes_.value else {}),
    }


def _file(graph: GraphFacts, headline: bool) -> Facts:
    """What a graph file says beside its counts."""
    linear, beside = (
        Figure(listed(graph.linear) or "none"),
        {"inputs": graph.inputs, "outputs": graph.outputs},
    )
    return {
        "linear layers in the graph": Fact(linear, headline=headline, members=tuple(map(str, graph.linear))),
        "KV pairs are of layers": _said(listed(graph.kv_layers) or "none"),
        "KV cache": _said(graph.cache),
        **({"weights, SHA-256": _said(graph.weights)} if graph.weights else {}),
        **{f"opset of {domain}": _said(version) for domain, version in graph.opsets.items()},
        **{
            f"{dtype} initializers{what}": _said(count)
            for dtype, stored in graph.initializers.items()
            for what, count in (("", stored.count), (", bytes", stored.bytes))
        },
        **{
            f"{name} beside the KV cache": Fact(Figure(len(values)), members=values)
            for name, values in beside.items()
        },
    }


def _loss(loss: MethodLoss | Likeness) -> Facts:
    """What linearizing costs, with standard errors over documents; of likenesses, KL and changes are distances."""
    if isinstance(loss, Likeness):
        return {
            m.what: Fact(
                _measured(m.value, m.se, loss.documents),
                "lower" if m.what.startswith(("KL", "change")) else "higher",
                "loss",
                headline=not number,
            )
            for number, m in enumerate(loss.measures)
        }
    ratio = _measured(loss.perplexity_ratio, loss.perplexity_ratio_se, loss.documents)
    return {
        "perplexity ratio": Fact(ratio, "lower", "loss", True),
        "KL, nats per token": Fact(_measured(loss.kl, loss.kl_se, loss.documents), "lower", "loss", True),
        "perplexity, original": _said(loss.perplexity_original, "loss"),
        "perplexity, linearized": _said(loss.perplexity_linearized, "loss"),
        "held-out tokens": _said(loss.tokens),
    }


def _parity(parity: DecoderParity | EncoderParity | Parity) -> Facts:
    """The largest differences to PyTorch, which have gates of their own: less is not better."""
    if isinstance(parity, EncoderParity):
        return {f"max relative difference of {o.output}": _said(o.max_rel, "error") for o in parity.outputs}
    return {
        "max |Δlogit|": _said(worst(s.max_abs for s in parity.steps), "error"),
        "mean |Δlogit|": _said(parity.mean_abs, "error"),
        "max KL": _said(worst(s.max_kl for s in parity.steps), "error"),
        "KV relative error": _said(worst(s.kv_max_rel for s in parity.steps), "error"),
        "steps": _said(len(parity.steps)),
    }


def _engines(report: Report) -> Facts:
    """What was built, and the parity of both engines."""
    ran = vars(report.engine_parity) if report.engine_parity else {}
    built = [
        (m.role, one)
        for m in report.engines or ()
        for one in (
            ("library", _said(f"{m.library} {m.library_version}")),
            ("size", Fact(Figure(m.size), "lower", "bytes")),
        )
    ]
    measured = [(name, one) for name, own in ran.items() if own for one in _parity(own).items()]
    return {f"{name} engine: {what}": fact for name, (what, fact) in (*built, *measured)}


def _speed(speed: Speed, headline: bool = True) -> Facts:
    """Every speedup, over its own base or of the linearized candidate over another, with the time beside it.

    ``headline``: the linearized candidate's of each phase at its longest context is one.
    """

    def fact(ratio: Ratio, *more: Any) -> Fact:
        return Fact(Figure(ratio.value, least=ratio.least, most=ratio.most), "higher", "times", *more)

    found: Facts = {}
    own = sorted(speed.speedups(), key=lambda f: (f[0].context, -f[0].batch))
    longest = {cell.phase: cell for cell, _, _ in own}
    for cell, result in ((c, r) for c in speed.cells for r in c.results):
        linear = result.name == speed.linearized
        if result.over_base is not None:
            first = headline and linear and longest.get(cell.phase) is cell
            time = f"{milliseconds(result.timing.median_ms)} ms"
            found[f"{cell.name}: {'speedup' if linear else result.name}"] = fact(
                result.over_base, first, time
            )
        if result.linearized_over is not None and not linear and result.name != speed.base:
            found[f"{cell.name}: over {result.name}"] = fact(result.linearized_over)
    return found


def _tasks(evaluation: Evaluation) -> Facts:
    """Scores of the linearized graph and their recovery, by task and by context length; then their means."""
    scored = [(f"{t.name}, {t.scored}", t.headline, t.documents) for t in evaluation.tasks]
    scored += [
        (f"retrieval, {one.context:,} tokens, {way}", getattr(one, way), one.questions)
        for one in evaluation.retrieval
        for way in ("choice", "exact")
    ]
    parts = {
        f"{name}: {what}": Fact(_measured(found.value, found.se, documents), "higher", "percent")
        for name, compared, documents in scored
        for what in ("base", "linearized", "recovery")
        if (found := compared and getattr(compared, what))
    }
    means = {
        f"mean recovery of {name}": Fact(
            Figure(mean.recovery.value, mean.recovery.se), "higher", "percent", True
        )
        for name, mean in (("tasks", evaluation.mean.tasks), ("retrieval", evaluation.mean.retrieval))
        if mean and mean.recovery
    }
    # Perplexities have no error.
    plain = {
        f"{t.name}, {name}": _said(both[1], "loss")
        for t in evaluation.tasks
        for name, both in without_recovery(t)
    }
    return parts | plain | means


def _environment(judged: Header) -> Facts:
    """The machine, the versions of packages, and that of nbl-export."""
    environment = judged.environment
    said = {
        "processor": environment.processor,
        "cores": str(environment.cores),
        "memory, GiB": f"{environment.memory_gib:g}",
        "system": environment.system,
        "Python": environment.python,
        "nbl-export": judged.tool_version,
        **environment.packages,
    }
    return {name: _said(value) for name, value in said.items()}
