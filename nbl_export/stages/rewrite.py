"""Baseline graph + plan → ``model.onnx``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.errors import InputError
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.progress import Listener
from nbl_export.report.schema import jsonable
from nbl_export.run import Run
from nbl_export.workspace import StageRecord, Workspace, atomic_path, read_json, sha256_of_json, write_json

if TYPE_CHECKING:
    from nbl_export.graph.rewrite import RewriteResult


def rewrite(run: Run) -> None:
    """Baseline graph + plan → ``model.onnx``, proven and counted, loadable as it stands."""
    from nbl_export.export.genai_config import NAME as GENAI
    from nbl_export.graph.prove import proofs_as_json
    from nbl_export.graph.rewrite import rewrite_file

    ws = run.workspace
    key, exported = _rewrite_inputs(ws)

    def work(listener: Listener) -> list[Path]:
        plan = load_plan(ws.plan)
        if plan.model != run.model.source.fingerprint:
            raise InputError(
                f"{ws.plan} is the plan of another model: run `nbl-export select {ws.root}` again."
            )
        with listener.task("Rewriting the graph", 1, "graph") as task:
            result: RewriteResult = rewrite_file(ws.baseline, plan, ws.model)
            task.advance(1)
        summary = {
            "before": result.before.as_json(),
            "after": result.after.as_json(),
            "kv_layers": list(plan.kept),
            "proofs": proofs_as_json(result.proofs),
        }
        write_json(ws.rewrite_summary, jsonable(summary))
        folder = ws.baseline.parent
        beside = [f for name in exported.files if (f := ws.root / name).parent == folder]
        beside = [f for f in beside if not f.name.startswith(ws.model.name)]
        if GENAI not in {f.name for f in beside}:  # of an earlier export with another cache
            (ws.root / GENAI).unlink(missing_ok=True)
        return [*result.files, ws.rewrite_summary, *(_copy_config(path, ws.root, plan) for path in beside)]

    run.stage("rewrite", key, {}, work)


def _rewrite_inputs(ws: Workspace) -> tuple[str, StageRecord]:
    """The key that a rewrite of what is there now has, and the export it starts from; both must be done."""
    selected = ws.require("select", f"nbl-export select {ws.root} --k K")
    exported = ws.require("export", f"nbl-export export {ws.root}")
    return sha256_of_json({"select": selected.key, "export": exported.key}), exported


def _copy_config(source: Path, folder: Path, plan: Plan) -> Path:
    """Copy a file that lies beside the baseline graph; configurations are told what was linearized."""
    from nbl_export.export.genai_config import NAME as GENAI

    target = folder / source.name
    if source.name in (GENAI, "config.json"):
        config = read_json(source, "The baseline's configuration", "run `nbl-export export` again")
        if source.name == GENAI:
            config["model"]["decoder"]["num_hidden_layers"] = len(plan.kept)
        else:
            config["nbl_export"] = {"linearized_layers": list(plan.chosen), "kv_layers": list(plan.kept)}
        write_json(target, config)
    else:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    return target


def current_rewrite(ws: Workspace) -> StageRecord:
    """The record of the rewrite, which must be of the plan and the baseline that are there now."""
    key, _ = _rewrite_inputs(ws)
    rewritten = ws.require("rewrite", f"nbl-export rewrite {ws.root}")
    if rewritten.key != key:
        raise InputError(
            f"The plan or the baseline changed after `rewrite`: run `nbl-export rewrite {ws.root}` first."
        )
    return rewritten
