"""Read two sides of a comparison, and tell each as facts by name, which are compared one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbl_export.errors import InputError
from nbl_export.evaluate.results import Estimate
from nbl_export.files import read_json, sha256_of_file
from nbl_export.graph.summary import GraphFacts, GraphSummary
from nbl_export.records import Check, to_json
from nbl_export.report.drawing import listed
from nbl_export.report.evaluation import NAMES, Evaluation, load_evaluation
from nbl_export.report.schema import BenchReport, Header, Report, load_bench, load_report
from nbl_export.report.speed import milliseconds
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, Likeness, MethodLoss, Parity
from nbl_export.verify.speed.values import Ratio, Speed
from nbl_export.workspace import Workspace, is_workspace

Kind = Literal["report", "bench", "eval", "graph"]
# Which way a figure is better; of a check: when it has passed.
Better = Literal["", "lower", "higher", "passed"]
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
        for judged in (self.report, self.bench, self.evaluation):
            for check in judged.checks if judged else ():
                number = 1
                while (name := check.name if number == 1 else f"{check.name} ({number})") in found:
                    number += 1
                found[name] = check
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
    if schema.startswith("nbl-export/report/"):
        report = load_report(file)
        return Opened(path, "report", report, report.bench)
    if schema.startswith("nbl-export/bench/"):
        return Opened(path, "bench", bench=load_bench(file))
    if schema.startswith("nbl-export/eval/"):
        return Opened(path, "eval", evaluation=load_evaluation(file))
    raise InputError(f"{file} is no report, bench or evaluation of nbl-export: {_TAKEN}.")


def _folder(path: Path) -> Opened:
    """An output folder: its report, which must be as it was written and of its graph, its evaluation, its graph."""
    from nbl_export.graph.facts import facts_of

    ws = Workspace.open(path)
    file, again = ws.report / "report.json", f"run `nbl-export verify {path}`"
    if not file.is_file():
        raise InputError(f"{path} has no report: {again} first, or name its graph ({ws.model}).")
    record = ws.record("verify")
    written = record.files.get(file.relative_to(ws.root).as_posix()) if record else None
    if written is not None and written != sha256_of_file(file):
        raise InputError(f"{file} was changed after `verify` wrote it: {again} again.")
    report, graph, evaluation, notes = load_report(file), None, None, []
    if ws.model.is_file():
        if report.hashes.get(ws.model.relative_to(ws.root).as_posix()) not in (
            None,
            sha256_of_file(ws.model),
        ):
            raise InputError(f"{ws.model} is not the graph that {file} is about: {again} again.")
        graph = facts_of(ws.model)
    if (scored := ws.report / NAMES[0]).is_file():
        if ws.current("eval"):
            evaluation = load_evaluation(scored)
        else:
            notes.append(f"{scored} is of other graphs, or was changed, and is left out.")
    return Opened(path, "report", report, report.bench, evaluation, graph, tuple(notes))


# facts -------------------------------------------------------------------------------------------


def _said(value: float | str, unit: str = "") -> Fact:
    return Fact(Figure(value), unit=unit)


def _measured(value: float, se: float, documents: int) -> Figure:
    """Of one document no error is known; 0 would look certain."""
    return Figure(value, se if documents > 1 else math.nan)


def model_facts(judged: Header | None) -> Facts:
    """The model, of a report its linear layers, and everything that was asked for."""
    if judged is None:
        return {}
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


def summary_facts(graph: GraphSummary | None, headline: bool = True) -> Facts:
    """The counts of a graph, and its nodes by operator."""
    if graph is None:
        return {}
    found = {
        "size on disk": Fact(Figure(graph.file_bytes), "lower", "bytes", headline),
        "parameters": _said(graph.parameters),
        "KV pairs (layers with a cache)": _said(graph.kv_pairs),
        "inputs": _said(graph.inputs),
        "outputs": _said(graph.outputs),
        "initializers": _said(graph.initializers),
        "nodes": _said(graph.nodes),
        **{f"nodes: {op}": _said(count) for op, count in sorted(graph.ops.items())},
    }
    if graph.kv_bytes_per_token:
        figure = Figure(graph.kv_bytes_per_token)
        found["KV cache, bytes per token"] = Fact(figure, "lower", "", headline)
    return found


def file_facts(graph: GraphFacts | None, headline: bool) -> Facts:
    """What a graph file says beside its counts."""
    if graph is None:
        return {}
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


def loss_facts(loss: MethodLoss | Likeness | None) -> Facts:
    """What linearizing costs, with standard errors over documents."""
    if loss is None:
        return {}
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


def parity_facts(parity: DecoderParity | EncoderParity | Parity | None) -> Facts:
    """The largest differences to PyTorch, which have gates of their own: less is not better."""
    if parity is None:
        return {}
    if isinstance(parity, EncoderParity):
        return {f"max relative difference of {o.output}": _said(o.max_rel, "error") for o in parity.outputs}
    steps = parity.steps

    def worst(values: Iterable[float]) -> Fact:
        """The largest; what is no number is worse than any."""
        return _said(max(values, key=lambda v: (v != v, v)), "error")

    return {
        "max |Δlogit|": worst(s.max_abs for s in steps),
        "mean |Δlogit|": _said(parity.mean_abs, "error"),
        "max KL": worst(s.max_kl for s in steps),
        "KV relative error": worst(s.kv_max_rel for s in steps),
        "steps": _said(len(steps)),
    }


def engine_facts(report: Report | None) -> Facts:
    """What was built, and the parity of both engines."""
    found: Facts = {}
    for m in (report.engines if report else None) or ():
        found[f"{m.role} engine: library"] = _said(f"{m.library} {m.library_version}")
        found[f"{m.role} engine: size"] = Fact(Figure(m.size), "lower", "bytes")
    if report and (parity := report.engine_parity):
        for name, own in (("linearized engine", parity.linearized), ("base engine", parity.base)):
            found |= {f"{name}: {what}": fact for what, fact in parity_facts(own).items()}
    return found


def speed_facts(speed: Speed | None, headline: bool = False) -> Facts:
    """Every speedup, over its own base or of the linearized candidate over another, with the time beside it.

    ``headline``: the linearized candidate's of each phase at its longest context is one.
    """
    found: Facts = {}
    if speed is None:
        return found

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


def task_facts(evaluation: Evaluation | None) -> Facts:
    """Scores of the linearized graph and their recovery, by task and by context length; then their means."""
    if evaluation is None:
        return {}
    found: Facts = {}

    def add(name: str, estimate: Estimate | None, documents: int, headline: bool = False) -> None:
        if estimate is not None:
            figure = _measured(estimate.value, estimate.se, documents)
            found[name] = Fact(figure, "higher", "percent", headline)

    scored = [(f"{t.name}, {t.scored}", t.headline, t.documents) for t in evaluation.tasks]
    for one in evaluation.retrieval:
        where = f"retrieval, {one.context:,} tokens"
        scored += [
            (f"{where}, choice", one.choice, one.questions),
            (f"{where}, exact", one.exact, one.questions),
        ]
    for name, compared, documents in scored:
        if compared is not None:
            add(f"{name}: base", compared.base, documents)
            add(f"{name}: linearized", compared.linearized, documents)
            add(f"{name}: recovery", compared.recovery, documents)
    for task in evaluation.tasks:
        for name, both in task.figures.items():
            if name not in task.metrics:  # perplexities, without an error
                found[f"{task.name}, {name}"] = _said(both.linearized, "loss")
    for name, mean in (("tasks", evaluation.mean.tasks), ("retrieval", evaluation.mean.retrieval)):
        add(f"mean recovery of {name}", mean.recovery if mean else None, 2, headline=True)
    return found


def environment_facts(judged: Header | None) -> Facts:
    """The machine, the versions of packages, and that of nbl-export."""
    if judged is None:
        return {}
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


LOSS, SPEED, ENGINE_SPEED, BENCH = "Method loss", "Speed", "Engine speed", "Bench"
# What a section has of a side, in reading order; races are headlines of a report and of a bench alone.
SECTIONS: Mapping[str, Callable[[Opened], Facts]] = {
    "Model and settings": lambda s: model_facts(s.header),
    LOSS: lambda s: loss_facts(s.report.method_loss if s.report else None),
    SPEED: lambda s: speed_facts(s.report.speed if s.report else None, headline=True),
    ENGINE_SPEED: lambda s: speed_facts(s.report.engine_speed if s.report else None, headline=True),
    BENCH: lambda s: speed_facts(s.bench.speed if s.bench else None, headline=s.kind == "bench"),
    "Tasks and retrieval": lambda s: task_facts(s.evaluation),
    "Checks": lambda s: {name: Fact(Figure(c.status), "passed") for name, c in s.checks().items()},
    "Parity": lambda s: parity_facts(s.report.parity if s.report else None),
    "Engines": lambda s: engine_facts(s.report),
    "Graph": lambda s: summary_facts(s.summary),
    "Graph file": lambda s: file_facts(s.graph, headline=s.kind == "graph"),
    "Unmodified graph": lambda s: summary_facts(s.report.graph.before if s.report else None, headline=False),
    "Environment": lambda s: environment_facts(s.header),
}
