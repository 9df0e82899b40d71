"""Put a report together from what the stages recorded, what was measured, and what an earlier report still holds."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbl_export import __version__
from nbl_export.blocks import counted
from nbl_export.files import read_json
from nbl_export.graph.summary import ExportSummary, RewriteSummary
from nbl_export.linearize.selection import Scores
from nbl_export.records import Check, from_json, part_from_json
from nbl_export.report.schema import (
    BenchReport,
    Conversion,
    Graph,
    Kept,
    Model,
    Report,
    Selection,
    environment,
    load_bench,
)
from nbl_export.settings.graphs import PRECISIONS
from nbl_export.workspace import Places, Workspace

if TYPE_CHECKING:
    from nbl_export.engine.manifest import EngineFile
    from nbl_export.linearize.plan import Plan
    from nbl_export.models.source import ModelSource
    from nbl_export.verify.case import Measurement


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
    exported: Any = records["export"].settings
    gone = rewritten.before.kv_pairs - rewritten.after.kv_pairs
    every = gone == len(plan.linear_attention) == len(plan.blocks)
    pairs = f" and {'' if every else f'{gone} '}KV pairs" if rewritten.before.kv_pairs else ""
    proven = f"{counted(plan.blocks)}{pairs} gone, every region proven, ONNX checker passed"
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
        graph=Graph(
            **vars(rewritten),
            **vars(exported_of(ws)),
            precision=exported["precision"],
            kv_cache=exported["kv_cache"],
            opset=exported.get("opset"),
            task=exported.get("task"),
        ),
        parity=measured.parity,
        divergence=measured.divergence,
        method_loss=measured.method_loss,
        speed=measured.speed,
        engines=tuple(e.manifest for e in engines) or None,
        engine_parity=measured.engine_parity,
        engine_speed=measured.engine_speed,
        bench=_bench_of(ws, records["rewrite"].result),
        forms=conversions_in(ws, current=True),
        checks=(Check("graph rewrite", "passed", proven, records["rewrite"].seconds), *measured.checks),
        notes=(*(note for r in records.values() for note in r.notes), *measured.notes),
    )


def created() -> str:
    """Now, as reports say it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def rewrite_of(ws: Workspace) -> RewriteSummary:
    """What was recorded of the rewrite."""
    what, remedy = "The record of the rewrite", "run `nbl-export rewrite` again"
    return part_from_json(RewriteSummary, read_json(ws.rewrite_summary, what, remedy), what, remedy)


def exported_of(ws: Places) -> ExportSummary:
    """What was recorded of the export."""
    what, remedy = "The record of the export", "run `nbl-export export` again"
    return from_json(ExportSummary, read_json(ws.export_summary, what, remedy), what, remedy)


def selection_of(ws: Workspace, plan: Plan) -> Selection:
    """How the layers of ``plan`` were chosen, by what the output folder keeps."""
    what, remedy = "The file of the layers' scores", "run `nbl-export select` again"
    asked = record.settings if (record := ws.record("calibrate")) else {}
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
        sources=tuple(asked.get("calibration", ())),
        seed=asked.get("seed", 0),
    )


def _bench_of(ws: Workspace, rewrite: str) -> BenchReport | None:
    """A bench of these graphs, if there is one."""
    if ws.current("bench") is None:
        return None
    value = load_bench(ws.report / "bench.json")
    return value if value.hashes["rewrite"] == rewrite else None


# conversions -------------------------------------------------------------------------------------


def stage_of(form: str, precision: str) -> str:
    """The stage that writes a form in a precision."""
    return f"convert {form} {precision}"


def kept_conversion(ws: Workspace, form: str, precision: str) -> Conversion:
    """What the folder keeps of a form; raises :class:`.InputError` if that is damaged."""
    path = ws.conversion(form, precision)
    again = f"run `nbl-export convert {ws.root} --to {form}` again"
    return from_json(Conversion, read_json(path, "The conversion", again), str(path), again)


def conversions_in(ws: Workspace, current: bool = False) -> dict[str, Conversion]:
    """What was found of each form in the folder, by form and precision, as ``gguf fp16``; ``current``: of its plan."""
    known = ws.current if current else ws.record
    return {
        f"{form} {precision}": kept_conversion(ws, form, precision)
        for form, precisions in PRECISIONS.items()
        for precision in precisions
        if known(stage_of(form, precision))
    }


# what an earlier verification measured -----------------------------------------------------------


# Of each section that a verification can leave out: the checks of it, the one that says that it was left out, and
# whether it is of engines.
SECTIONS: Mapping[str, tuple[set[str], str, bool]] = {
    "method_loss": ({"method loss", "KL bound", "perplexity bound"}, "method loss", False),
    "speed": ({"speed"}, "speed", False),
    "engine_parity": ({"engine parity", "base engine parity"}, "engine run", True),
    "engine_speed": (set(), "engine run", True),
}


def keeping(report: Report, earlier: Report | None, graphs: Sequence[str], engines: Sequence[str]) -> Report:
    """``report`` with the sections of an ``earlier`` one that it lacks, and with their verdicts.

    Only of the same ``graphs``, and of the same ``engines`` what was measured on them: the names of their files, whose
    digests both reports have. What failed now is not measured, and nothing stands in for it.
    """
    if earlier is None or not _same(report, earlier, graphs):
        return report
    failed = {check.name for check in report.checks if check.status == "failed"}
    engines_run = not failed & {"engine run", *SECTIONS["engine_parity"][0]} and _same(
        report, earlier, engines
    )
    for name, (checks, left_out, of_engines) in SECTIONS.items():
        found = getattr(earlier, name)
        if found is None or getattr(report, name) is not None or (of_engines and not engines_run):
            continue
        origin = earlier.kept.get(name) or Kept(
            earlier.created,
            earlier.tool_version,
            earlier.environment,
            dict(earlier.settings.get("verify", {})),
            # That the loss was skipped is no verdict on it.
            tuple(
                c
                for c in earlier.checks
                if c.name in checks and (c.name, c.status) != ("method loss", "skipped")
            ),
        )
        more: dict[str, Any] = {name: found, "kept": {**report.kept, name: origin}}
        report = replace(report, **more, checks=_checks(report, left_out, origin))
    return report


def _same(report: Report, earlier: Report, names: Sequence[str]) -> bool:
    return bool(names) and all(report.hashes.get(n) == earlier.hashes.get(n, "") for n in names)


def _checks(report: Report, left_out: str, origin: Kept) -> tuple[Check, ...]:
    """Those of the report, with the earlier verdicts and their date where there is none of today."""
    measured, kept, found = f"measured {origin.created}", {c.name: c for c in origin.checks}, []
    for check in report.checks:
        own = kept.pop(check.name, None) if check.name == left_out else None
        if own:
            check = replace(own, detail=f"{own.detail} ({measured}, now {check.detail})")
        elif check.name == left_out:
            check = replace(check, detail=f"{check.detail}; what is shown was {measured}")
        found.append(check)
    return (*found, *(replace(c, detail=f"{c.detail} ({measured})") for c in kept.values()))
