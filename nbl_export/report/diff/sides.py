"""What is compared, read from where it lies: an output folder, a report, a bench, an evaluation, or a graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbl_export.errors import InputError
from nbl_export.files import read_json, sha256_of_file
from nbl_export.graph.summary import GraphFacts, GraphSummary
from nbl_export.report.bench import BenchReport, load_bench
from nbl_export.report.diff.values import Kind, Side
from nbl_export.report.evaluation import NAMES, Evaluation, load_evaluation
from nbl_export.report.header import Header
from nbl_export.report.schema import Report, load_report
from nbl_export.workspace import Workspace, is_workspace

_REPORT = "report.json"
_EVALUATION = NAMES[0]
_TAKEN = "name an output folder, a report.json, bench.json or eval.json, or an ONNX graph"


@dataclass(frozen=True)
class Opened:
    """One side: of a ``kind``, read from ``files``. What it does not have is None.

    A report's bench is its own section of it; ``graph`` are the facts of the graph file, where there is one.
    """

    path: Path
    kind: Kind
    files: tuple[Path, ...]
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

    @property
    def side(self) -> Side:
        """As the comparison names it."""
        if (own := self.header) is None:
            return Side(str(self.path))
        return Side(str(self.path), own.model.source, own.created, own.tool_version, own.verdict)


def opened(path: Path) -> Opened:
    """What lies at ``path``; raises :class:`InputError` for anything else, and for a report that was edited."""
    if not path.exists():
        raise InputError(f"{path} does not exist: {_TAKEN}.")
    if path.is_dir():
        if is_workspace(path):
            return _folder(path)
        if (path / _REPORT).is_file():
            return _judged(path / _REPORT, path)
        from nbl_export.export.sidecars import graph_in

        return _graph(graph_in(path), path)
    if path.suffix == ".onnx":
        return _graph(path, path)
    if path.suffix == ".json":
        return _judged(path, path)
    raise InputError(f"{path} is nothing that can be compared: {_TAKEN}.")


def _judged(file: Path, path: Path) -> Opened:
    """A JSON file, by its schema."""
    raw = read_json(file, "The file", "check its path")
    schema = str(raw.get("schema", "")) if isinstance(raw, dict) else ""
    if schema.startswith("nbl-export/report/"):
        report = load_report(file)
        return Opened(path, "report", (file,), report, report.bench)
    if schema.startswith("nbl-export/bench/"):
        return Opened(path, "bench", (file,), bench=load_bench(file))
    if schema.startswith("nbl-export/eval/"):
        return Opened(path, "eval", (file,), evaluation=load_evaluation(file))
    raise InputError(f"{file} is no report, bench or evaluation of nbl-export: {_TAKEN}.")


def _graph(file: Path, path: Path) -> Opened:
    from nbl_export.graph.facts import facts_of

    return Opened(path, "graph", (file,), graph=facts_of(file))


def _folder(path: Path) -> Opened:
    """An output folder: its report, which must be as it was written and of its graph, its evaluation, its graph."""
    from nbl_export.graph.facts import facts_of

    ws = Workspace.open(path)
    file, again = ws.report / _REPORT, f"run `nbl-export verify {path}`"
    if not file.is_file():
        raise InputError(f"{path} has no report: {again} first, or name its graph ({ws.model}).")
    record = ws.record("verify")
    written = record.files.get(file.relative_to(ws.root).as_posix()) if record else None
    if written is not None and written != sha256_of_file(file):
        raise InputError(f"{file} was changed after `verify` wrote it: {again} again.")
    report, files, notes = load_report(file), [file], []
    graph, evaluation = None, None
    if ws.model.is_file():
        name = ws.model.relative_to(ws.root).as_posix()
        if report.hashes.get(name) not in (None, sha256_of_file(ws.model)):
            raise InputError(f"{ws.model} is not the graph that {file} is about: {again} again.")
        graph = facts_of(ws.model)
        files.append(ws.model)
    if (scored := ws.report / _EVALUATION).is_file():
        if ws.current("eval"):
            evaluation = load_evaluation(scored)
            files.append(scored)
        else:
            notes.append(f"{scored} is of other graphs, or was changed, and is left out.")
    return Opened(path, "report", tuple(files), report, report.bench, evaluation, graph, tuple(notes))
