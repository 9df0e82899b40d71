"""`nbl-export MODEL --dry-run`: what a run would do in its folder, stage by stage, and what that would take.

1. What is kept is decided by the stages, with their own keys: each is called on a run that ends where its work begins.
2. A stage that reads what is made again is taken to be made again: what it will read is not there yet.
3. Nothing is written, and no weight is read but to see whether the model of the folder has changed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nbl_export.blocks import ATTENTION, MLP, SPAN, Block, Mlp, spans_of
from nbl_export.digests import Unread
from nbl_export.errors import os_error_in_words
from nbl_export.models.loaded import LoadedModel
from nbl_export.models.source import ModelSource, find_model
from nbl_export.models.tasks import task_named
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
from nbl_export.stage_record import key_of
from nbl_export.stages.build import build
from nbl_export.stages.calibrate import calibrate
from nbl_export.stages.export import export
from nbl_export.stages.in_order import check_asked, check_source
from nbl_export.stages.needs import Disk, check_disk, disk, lacks_memory, memory, shown, sizes_of_source
from nbl_export.stages.rewrite import check_baseline, rewrite
from nbl_export.stages.run import Run, read_by
from nbl_export.stages.select.stage import select
from nbl_export.stages.verify import verify
from nbl_export.workspace import ReadOnly, Workspace, is_workspace, kept_digests

if TYPE_CHECKING:
    import torch

COLUMNS = ("stage", "what", "memory", "disk left", "disk beside")
_NEW = "not done yet"


@dataclass(frozen=True)
class StageAhead:
    """A stage of a run: whether it is ``kept``, and else ``why`` it is done, in words.

    ``files`` are those that it would write, or has written where it is kept, by their names in the output folder; a
    name that ends with ``/`` is a folder of them. Configurations and tokenizers beside graphs, and plots, are listed
    once they are there. ``memory`` are the bytes that it takes, None where there is no formula; ``leaves`` those that
    it adds to the folder, ``beside`` those that it needs there while it works.
    """

    stage: str
    kept: bool
    why: str
    files: tuple[str, ...]
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
        made = [one for one in self.stages if not one.kept]
        rows = tuple(_row(one) for one in self.stages)
        title = f"A run of {self.model} into {self.out} (nothing is written now)"
        tables = [Table(title, COLUMNS, rows, "" if made else "All is kept.", problems=self.problems)]
        if made:
            files = tuple((one.stage, "  ".join(one.files)) for one in made)
            beside = "Beside the graphs come their configurations and tokenizers."
            tables.append(Table("What would be written", ("stage", "files"), files, beside))
        return tables


def _row(one: StageAhead) -> tuple[str, ...]:
    if one.kept:
        return (one.stage, "kept", *["–"] * 3)
    what = "do" if one.why == _NEW else f"do again: {one.why}"
    taken = "?" if one.memory is None else shown(one.memory)
    return (one.stage, what, taken, shown(one.leaves), shown(one.beside))


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
    import psutil
    import torch

    from nbl_export.linearize.scores import check_selection
    from nbl_export.models.device import find_device
    from nbl_export.models.layers import hidden_size
    from nbl_export.models.load import fast_dtype, load_skeleton

    asked, out = RunSettings.of(selection, calibration, verification, exporting, engines, folder), Path(out)
    check_asked(str(model), asked)
    # Whether the model is the same matters only where there is something to keep.
    digests = kept_digests(out, rehash, listener) if is_workspace(out) else Unread()

    def early(source: ModelSource) -> None:
        check_source(out, source, asked.resolve(task_named(source.task)))

    source = find_model(str(model), trust_remote_code, digests, early)
    parents = (out, *out.absolute().parents)
    place = out if is_workspace(out) else next(path for path in parents if path.is_dir())
    if not os.access(place, os.W_OK | os.X_OK):
        denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        raise os_error_in_words(denied, f"while preparing the output folder {out}")
    run = _Rehearsal(ReadOnly(out, digests), LoadedModel(source, Silent()), listener or Silent())
    ws = run.workspace
    ws.set_model(source.as_json())
    resolved = asked.resolve(run.model.task)
    whys = _whys(run, resolved)
    kept = {stage for stage, why in whys.items() if not why}
    if "export" in kept and not {"rewrite", "verify"} <= kept:
        check_baseline(ws)
    files = {
        stage: _recorded(ws, stage) if stage in kept else _written(ws, source, resolved, stage)
        for stage in whys
    }
    if kept == set(whys):
        return DryRun(source.source, str(out), tuple(StageAhead(one, True, "", files[one]) for one in whys))
    skeleton = load_skeleton(source)
    check_selection(resolved.selection, _can_go(skeleton, resolved.calibration.parts), hidden_size(skeleton))
    sizes, free = sizes_of_source(source, skeleton), psutil.virtual_memory().available
    room = {one.stage: one for one in disk(sizes, resolved) if one.stage not in kept}
    check_disk(Workspace(place), list(room.values()))
    text = resolved.calibration
    dtype = fast_dtype(find_device(text.device)) if text.dtype == "auto" else text.dtype
    taken = memory(sizes, resolved, getattr(torch, dtype).itemsize, free)
    stages = []
    for stage, why in whys.items():
        of = room.get(stage, Disk(stage, 0))
        needs = int(sum(taken[stage].values())) if why and stage in taken else None
        stages.append(StageAhead(stage, not why, why or "", files[stage], needs, of.leaves, of.beside))
    lacking = (
        lacks_memory(stage, taken[stage], free) for stage in whys if stage in taken and stage not in kept
    )
    return DryRun(source.source, str(out), tuple(stages), tuple(filter(None, lacking)))


def _can_go(model: torch.nn.Module, parts: Sequence[str]) -> list[Block]:
    """What can become linear of a ``model`` without weights, as far as that shows: its modules, not what they do."""
    from nbl_export.models.candidates import shared_without_numbers
    from nbl_export.models.layers import attention_layers
    from nbl_export.models.mlps import MlpPaths, mlp_paths

    lenders = set(shared_without_numbers(model).values())
    attentions = [layer.index for layer in attention_layers(model) if layer.index not in lenders]
    mlps = [index for index, found in mlp_paths(model).items() if isinstance(found, MlpPaths)]
    every: dict[str, Iterable[Block]] = {
        ATTENTION: attentions,
        MLP: map(Mlp, mlps),
        SPAN: spans_of({*attentions} & {*mlps}),
    }
    return sorted(block for part in parts for block in every[part])


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
        done = self.workspace.is_done(name, key_of(name, settings, made_of))
        raise _Reached(None if done else self.workspace.why_again(name, settings, made_of) or _NEW)


def _whys(run: Run, asked: RunSettings) -> dict[str, str | None]:
    """Why each stage of the run is done, in order; None of one that is kept."""
    selection, verification = asked.selection, asked.verification
    stages: dict[str, tuple[Settings, Callable[[], object]]] = {
        "calibrate": (asked.calibration, lambda: calibrate("", run, asked.calibration)),
        "select": (selection, lambda: select(run, selection)),
        "export": (asked.exporting, lambda: export(run, asked.exporting, there=asked.folder.keeps)),
        "rewrite": (Settings(), lambda: rewrite(run, whole=not asked.folder.keeps)),
    }
    if engines := asked.engines:
        stages["build"] = engines, lambda: build(run, engines)
    stages["verify"] = verification, lambda: verify(run, verification)
    order = list(stages)
    if selection.budget or selection.workload:
        order[1:3] = "export", "select"
    whys: dict[str, str | None] = {}
    for stage in order:
        settings, go = stages[stage]
        above = [*read_by(settings, run.model.task), *(["build"] if stage == "verify" and engines else [])]
        if run.workspace.record(stage) is None:
            whys[stage] = _NEW
        elif again := next((name for name in above if whys[name]), None):
            whys[stage] = f"`{again}` is done again"
        else:
            whys[stage] = _why(go)
    return whys


def _why(go: Callable[[], object]) -> str | None:
    try:
        go()
    except _Reached as reached:
        return reached.why
    raise AssertionError("a stage ended without its work")


# files --------------------------------------------------------------------------------------------


def _recorded(ws: Workspace, stage: str) -> tuple[str, ...]:
    record = ws.finished(stage)
    return tuple(sorted(name for name in record.files if name not in record.dropped))


def _written(ws: Workspace, source: ModelSource, asked: RunSettings, stage: str) -> tuple[str, ...]:
    """What ``stage`` would write, by the names in the folder."""
    from nbl_export.engine.manifest import manifest_path
    from nbl_export.graph.io import DATA_SUFFIX
    from nbl_export.stages.calibration_data import loader_for

    data = [path.with_name(path.name + DATA_SUFFIX) for path in (ws.baseline, ws.model)]
    engines = [ws.base_engine, ws.engine]
    weights = (
        bool(asked.selection.k or asked.selection.layers or asked.selection.budget) or not asked.folder.keeps
    )
    files = {
        "calibrate": [loader_for(source).path(ws), ws.probe],
        "select": [ws.plan, ws.plan.with_suffix(".safetensors"), ws.candidates],
        "export": [ws.baseline, data[0], ws.export_summary, *[ws.embedding] * asked.exporting.embeds],
        "rewrite": [ws.model, *data[1:] * weights, ws.rewrite_summary],
        "build": [*engines, *map(manifest_path, engines)],
        "verify": [ws.report / name for name in ("report.json", "report.md", "report.html", "junit.xml")],
    }
    names = [path.relative_to(ws.root).as_posix() for path in files[stage]]
    return (*names, *[f"{ws.moments.relative_to(ws.root).as_posix()}/"] * (stage == "calibrate"))
