"""The stages in order; the only module that knows all of them.

Each verb works on an output folder and skips what is already done there with the same settings:

    calibrate → select ─┐
    export ─────────────┴→ rewrite → (build →) verify → report
                                   → evaluate
                                   → bench

Each is a module of :mod:`nbl_export.stages`, which records it in the workspace when it is done.
"""

from __future__ import annotations

from nbl_export.report.schema import Report
from nbl_export.settings import (
    CalibrateSettings,
    EngineSettings,
    ExportSettings,
    SelectSettings,
    VerifySettings,
)
from nbl_export.stages.bench import bench
from nbl_export.stages.build import build
from nbl_export.stages.calibrate import calibrate
from nbl_export.stages.evaluate import evaluate
from nbl_export.stages.export import check_model, export
from nbl_export.stages.rewrite import rewrite
from nbl_export.stages.run import Run
from nbl_export.stages.select.stage import select
from nbl_export.stages.verify import report, verify

__all__ = [
    "bench",
    "build",
    "calibrate",
    "evaluate",
    "export",
    "report",
    "rewrite",
    "run_all",
    "select",
    "verify",
]


def run_all(
    run: Run,
    calibration: CalibrateSettings,
    selection: SelectSettings,
    exporting: ExportSettings,
    verification: VerifySettings,
    engines: EngineSettings | None = None,
) -> Report:
    """Every stage in order; what is done already with the same settings is kept."""
    from nbl_export.linearize.scores import check_k, check_rank
    from nbl_export.models.layers import attention_layers, hidden_size, positions
    from nbl_export.runtime.session import require_onnxruntime

    require_onnxruntime()  # before the first minute of work, not after it
    exporting = exporting.for_task(run.model.source.task, engines is not None)
    if run.workspace.record("calibrate") is None:
        if selection.k is not None:
            check_k(selection.k, len(attention_layers(run.model.model)))
        if selection.rank is not None:
            check_rank(selection.rank, hidden_size(run.model.model))
        if engines:
            engines.limits(positions(run.model.model))
        exporting.check()
        check_model(run, exporting)
    selection.for_task(run.model.source.task)
    calibrate(run, calibration)
    if selection.budget:
        export(run, exporting)  # a budget is weighed with the speed of the graph
    select(run, selection)
    export(run, exporting)
    rewrite(run)
    if engines:
        build(run, engines)
    return verify(run, verification)
