"""Put a report together from what the stages recorded and what was measured."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbl_export import __version__
from nbl_export.checks import Check
from nbl_export.files import jsonable, read_json
from nbl_export.report.environment import environment
from nbl_export.report.schema import Report
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    from nbl_export.engine.pair import EngineFile
    from nbl_export.linearize.plan import Plan
    from nbl_export.models.source import ModelSource
    from nbl_export.report.bench import BenchReport
    from nbl_export.verify.decoder import Measurement


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
    rewritten = read_json(ws.rewrite_summary, "The record of the rewrite", "run `nbl-export rewrite` again")
    exported = read_json(ws.export_summary, "The record of the export", "run `nbl-export export` again")
    scores = read_json(ws.candidates, "The file of the layers' scores", "run `nbl-export select` again")
    cached = rewritten["before"]["kv_pairs"] > 0
    rewriting = Check(
        "graph rewrite",
        "passed",
        f"{len(plan.layers)} attention layers{' and KV pairs' * cached} gone, every region proven, ONNX checker passed",
    )
    return Report(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool_version=__version__,
        model={k: v for k, v in source.as_json().items() if k != "path"}
        | {"hidden_size": plan.hidden_size, "layers": plan.layer_count},
        environment=environment(),
        settings={name: dict(r.settings) for name, r in records.items()} | {"verify": dict(settings)},
        hashes={
            "model": source.fingerprint,
            **{name: digest for r in records.values() for name, digest in r.files.items()},
        },
        stage_seconds={name: r.seconds for name, r in records.items()},
        selection={
            "criterion": plan.criterion,
            "fit_input": plan.fit_input,
            "ridge": plan.ridge,
            "fit": plan.fit,
            "repair": plan.repair,
            "rank": plan.rank,
            "calibration_tokens": plan.calibration_tokens,
            "layers": list(plan.chosen),
            **scores,
        },
        graph={
            **rewritten,
            **exported,
            "precision": records["export"].settings["precision"],
            "kv_cache": records["export"].settings["kv_cache"],
            "task": records["export"].settings.get("task"),
        },
        parity=measured.parity,
        divergence=measured.divergence,
        method_loss=measured.method_loss,
        speed=measured.speed,
        engines=[jsonable(e.manifest.as_json()) for e in engines] or None,
        engine_parity=measured.engine_parity,
        engine_speed=measured.engine_speed,
        bench=_bench_of(ws, records["rewrite"].key),
        checks=[rewriting, *measured.checks],
        notes=[note for r in records.values() for note in r.notes] + measured.notes,
    )


def _bench_of(ws: Workspace, rewrite: str) -> BenchReport | None:
    """A bench of these graphs, if there is one."""
    from nbl_export.report.bench import load_bench

    record = ws.record("bench")
    if record is None or not ws.is_done("bench", record.key):
        return None
    value = load_bench(ws.report / "bench.json")
    return value if value.hashes["rewrite"] == rewrite else None
