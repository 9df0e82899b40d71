"""Baseline graph + plan → ``model.onnx``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.linearize.plan import load_plan
from nbl_export.progress import Listener
from nbl_export.records import StageRecord, to_json
from nbl_export.settings import Settings
from nbl_export.stages.run import Run, opened
from nbl_export.workspace import Workspace


def rewrite(
    out: str | Path | Run,
    listener: Listener | None = None,
    rehash: bool = False,
    whole: bool | None = None,
) -> Path:
    """Rewrite the baseline graph by the plan, prove it and count; returns the path of the graph.

    It reads its weights from the baseline's data file, and its own has W and b alone; a ``whole`` graph has all weights
    in its own. None is as it was made before.
    """
    from nbl_export.export.sidecars import copy_sidecars
    from nbl_export.graph.io import load_graph, save_beside, save_graph
    from nbl_export.rewrite.replace import kept_layers, rewrite_file, rewrite_record

    with opened(out, Settings(), listener, rehash=rehash) as (run, _):
        ws = run.workspace
        made_of = {stage: ws.require(stage).result for stage in ("select", "export")}
        if whole is None:
            before = ws.record("rewrite")
            whole = before is not None and bool(before.settings.get("whole"))
        with run.stage("rewrite", {"whole": True} if whole else {}, made_of) as work:
            if work:
                check_baseline(ws)
                plan = load_plan(ws.plan)
                if plan.model != run.model.source.fingerprint:
                    raise InputError(
                        f"{ws.plan} is the plan of another model: run `nbl-export select {ws.root}` again."
                    )
                folder, graph = ws.baseline.parent, ws.baseline.name
                beside = [f for f in ws.paths(ws.finished("export")) if folder in f.parents]
                files = [f for f in beside if not f.name.startswith(graph)]
                kept = kept_layers(load_graph(ws.baseline), plan)
                save = save_graph if whole else save_beside
                result = rewrite_file(ws.baseline, plan, ws.model, listener=work, save=save)
                write_json(ws.rewrite_summary, to_json(rewrite_record(result)))
                sidecars = copy_sidecars(files, ws.root, plan.linear_attention, kept, folder)
                work.files = [*result.files, ws.rewrite_summary, *sidecars]
        return ws.model


def check_baseline(ws: Workspace) -> None:
    """Raise :class:`InputError` if the unmodified graph was deleted on purpose."""
    if (record := ws.record("export")) and record.dropped:
        raise InputError(
            f"{ws.root} has no unmodified graph any more (--keep-baseline no): run `nbl-export export {ws.root}` first."
        )


def drop_baseline(ws: Workspace) -> None:
    """Delete the unmodified graph and what lies beside it; no graph reads its data."""
    if record := ws.record("export"):
        folder = ws.baseline.parent
        files = [path for path in ws.paths(record) if folder in path.parents]
        ws.drop("export", files)
        for empty in sorted({path.parent for path in files}, reverse=True):
            with suppress(OSError):  # somebody else's files are in it
                empty.rmdir()


def current_rewrite(ws: Workspace) -> StageRecord:
    """The record of the rewrite, which must be of the current plan and baseline."""
    for stage in ("select", "export"):
        ws.require(stage)
    return ws.require("rewrite")
