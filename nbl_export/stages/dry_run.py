"""`nbl-export MODEL --dry-run`: what a run would do in its folder, stage by stage, and what that would take.

1. What is kept is decided by the stages, with their own keys: each is called on a run that ends where its work begins.
2. A stage that reads what is made again is taken to be made again: what it will read is not there yet.
3. Nothing is written, and no weight is read but to see whether the model of the folder has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nbl_export.blocks import most_blocks
from nbl_export.files import Unread
from nbl_export.models.folder import task_named
from nbl_export.models.load import LoadedModel
from nbl_export.models.source import ModelSource, find_model
from nbl_export.progress import Listener, Silent
from nbl_export.report.drawing import Table
from nbl_export.settings import (
    CalibrateSettings,
    EngineSettings,
    ExportSettings,
    FolderSettings,
    RunSettings,
    SelectSettings,
    Settings,
    VerifySettings,
)
from nbl_export.stages.build import build
from nbl_export.stages.calibrate import calibrate
from nbl_export.stages.export import export
from nbl_export.stages.in_order import check_asked, check_source
from nbl_export.stages.needs import check_disk, disk, lacks_memory, memory, order, shown, sizes_of_source
from nbl_export.stages.rewrite import check_baseline, rewrite
from nbl_export.stages.run import Run, read_by
from nbl_export.stages.select.stage import select
from nbl_export.stages.verify import verify
from nbl_export.workspace import ReadOnly, Workspace, is_workspace, kept_digests

if TYPE_CHECKING:
    import torch

_NEW = "not done yet"


@dataclass(frozen=True)
class StageAhead:
    """A stage of a run: whether it is ``kept``, and else ``why`` it is done, in words.

    ``memory`` are the bytes that it takes, None where there is no formula; ``leaves`` those that it adds to the folder,
    ``beside`` those that it needs there while it works.
    """

    stage: str
    kept: bool
    why: str = ""
    memory: int | None = None
    leaves: int = 0
    beside: int = 0


@dataclass(frozen=True)
class DryRun:
    """What a run of ``model`` into the folder ``out`` would do: its ``stages`` in order.

    ``problems`` are sentences on memory that is not there, for which a run is not refused.
    """

    model: str
    out: str
    stages: tuple[StageAhead, ...]
    problems: tuple[str, ...] = ()

    @property
    def tables(self) -> list[Table]:
        """For the terminal."""
        rows = []
        for one in self.stages:
            what = "kept" if one.kept else "do" if one.why == _NEW else f"do again: {one.why}"
            room = "–" if one.kept else "?" if one.memory is None else shown(one.memory)
            disk = ("–", "–") if one.kept else (shown(one.leaves), shown(one.beside))
            rows.append((one.stage, what, room, *disk))
        title = f"A run of {self.model} into {self.out} (nothing is written now)"
        columns = ("stage", "what", "memory", "disk left", "disk beside")
        return [Table(title, columns, tuple(rows), problems=self.problems)]


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
    and what each would take on this machine.

    Nothing is written, no lock is taken. What a run would refuse before its work is refused here, too.
    """
    import psutil
    import torch

    from nbl_export.linearize.scores import check_selection
    from nbl_export.models.load import fast_dtype, find_device

    asked, out = RunSettings.of(selection, calibration, verification, exporting, engines, folder), Path(out)
    check_asked(str(model), asked)

    def early(source: ModelSource) -> None:
        check_source(out, source, asked.resolve(task_named(source.task)))

    # Whether the model is the same matters only where there is something to keep.
    digests = kept_digests(out, rehash, listener) if is_workspace(out) else Unread()
    source = find_model(str(model), trust_remote_code, digests, early)
    run = _Rehearsal(ReadOnly(out, digests), LoadedModel(source, Silent()), listener or Silent())
    run.workspace.set_model(source.as_json())
    asked = asked.resolve(run.model.task)
    whys = _whys(run, asked)
    made = [stage for stage in whys if whys[stage]]
    if not made:
        return DryRun(source.source, str(out), tuple(StageAhead(stage, True) for stage in whys))
    if "export" not in made and {"rewrite", "verify"} & {*made}:
        check_baseline(run.workspace)
    sizes, free, text = sizes_of_source(source), psutil.virtual_memory().available, asked.calibration
    if asked.selection.layers is None:
        check_selection(asked.selection, most_blocks(sizes.layers, text.parts), sizes.width)
    place = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    check_disk(Workspace(place), sizes, asked, made)
    dtype = fast_dtype(find_device(text.device)) if text.dtype == "auto" else text.dtype
    room, taken = disk(sizes, asked), memory(sizes, asked, getattr(torch, dtype).itemsize, free)
    needs = {stage: int(sum(taken[stage].values())) for stage in made if stage in taken}
    stages = (
        StageAhead(stage, False, why, needs.get(stage), *room[stage]) if why else StageAhead(stage, True)
        for stage, why in whys.items()
    )
    lacking = (lacks_memory(stage, taken[stage], free) for stage in needs)
    return DryRun(source.source, str(out), tuple(stages), tuple(filter(None, lacking)))


# which stages are kept ----------------------------------------------------------------------------


class _Reached(Exception):
    """The work of a stage would begin, or is done: ``why`` it is to do, in words; None if it is kept."""

    def __init__(self, why: str | None) -> None:
        super().__init__()
        self.why = why


class _Rehearsal(Run):
    """A run whose stages come as far as their work."""

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        made_of: Mapping[str, str],
        device: torch.device | None = None,
    ) -> NoReturn:
        """Raise :class:`_Reached` with why its work would be done."""
        why = self.workspace.undone(name, settings, made_of)
        raise _Reached(why if why is None else why or _NEW)


def _whys(run: Run, asked: RunSettings) -> dict[str, str | None]:
    """Why each stage of the run is done, in order; None of one that is kept."""
    keeps, engines = asked.folder.keeps, asked.engines or EngineSettings()
    stages: dict[str, tuple[Settings, Callable[[], object]]] = {
        "calibrate": (asked.calibration, lambda: calibrate("", run, asked.calibration)),
        "select": (asked.selection, lambda: select(run, asked.selection)),
        "export": (asked.exporting, lambda: export(run, asked.exporting, there=keeps)),
        "rewrite": (Settings(), lambda: rewrite(run, whole=not keeps)),
        "build": (engines, lambda: build(run, engines)),
        "verify": (asked.verification, lambda: verify(run, asked.verification)),
    }
    whys: dict[str, str | None] = {}
    for stage in order(asked):
        settings, go = stages[stage]
        above = [*read_by(settings, run.model.task), *["build"] * (stage == "verify")]
        if run.workspace.record(stage) is None:
            whys[stage] = _NEW
        elif again := next((name for name in above if whys.get(name)), None):
            whys[stage] = f"`{again}` is done again"
        else:
            try:
                go()
            except _Reached as reached:
                whys[stage] = reached.why
    return whys
