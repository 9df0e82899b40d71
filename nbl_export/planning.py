"""What a run would do and take, before anything is done: part of the Python API (:mod:`nbl_export.api`)."""

from __future__ import annotations

from pathlib import Path

from nbl_export import pipeline
from nbl_export.digests import Unread
from nbl_export.progress import Listener
from nbl_export.ranks import in_one_process
from nbl_export.settings import (
    CalibrateSettings,
    EngineSettings,
    ExportSettings,
    FolderSettings,
    RunSettings,
    SelectSettings,
    VerifySettings,
)
from nbl_export.stages.dry_run import DryRun, rehearsed
from nbl_export.workspace import is_workspace, kept_digests


@in_one_process
def dry_run(
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
) -> DryRun:
    """What :func:`~nbl_export.api.run` would do with the same arguments: which stages are kept, which are done and why,
    what each would take on this machine, and the files that it would write.

    Nothing is written, no lock is taken. What a run would refuse before its work is refused here, too.
    """
    asked = RunSettings.of(selection, calibration, verification, exporting, engines, folder)
    place = Path(out)
    # Whether the model is the same matters only where there is something to keep.
    digests = kept_digests(place, rehash, listener) if is_workspace(place) else Unread()
    source = pipeline.find(str(model), place, asked, trust_remote_code, digests)
    return rehearsed(source, place, asked, digests, listener)
