"""Baseline graph + plan → ``model.onnx``."""

from __future__ import annotations

from pathlib import Path

from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.linearize.plan import load_plan
from nbl_export.progress import Listener
from nbl_export.records import to_json
from nbl_export.stage_record import StageRecord
from nbl_export.stages.run import Run
from nbl_export.workspace import Workspace


def rewrite(run: Run) -> None:
    """Baseline graph + plan → ``model.onnx``, proven and counted, loadable as it stands."""
    from nbl_export.export.sidecars import copy_sidecars, updated_configs
    from nbl_export.rewrite.replace import rewrite_file, rewrite_summary

    ws = run.workspace
    made_of, exported = _rewrite_inputs(ws)

    def work(listener: Listener) -> list[Path]:
        plan = load_plan(ws.plan)
        if plan.model != run.model.source.fingerprint:
            raise InputError(
                f"{ws.plan} is the plan of another model: run `nbl-export select {ws.root}` again."
            )
        graph = ws.baseline.name
        files = ws.paths(exported)
        files = [f for f in files if ws.baseline.parent in f.parents and not f.name.startswith(graph)]
        sidecars = updated_configs(files, plan.chosen, plan.attention_layers, ws.baseline.parent)
        result = rewrite_file(ws.baseline, plan, ws.model, listener=listener)
        write_json(ws.rewrite_summary, to_json(rewrite_summary(result, plan)))
        return [*result.files, ws.rewrite_summary, *copy_sidecars(sidecars, ws.root)]

    run.stage("rewrite", {}, made_of, work)


def _rewrite_inputs(ws: Workspace) -> tuple[dict[str, str], StageRecord]:
    """What a rewrite of the current plan and baseline reads, and the record of the export; both must be done."""
    selected = ws.require("select", f"nbl-export select {ws.root} --k K")
    exported = ws.require("export", f"nbl-export export {ws.root}")
    return {"select": selected.result, "export": exported.result}, exported


def current_rewrite(ws: Workspace) -> StageRecord:
    """The record of the rewrite, which must be of the current plan and baseline."""
    _rewrite_inputs(ws)
    return ws.require("rewrite", f"nbl-export rewrite {ws.root}")
