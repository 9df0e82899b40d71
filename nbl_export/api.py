"""The Python API: the verbs of the command line as functions, which the command line itself calls::

    from nbl_export import api
    report = api.run("path/to/model", "out", api.SelectSettings(k=8))
    assert report.passed

Each works on an output folder, holds its lock, keeps what is already done there with the same
settings, and raises :class:`.NblError` with a one-sentence message for whatever the user
can put right. ``listener`` receives progress (:mod:`nbl_export.progress`); none is silent. ``trust_remote_code`` lets
code that comes with the model run; it is said at each call that loads the model, and no folder remembers it.
``rehash`` reads files again whose digests the folder has kept.

:func:`calibrate` and :func:`select` share their work with the other processes that torchrun started; the others
refuse to be one of several.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nbl_export import pipeline
from nbl_export.errors import NblError
from nbl_export.finished import chat, diff, generate, inspect, package, report, verify_package
from nbl_export.linearize.plan import Plan
from nbl_export.models.source import find_model
from nbl_export.planning import dry_run
from nbl_export.progress import Listener
from nbl_export.ranks import in_one_process, together
from nbl_export.report.schema import Report
from nbl_export.settings import (
    BenchSettings,
    Budget,
    CalibrateSettings,
    ChatSettings,
    ConvertSettings,
    DiffBounds,
    EngineSettings,
    EvalSettings,
    ExportSettings,
    FolderSettings,
    GenerateSettings,
    LossBound,
    RunSettings,
    SelectSettings,
    Settings,
    VerifySettings,
)
from nbl_export.stages import early
from nbl_export.stages.run import Run
from nbl_export.workspace import kept_digests

if TYPE_CHECKING:
    from nbl_export.doctor.diagnosis import Diagnosis
    from nbl_export.engine.pair import EngineFile
    from nbl_export.report.bench import BenchReport
    from nbl_export.report.evaluation import Evaluation
    from nbl_export.report.forms import Conversion
    from nbl_export.rewrite.replace import RewriteResult

S = TypeVar("S", bound=Settings)

__all__ = [
    "BenchSettings",
    "Budget",
    "CalibrateSettings",
    "ChatSettings",
    "ConvertSettings",
    "DiffBounds",
    "EngineSettings",
    "EvalSettings",
    "ExportSettings",
    "FolderSettings",
    "GenerateSettings",
    "LossBound",
    "NblError",
    "Plan",
    "Report",
    "SelectSettings",
    "VerifySettings",
    "bench",
    "build",
    "calibrate",
    "chat",
    "convert",
    "diff",
    "doctor",
    "dry_run",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "package",
    "report",
    "rewrite",
    "rewrite_onnx",
    "run",
    "select",
    "verify",
    "verify_package",
]


@in_one_process
def run(
    model: str | Path,
    out: str | Path,
    selection: SelectSettings,
    calibration: CalibrateSettings | None = None,
    verification: VerifySettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    exporting: ExportSettings | None = None,
    engines: EngineSettings | None = None,
    rehash: bool = False,
    folder: FolderSettings | None = None,
) -> Report:
    """Every stage in order; ``model`` is a Hub id, a folder or a GGUF file.

    Without ``engines`` no TensorRT engine is built.
    """
    asked = RunSettings.of(selection, calibration, verification, exporting, engines, folder)
    digests = kept_digests(Path(out), rehash, listener)
    source = pipeline.find(str(model), Path(out), asked, trust_remote_code, digests)
    work = Run.start(source, Path(out), listener, digests=digests)
    with work.workspace.lock():
        return pipeline.run_all(work, asked.resolve(work.model.task))


@contextmanager
def _resumed(
    out: str | Path,
    asked: S,
    listener: Listener | None,
    trust_remote_code: bool,
    rehash: bool,
    model: str | Path | None = None,
) -> Iterator[tuple[Run, S]]:
    """Go on in ``out`` with its lock held, and with what was asked checked and resolved for its model."""
    asked.check()
    pipeline.check_machine(asked)
    with together() as ranks:
        refuse = partial(early.check_resumed, asked=asked)
        place = None if model is None else str(model)
        work = Run.resume(Path(out), listener, trust_remote_code, ranks, rehash, refuse, place)
        with work.locked():
            yield work, asked.resolve(work.model.task)


def calibrate(
    model: str | Path,
    out: str | Path,
    settings: CalibrateSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Path:
    """Stream the moments of ``model``'s attention layers; returns the path of the moments file."""
    asked = settings or CalibrateSettings()
    asked.check()
    pipeline.check_machine(asked)
    with together() as ranks:
        ranks.shared(lambda: early.check_named(str(model), asked))
        digests = kept_digests(Path(out), rehash, listener if ranks.first else None)
        refuse = partial(early.check_calibrate, out=Path(out), settings=asked)
        source = ranks.shared(lambda: find_model(str(model), trust_remote_code, digests, refuse))
        work = Run.start(source, Path(out), listener, ranks, digests)
        with work.locked():
            pipeline.calibrate(work, asked)
    return work.workspace.moments


def select(
    out: str | Path,
    settings: SelectSettings,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Plan:
    """Score every layer and choose K of them; returns the plan."""
    with _resumed(out, settings, listener, trust_remote_code, rehash) as (work, resolved):
        return pipeline.select(work, resolved)


@in_one_process
def export(
    out: str | Path,
    settings: ExportSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Path:
    """Export the unmodified model; returns the path of the baseline graph."""
    with _resumed(out, settings or ExportSettings(), listener, trust_remote_code, rehash) as (work, resolved):
        pipeline.export(work, resolved)
    return work.workspace.baseline


@in_one_process
def rewrite(out: str | Path, listener: Listener | None = None, rehash: bool = False) -> Path:
    """Rewrite the baseline graph by the plan; returns the path of the linearized graph."""
    work = Run.resume(Path(out), listener, rehash=rehash, early=partial(early.check_resumed, asked=None))
    with work.workspace.lock():
        pipeline.rewrite(work)
    return work.workspace.model


@in_one_process
def rewrite_onnx(
    onnx: str | Path,
    plan: str | Path,
    out: str | Path,
    listener: Listener | None = None,
) -> RewriteResult:
    """Rewrite a decoder that somebody else exported, a file or a folder, by ``plan`` into the folder ``out``."""
    from nbl_export.rewrite.foreign import rewrite_foreign

    return rewrite_foreign(Path(onnx), Path(plan), Path(out), listener)


@in_one_process
def build(
    out: str | Path,
    settings: EngineSettings | None = None,
    listener: Listener | None = None,
    rehash: bool = False,
) -> list[EngineFile]:
    """Build the base and the linearized TensorRT engine; returns them with their manifests."""
    with _resumed(out, settings or EngineSettings(), listener, False, rehash) as (work, resolved):
        return pipeline.build(work, resolved)


@in_one_process
def verify(
    out: str | Path,
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
    with _resumed(out, asked, listener, trust_remote_code, rehash, model) as (work, resolved):
        if again:
            work.workspace.forget("verify")
        return pipeline.verify(work, resolved)


@in_one_process
def evaluate(
    out: str | Path,
    settings: EvalSettings,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Evaluation:
    """Tasks and retrieval on both graphs. A failed gate is in the value (``passed`` is False), not raised."""
    with _resumed(out, settings, listener, trust_remote_code, rehash) as (work, resolved):
        return pipeline.evaluate(work, resolved)


@in_one_process
def bench(
    out: str | Path,
    settings: BenchSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> BenchReport:
    """Time both graphs and others in turn. A suspect or slower cell is in the value (``passed``), not raised."""
    with _resumed(out, settings or BenchSettings(), listener, trust_remote_code, rehash) as (work, resolved):
        return pipeline.bench(work, resolved)


@in_one_process
def convert(
    out: str | Path,
    settings: ConvertSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Conversion:
    """Write the plan in the form of another engine, and prove it there. A failed gate is in the value (``passed``)."""
    with _resumed(out, settings or ConvertSettings(), listener, trust_remote_code, rehash) as (
        work,
        resolved,
    ):
        return pipeline.convert(work, resolved)


@in_one_process
def doctor(listener: Listener | None = None) -> Diagnosis:
    """What this machine and this environment have, what each missing package would bring, and what is wrong.

    Each package that is there is tried in a process of its own. What the main job lacks is in the value (``lacking``,
    ``runs_here``), not raised.
    """
    from nbl_export.doctor.diagnosis import diagnose

    return diagnose(listener)
