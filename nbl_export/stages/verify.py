"""Graphs and engines → ``report/``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.files import sha256_of_file, sha256_of_json
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.progress import Listener
from nbl_export.report.schema import Report, load_report
from nbl_export.settings import VerifySettings
from nbl_export.stages.build import current_engines
from nbl_export.stages.rewrite import current_rewrite
from nbl_export.stages.run import Run
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    from nbl_export.verify.case import EncoderCase


def verify(run: Run, settings: VerifySettings) -> Report:
    """Parity, method loss and speed → ``report/``; a failed gate is in the report, not an exception."""
    from nbl_export.calibrate.text import load_text
    from nbl_export.report.assemble import assemble
    from nbl_export.report.render import write_report
    from nbl_export.verify.case import DecoderCase
    from nbl_export.verify.decoder import measure_decoder
    from nbl_export.verify.encoder import measure_encoder

    ws = run.workspace
    rewritten = current_rewrite(ws)
    engines = current_engines(ws)
    key = sha256_of_json(
        {
            "rewrite": rewritten.key,
            "engines": [e.manifest.hashes["engine"] for e in engines],
            "verify": asdict(settings),
        }
    )

    def work(listener: Listener) -> list[Path]:
        plan = load_plan(ws.plan)
        if run.model.task.causal:
            text, model = load_text(ws.text), run.model.model
            measured = measure_decoder(
                DecoderCase(model, plan, ws.baseline, ws.model, settings, listener, text, engines)
            )
        else:
            measured = measure_encoder(_encoder_case(run, plan, settings, listener))
        report = assemble(ws, run.model.source, plan, asdict(settings), measured, engines)
        return write_report(ws.report, report)

    run.stage("verify", key, asdict(settings), work)
    return load_report(ws.report / "report.json")


def _encoder_case(run: Run, plan: Plan, settings: VerifySettings, listener: Listener) -> EncoderCase:
    from nbl_export.batch.names import TOKENS
    from nbl_export.calibrate.passages import frame_of
    from nbl_export.stages.calibration_data import loader_for
    from nbl_export.verify.case import EncoderCase

    ws, model, material = run.workspace, run.model, loader_for(run.model.source)
    heldout = material.heldout(material.load(material.path(ws)), plan.probe)
    case = EncoderCase(
        model.model,
        plan,
        ws.baseline,
        ws.model,
        settings,
        listener,
        model.task,
        model.pooling,
        heldout,
        material.unit,
    )
    if model.source.reads != TOKENS:
        return case
    frame = frame_of(model.tokenizer)
    return replace(case, unit="documents", pad=frame.pad, left=frame.left)


def report(ws: Workspace) -> Report:
    """Draw every other file of the report anew from ``report.json``; needs no model."""
    return redrawn(ws, load_report(ws.report / "report.json"))


def redrawn(ws: Workspace, value: Report) -> Report:
    """Write every file of the report, which the record of the verification then knows."""
    from nbl_export.report.render import write_report

    path = ws.report / "report.json"
    record = ws.record("verify")
    known = record and record.files.get(str(path.relative_to(ws.root))) == sha256_of_file(path)
    files = write_report(ws.report, value)
    # Another version may draw in other words: as long as the figures are those measured, nothing is to be done again.
    if record and known:
        ws.finish("verify", record.key, record.settings, files, record.seconds, list(record.notes))
    return value
