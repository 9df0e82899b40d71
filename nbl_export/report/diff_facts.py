"""Read two sides of a comparison, and tell each as facts by name, which are compared one by one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbl_export.errors import InputError
from nbl_export.evaluate.results import Estimate
from nbl_export.files import read_json, sha256_of_file
from nbl_export.graph.summary import GraphFacts, GraphSummary
from nbl_export.records import Check, to_json
from nbl_export.report.drawing import listed, milliseconds
from nbl_export.report.evaluation import NAMES, Evaluation, load_evaluation
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
        found: dict[str, Check] = {}
        times: Counter[str] = Counter()
        for check in (c for one in (self.report, self.bench, self.evaluation) if one for c in one.checks):
            times[check.name] += 1
            found[check.name + f" ({times[check.name]})" * (times[check.name] > 1)] = check
        return found


def opened(path: Path) -> Opened:
    """What lies at ``path``; raises :class:`InputError` for anything else, and for a report that was edited."""
    from nbl_export.export.sidecars import graph_in
    from nbl_export.graph.facts import facts_of

    if not path.exists():
        raise InputError(f"{path} does not exist: {_TAKEN}.")
    if path.is_dir() and is_workspace(path):
        return _folder(path)
    file = path
    if path.is_dir():
        file = path / "report.json" if (path / "report.json").is_file() else graph_in(path)
    if file.suffix == ".onnx":
        return Opened(path, "graph", graph=facts_of(file))
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
    from nbl_export.graph.facts import facts_of

    ws = Workspace.open(path)
    file, again = ws.report / "report.json", f"run `nbl-export verify {path}`"
    if not file.is_file():
        raise InputError(f"{path} has no report: {again} first, or name its graph ({ws.model}).")
    record, name = ws.record("verify"), file.relative_to(ws.root).as_posix()
    if record and record.files.get(name, "") not in ("", sha256_of_file(file)):
        raise InputError(f"{file} was changed after `verify` wrote it: {again} again.")
    report, graph, evaluation, notes = load_report(file), None, None, []
    if ws.model.is_file():
        known = report.hashes.get(ws.model.relative_to(ws.root).as_posix())
        if known not in (None, sha256_of_file(ws.model)):
            raise InputError(f"{ws.model} is not the graph that {file} is about: {again} again.")
        graph = facts_of(ws.model)
    scored = ws.report / NAMES[0]
    if ws.current("eval"):
        evaluation = load_evaluation(scored)
    elif scored.is_file():
        notes.append(f"{scored} is of other graphs, or was changed, and is left out.")
    return Opened(path, "report", report, report.bench, evaluation, graph, tuple(notes))


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
    found = {
        "model": _said(judged.model.source),
        "model's fingerprint": _said(judged.model.fingerprint[:16]),
    }
    if isinstance(judged, Report):
        chosen = judged.selection
        linear = f"{len(chosen.layers)} of {judged.model.layers}: {listed(chosen.layers)}".removesuffix(": ")
        members = tuple(map(str, chosen.layers))
        found |= {
            "hidden size": _said(judged.model.hidden_size),
            "linear layers": Fact(Figure(linear), headline=True, members=members),
            "criterion": _said(chosen.criterion),
            "calibration tokens": _said(chosen.calibration_tokens),
        }
    asked = judged.settings
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
    linear = Figure(listed(graph.linear) or "none")
    found = {
        "linear layers in the graph": Fact(linear, headline=headline, members=tuple(map(str, graph.linear))),
        "KV pairs are of layers": _said(listed(graph.kv_layers) or "none"),
        "KV cache": _said(graph.cache),
        **{f"opset of {domain}": _said(version) for domain, version in graph.opsets.items()},
    }
    for dtype, stored in graph.initializers.items():
        found[f"{dtype} initializers"] = _said(stored.count)
        found[f"{dtype} initializers, bytes"] = _said(stored.bytes)
    for name, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        found[f"{name} beside the KV cache"] = Fact(Figure(len(values)), members=values)
    return found


def _loss(loss: MethodLoss | Likeness) -> Facts:
    """What linearizing costs, with standard errors over documents."""
    if isinstance(loss, Likeness):
        return {
            m.what: Fact(
                _measured(m.value, m.se, loss.documents),
                # Distances; the others are likenesses.
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

    def worst(values: Iterable[float]) -> Fact:
        """The largest; what is no number is worse than any."""
        return _said(max(values, key=lambda v: (v != v, v)), "error")

    return {
        "max |Δlogit|": worst(s.max_abs for s in parity.steps),
        "mean |Δlogit|": _said(parity.mean_abs, "error"),
        "max KL": worst(s.max_kl for s in parity.steps),
        "KV relative error": worst(s.kv_max_rel for s in parity.steps),
        "steps": _said(len(parity.steps)),
    }


def _engines(report: Report) -> Facts:
    """What was built, and the parity of both engines."""
    found: Facts = {}
    for m in report.engines or ():
        found[f"{m.role} engine: library"] = _said(f"{m.library} {m.library_version}")
        found[f"{m.role} engine: size"] = Fact(Figure(m.size), "lower", "bytes")
    for name in ("linearized", "base"):
        if own := report.engine_parity and getattr(report.engine_parity, name):
            found |= {f"{name} engine: {what}": fact for what, fact in _parity(own).items()}
    return found


def _speed(speed: Speed, headline: bool = True) -> Facts:
    """Every speedup, over its own base or of the linearized candidate over another, with the time beside it.

    ``headline``: the linearized candidate's of each phase at its longest context is one.
    """
    found: Facts = {}

    def add(name: str, ratio: Ratio, detail: str = "", first: bool = False) -> None:
        figure = Figure(ratio.value, least=ratio.least, most=ratio.most)
        found[name] = Fact(figure, "higher", "times", first, detail)

    own = sorted(speed.speedups(), key=lambda f: (f[0].context, -f[0].batch))
    longest = {cell.phase: cell for cell, _, _ in own}
    for cell in speed.cells:
        for result in cell.results:
            linear = result.name == speed.linearized
            if result.over_base is not None:
                name = f"{cell.name}: speedup" if linear else f"{cell.name}: {result.name}"
                first = headline and linear and longest.get(cell.phase) is cell
                add(name, result.over_base, f"{milliseconds(result.timing.median_ms)} ms", first)
            if result.linearized_over is not None and not linear and result.name != speed.base:
                add(f"{cell.name}: over {result.name}", result.linearized_over)
    return found


def _tasks(evaluation: Evaluation) -> Facts:
    """Scores of the linearized graph and their recovery, by task and by context length; then their means."""
    found: Facts = {}

    def add(name: str, estimate: Estimate | None, documents: int, headline: bool = False) -> None:
        if estimate is not None:
            figure = _measured(estimate.value, estimate.se, documents)
            found[name] = Fact(figure, "higher", "percent", headline)

    scored = [(f"{t.name}, {t.scored}", t.headline, t.documents) for t in evaluation.tasks]
    for one in evaluation.retrieval:
        for way, compared in (("choice", one.choice), ("exact", one.exact)):
            scored.append((f"retrieval, {one.context:,} tokens, {way}", compared, one.questions))
    for name, found_of, documents in scored:
        for what in ("base", "linearized", "recovery") if found_of else ():
            add(f"{name}: {what}", getattr(found_of, what), documents)
    for task in evaluation.tasks:  # perplexities, without an error
        plain = {name: both for name, both in task.figures.items() if name not in task.metrics}
        found |= {f"{task.name}, {name}": _said(both.linearized, "loss") for name, both in plain.items()}
    for name, mean in (("tasks", evaluation.mean.tasks), ("retrieval", evaluation.mean.retrieval)):
        add(f"mean recovery of {name}", mean.recovery if mean else None, 2, headline=True)
    return found


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
