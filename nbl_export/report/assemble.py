"""Put a report together from what the stages recorded and what was measured."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbl_export import __version__
from nbl_export.blocks import counted
from nbl_export.checks import Check
from nbl_export.files import read_json
from nbl_export.graph.summary import ExportSummary
from nbl_export.linearize.selection import Scores
from nbl_export.places import Places
from nbl_export.records import from_json
from nbl_export.report.environment import environment
from nbl_export.report.forms import conversions_in
from nbl_export.report.schema import Graph, Model, Report, Selection
from nbl_export.rewrite.summary import RewriteSummary
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    from nbl_export.engine.pair import EngineFile
    from nbl_export.linearize.plan import Plan
    from nbl_export.models.source import ModelSource
    from nbl_export.report.bench import BenchReport
    from nbl_export.verify.measurement import Measurement


@dataclass(frozen=True)
class _Calibration:
    """What a report says of the calibration that was asked for."""

    sources: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class _Export:
    """What a report says of the export that was asked for."""

    precision: str
    kv_cache: str
    opset: int | None = None
    task: str | None = None


def assemble(
    ws: Workspace,
    source: ModelSource,
    plan: Plan,
    settings: Mapping[str, Any],
    measured: Measurement,
    engines: Sequence[EngineFile],
) -> Report:
    """The report of the run in ``ws``; ``settings`` are those of the verification."""
    stages = ("calibrate", "select", "export", "rewrite", *(["build"] if engines else []))
    records = {name: r for name in stages if (r := ws.record(name))}
    rewritten = rewrite_of(ws)
    gone = rewritten.before.kv_pairs - rewritten.after.kv_pairs
    own = len(plan.linear_attention)
    pairs = " and KV pairs" if gone == own == len(plan.blocks) else f" and {gone} KV pairs"
    pairs = pairs if rewritten.before.kv_pairs else ""
    rewriting = Check(
        "graph rewrite",
        "passed",
        f"{counted(plan.blocks)}{pairs} gone, every region proven, ONNX checker passed",
        records["rewrite"].seconds,
    )
    return Report(
        created=created(),
        tool_version=__version__,
        model=Model(**vars(source.identity), hidden_size=plan.hidden_size, layers=plan.layer_count),
        environment=environment(),
        settings={name: dict(r.settings) for name, r in records.items()} | {"verify": dict(settings)},
        hashes={
            "model": source.fingerprint,
            **{name: digest for r in records.values() for name, digest in r.files.items()},
        },
        stage_seconds={name: r.seconds for name, r in records.items()},
        selection=selection_of(ws, plan),
        graph=_graph(ws, rewritten),
        parity=measured.parity,
        divergence=measured.divergence,
        method_loss=measured.method_loss,
        speed=measured.speed,
        engines=tuple(e.manifest for e in engines) or None,
        engine_parity=measured.engine_parity,
        engine_speed=measured.engine_speed,
        bench=_bench_of(ws, records["rewrite"].result),
        forms=conversions_in(ws, current=True),
        checks=(rewriting, *measured.checks),
        notes=(*(note for r in records.values() for note in r.notes), *measured.notes),
    )


def created() -> str:
    """Now, as reports say it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def rewrite_of(ws: Workspace) -> RewriteSummary:
    """What was recorded of the rewrite."""
    what, remedy = "The record of the rewrite", "run `nbl-export rewrite` again"
    return from_json(RewriteSummary, read_json(ws.rewrite_summary, what, remedy), what, remedy)


def selection_of(ws: Workspace, plan: Plan) -> Selection:
    """How the layers of ``plan`` were chosen, by what the output folder keeps."""
    what, remedy = "The file of the layers' scores", "run `nbl-export select` again"
    scores = from_json(Scores, read_json(ws.candidates, what, remedy), what, remedy)
    return Selection(
        **vars(scores),
        criterion=plan.criterion,
        fit_input=plan.fit_input,
        ridge=plan.ridge,
        fit=plan.fit,
        repair=plan.repair,
        rank=plan.rank,
        calibration_tokens=plan.calibration_tokens,
        layers=plan.blocks,
        **vars(ws.asked("calibrate", _Calibration)),
    )


def exported_of(ws: Places) -> ExportSummary:
    """What was recorded of the export."""
    what, remedy = "The record of the export", "run `nbl-export export` again"
    return from_json(ExportSummary, read_json(ws.export_summary, what, remedy), what, remedy)


def _graph(ws: Workspace, rewritten: RewriteSummary) -> Graph:
    return Graph(**vars(rewritten), **vars(exported_of(ws)), **vars(ws.asked("export", _Export)))


def _bench_of(ws: Workspace, rewrite: str) -> BenchReport | None:
    """A bench of these graphs, if there is one."""
    from nbl_export.report.bench import load_bench

    if ws.current("bench") is None:
        return None
    value = load_bench(ws.report / "bench.json")
    return value if value.hashes["rewrite"] == rewrite else None
