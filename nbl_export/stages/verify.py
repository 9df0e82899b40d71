"""Graphs and engines → ``report/``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nbl_export.batch import TOKENS
from nbl_export.calibrate.text import frame_of, load_text
from nbl_export.errors import InputError
from nbl_export.files import read_json
from nbl_export.graph.summary import RewriteRecord
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.models.load import LoadedModel, as_setting
from nbl_export.progress import Listener
from nbl_export.records import STAGES, from_json
from nbl_export.report.assemble import assemble, exported_of, keeping
from nbl_export.report.render import write_report
from nbl_export.report.schema import Report, load_report
from nbl_export.settings import VerifySettings
from nbl_export.stages.calibrate import loader_for
from nbl_export.stages.inspection import recorded_report
from nbl_export.stages.run import (
    Run,
    check_baseline,
    current_engines,
    current_rewrite,
    graphs_on,
    graphs_setting,
    model_positions,
    opened,
    passed_over,
)
from nbl_export.verify.case import DecoderCase, EncoderCase, fitting_prompts
from nbl_export.verify.measure import measure
from nbl_export.workspace import Places, Workspace


def verify(
    out: str | Path | Run,
    settings: VerifySettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    again: bool = False,
    rehash: bool = False,
    model: str | Path | None = None,
) -> Report:
    """Parity, method loss and speed. A failed gate is in the report (``passed`` is False), not raised.

    With ``again`` nothing is kept of an earlier verification: a folder from somebody else may hold one. ``model`` is
    where the model is now, if it was moved; the folder records it.
    """
    asked = settings or VerifySettings()
    with opened(out, asked, listener, trust_remote_code, rehash, model=model) as (run, asked):
        ws = run.workspace
        if again:
            ws.forget("verify")
        # It reads the held-out text too.
        made_of = {"rewrite": current_rewrite(ws).result, "calibrate": ws.require("calibrate").result}
        if run.model.task.causal:
            fitting_prompts(model_positions(ws), len(load_text(ws.text).start), asked.decode_steps)
        engines = current_engines(ws)
        if engines and (built := ws.record("build")):
            made_of["build"] = built.result
        device = run.on(asked.device)
        recorded = asked.as_json() | as_setting(device) | graphs_setting(device)
        with run.stage("verify", recorded, made_of, device) as work:
            if work:
                check_baseline(ws)
                plan, earlier, why = load_plan(ws.plan), _earlier(ws, made_of), passed_over(ws)
                if why:
                    work.note(f"Not verified: {why}.")
                with graphs_on(device, work):
                    case = case_of(ws, ws.model, ws.baseline, run.model, plan, asked, work)
                    if isinstance(case, DecoderCase):
                        case = replace(case, engines=engines, passed_over=why)
                    found = measure(case)
                report = assemble(ws, run.model.source, plan, recorded, found, engines)
                graphs = _files(ws, "calibrate", "select", "export", "rewrite")
                work.files = write_report(ws.report, keeping(report, earlier, graphs, _files(ws, "build")))
        return load_report(ws.report / "report.json")


def case_of(
    places: Places,
    graph: Path,
    baseline: Path | None,
    loaded: LoadedModel,
    plan: Plan,
    settings: VerifySettings,
    listener: Listener,
) -> DecoderCase | EncoderCase:
    """What ``graph`` is held against, rewritten from ``baseline``, if that is there; ``places`` has its text."""
    copies, model, task, tensors = exported_of(places).copies, loaded.in_dtype("float32"), loaded.task, {}
    if baseline:
        what, remedy = "The record of the rewrite", "run `nbl-export rewrite` again"
        record = from_json(RewriteRecord, read_json(places.rewrite_summary, what, remedy), what, remedy)
        tensors = {one.layer: one for one in record.tensors}
    if task.causal:
        text = load_text(places.text)
        asked = (model, plan, baseline, graph, settings, listener, text)
        return DecoderCase(*asked, tensors=tensors, copies=copies)
    material = loader_for(loaded.source)
    heldout = material.heldout(material.load(material.path(places)), plan.probe)
    case = EncoderCase(
        model,
        plan,
        baseline,
        graph,
        settings,
        listener,
        task,
        loaded.pooling,
        heldout,
        material.unit,
        tensors=tensors,
        copies=copies,
    )
    if loaded.source.reads != TOKENS:
        return case
    frame = frame_of(loaded.tokenizer)
    return replace(case, unit="documents", pad=frame.pad, left=frame.left)


def _files(ws: Workspace, *stages: str) -> list[str]:
    """The files that ``stages`` recorded."""
    return [name for stage in stages if (record := ws.record(stage)) for name in record.files]


def _earlier(ws: Workspace, made_of: Mapping[str, str]) -> Report | None:
    """The report of the last verification, if it is as that wrote it, and of the same text and graphs."""
    record = recorded_report(ws)
    if record is None or record.version != STAGES["verify"]:
        return None
    if any(record.made_of.get(name) != made_of[name] for name in ("rewrite", "calibrate")):
        return None
    try:
        return load_report(ws.report / "report.json")
    except InputError:
        return None
