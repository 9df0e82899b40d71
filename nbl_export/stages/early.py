"""What is refused before a model's weights are read: by what is asked, the model's small files, and the output folder.

1. Each check is a stage's own, made earlier, so the sentence is the same.
2. Nothing is refused that a stage would take. A configuration says how many layers a model has, and not which of them
   can become linear: what counts is the most that there can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nbl_export.blocks import most_blocks
from nbl_export.files import user_path
from nbl_export.models.source import ModelSource, check_apart
from nbl_export.models.tasks import Task, task_named
from nbl_export.settings import (
    BenchSettings,
    CalibrateSettings,
    ConvertSettings,
    EngineSettings,
    EvalSettings,
    ExportSettings,
    RunSettings,
    SelectSettings,
    Settings,
    VerifySettings,
)
from nbl_export.stages.export import check_export_of, reads_calibration
from nbl_export.stages.select.stage import reads_graph
from nbl_export.workspace import Workspace, check_place

_REWRITE = ("select", "export")
_GRAPHS = (*_REWRITE, "rewrite")


def check_named(model: str, settings: CalibrateSettings) -> None:
    """Refuse calibration text that is not there, before a model is fetched for it."""
    from nbl_export.calibrate.documents import check_there

    if not user_path(model, "MODEL").exists():
        for source in settings.sources:
            check_there(source)


def check_run(source: ModelSource, out: Path, asked: RunSettings) -> None:
    """Refuse what no run of ``source`` into ``out`` can be asked."""
    from nbl_export.linearize.scores import check_selection
    from nbl_export.models.claims import claims_of

    resolved = asked.resolve(task_named(source.task))
    check_export_of(source, resolved.exporting)
    _check_folders(source, out, resolved.calibration)
    claims = claims_of(source)
    if claims.layers is not None:
        most = most_blocks(claims.layers, resolved.calibration.parts)
        check_selection(resolved.selection, most, claims.width)


def check_calibrate(source: ModelSource, out: Path, settings: CalibrateSettings) -> None:
    """Refuse what no calibration of ``source`` into ``out`` can be asked."""
    from nbl_export.models.claims import claims_of

    _check_folders(source, out, settings)
    claims_of(source)


def _check_folders(source: ModelSource, out: Path, settings: CalibrateSettings) -> None:
    from nbl_export.models.processors import check_processor
    from nbl_export.stages.calibration_data import check_sources

    check_apart(source, out)
    check_place(out)
    check_sources(source, settings)
    check_processor(source)


def check_resumed(ws: Workspace, source: ModelSource, asked: Settings | None) -> None:
    """Refuse a stage, by what is ``asked`` of it, in a folder without what it reads; None is asked of a rewrite."""
    task = task_named(source.task)
    resolved = asked and asked.resolve(task)
    for stage in read_by(resolved, task):
        ws.finished(stage)
    if isinstance(resolved, ExportSettings):
        from nbl_export.models.processors import check_processor

        check_export_of(source, resolved)
        check_processor(source)
    if isinstance(resolved, EvalSettings) and task.causal:
        from nbl_export.evaluate.tasks import check_tasks

        check_tasks(resolved.tasks)


def read_by(settings: Settings | None, task: Task) -> Iterator[str]:
    """The stages that must be done before the one that has these ``settings``."""
    if isinstance(settings, SelectSettings):
        yield "calibrate"
        yield from ["export"] * reads_graph(settings)
    elif isinstance(settings, ExportSettings):
        yield from ["calibrate"] * reads_calibration(task, settings)
    elif isinstance(settings, ConvertSettings):
        yield "select"
    elif isinstance(settings, EngineSettings | VerifySettings | EvalSettings | BenchSettings):
        yield from _GRAPHS
    elif settings is None:
        yield from _REWRITE
