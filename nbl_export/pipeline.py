"""The stages in order; the only module that knows all of them.

Each verb works on an output folder and skips what is already done there with the same settings:

    calibrate → select ─┐
    export ─────────────┴→ rewrite → (build →) verify → report
                                   → evaluate
                                   → bench

Each is a module of :mod:`nbl_export.stages`, which records it in the workspace when it is done.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nbl_export.digests import Digests
from nbl_export.models.device import check_device
from nbl_export.models.source import ModelSource, find_model
from nbl_export.report.schema import Report
from nbl_export.settings import (
    EngineSettings,
    ExportSettings,
    RunSettings,
    Settings,
)
from nbl_export.settings.device import OnDevice
from nbl_export.stages import early
from nbl_export.stages.bench import bench
from nbl_export.stages.build import build, check_engines, check_limits, check_states
from nbl_export.stages.calibrate import calibrate
from nbl_export.stages.convert import convert
from nbl_export.stages.evaluate import evaluate
from nbl_export.stages.export import check_exporter, check_model, export
from nbl_export.stages.rewrite import drop_baseline, rewrite
from nbl_export.stages.room import Shape, check_run
from nbl_export.stages.run import Run
from nbl_export.stages.select.stage import select
from nbl_export.stages.verify import report, verify
from nbl_export.supported import check_system

__all__ = [
    "bench",
    "build",
    "calibrate",
    "check_machine",
    "convert",
    "evaluate",
    "export",
    "find",
    "report",
    "rewrite",
    "run_all",
    "select",
    "verify",
]


def check_machine(*asked: Settings | None) -> None:
    """Refuse, before a model is looked for, what this machine has no package or device for.

    Raises :class:`MissingDependencyError`, or :class:`InputError` for what the library here cannot build.
    """
    check_system()
    for settings in asked:
        if isinstance(settings, ExportSettings):
            check_exporter(settings)
        if isinstance(settings, EngineSettings):
            check_engines(settings)
        if isinstance(settings, OnDevice):
            check_device(settings.device)


def find(model: str, out: Path, asked: RunSettings, trust_remote_code: bool, digests: Digests) -> ModelSource:
    """The model that a run is asked of; whatever can be refused is refused before its weights are read."""
    asked.check()
    check_machine(*asked.parts)
    early.check_named(model, asked.calibration)
    return find_model(model, trust_remote_code, digests, partial(early.check_run, out=out, asked=asked))


def run_all(run: Run, asked: RunSettings) -> Report:
    """Every stage in order, as ``asked`` and resolved; what is done already with the same settings is kept."""
    from nbl_export.calibrate.text import start_tokens
    from nbl_export.linearize.scores import check_selection
    from nbl_export.models.candidates import described
    from nbl_export.models.layers import hidden_size, positions
    from nbl_export.models.spans import check_blocks, choices
    from nbl_export.runtime.session import require_onnxruntime
    from nbl_export.verify.engines import fitting_prompts

    require_onnxruntime()  # before the first minute of work, not after it
    selection = asked.selection
    if run.workspace.record("calibrate") is None:
        check_blocks(run.model.tried, asked.calibration.parts)
        layers = choices(run.model.model, asked.calibration.parts)
        others = described(run.model.model)["others"]
        check_selection(selection, layers, hidden_size(run.model.model), others)
        if asked.engines:
            check_states(run.model.model)
            check_limits(asked.engines, positions(run.model.model))
        if run.model.task.causal:
            start = len(start_tokens(run.model.tokenizer))
            fitting_prompts(positions(run.model.model), start, asked.verification.decode_steps)
        check_model(run, asked.exporting)
        check_run(run.workspace, Shape.of(run.model.model), asked)
    calibrate(run, asked.calibration)
    if selection.budget or selection.workload:
        export(run, asked.exporting, asked.folder.keeps)  # they are weighed with the speed of the graph
    select(run, selection)
    export(run, asked.exporting, asked.folder.keeps)
    rewrite(run, whole=not asked.folder.keeps)
    if asked.engines:
        build(run, asked.engines)
    report = verify(run, asked.verification)
    if not asked.folder.keeps and report.passed:
        drop_baseline(run.workspace)
    elif not asked.folder.keeps:
        run.listener.note("The unmodified graph is kept, since the verification failed.")
    return report
