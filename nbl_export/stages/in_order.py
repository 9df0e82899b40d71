"""Run every stage in order, or say what that would do and take (``--dry-run``).

calibrate → select ─┐
export ─────────────┴→ rewrite → (build →) verify
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import psutil
import torch

from nbl_export.blocks import most_blocks
from nbl_export.calibrate.text import start_tokens
from nbl_export.files import Unread
from nbl_export.linearize.scores import check_selection
from nbl_export.models.candidates import check_blocks, choices, described
from nbl_export.models.folder import task_named
from nbl_export.models.layers import hidden_size, positions
from nbl_export.models.load import LoadedModel, fast_dtype, find_device
from nbl_export.models.source import ModelSource, find_model
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import check_alone
from nbl_export.report.drawing import Table
from nbl_export.report.schema import Report
from nbl_export.runtime.session import require_onnxruntime
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
from nbl_export.stages.calibrate import calibrate, check_calibration, check_text
from nbl_export.stages.export import check_export, check_model, export
from nbl_export.stages.needs import check_disk, disk, lacks_memory, memory, order, shown, sizes_of_source
from nbl_export.stages.rewrite import build, check_engines, check_limits, check_states, drop_baseline, rewrite
from nbl_export.stages.run import Run, check_baseline, check_machine, opened, read_by
from nbl_export.stages.select import select
from nbl_export.stages.verify import verify
from nbl_export.verify.case import fitting_prompts
from nbl_export.workspace import ReadOnly, Workspace, is_workspace, kept_digests


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

    What is done already with the same settings is kept. Without ``engines`` no TensorRT engine is built.
    """
    whole = RunSettings.of(selection, calibration, verification, exporting, engines, folder)
    check_asked(str(model), whole)

    checked = partial(check_source, Path(out))
    with opened(out, whole, listener, trust_remote_code, rehash, checked, model, new=True) as (work, asked):
        if work.workspace.record("calibrate") is None:
            _check_new(work, asked)
        *_, report = (go() for _, go in _stages(work, asked).values())
        if not asked.folder.keeps and report.passed:
            drop_baseline(work.workspace)
        elif not asked.folder.keeps:
            work.listener.note("The unmodified graph is kept, since the verification failed.")
    return cast("Report", report)


def _stages(run: Run, asked: RunSettings) -> dict[str, tuple[Settings, Callable[[], Any]]]:
    """The stages of a run in order: the settings of each, and what does it."""
    keeps, engines = asked.folder.keeps, asked.engines or EngineSettings()
    every: dict[str, tuple[Settings, Callable[[], Any]]] = {
        "calibrate": (asked.calibration, lambda: calibrate("", run, asked.calibration)),
        "select": (asked.selection, lambda: select(run, asked.selection)),
        "export": (asked.exporting, lambda: export(run, asked.exporting, there=keeps)),
        "rewrite": (Settings(), lambda: rewrite(run, whole=not keeps)),
        "build": (engines, lambda: build(run, engines)),
        "verify": (asked.verification, lambda: verify(run, asked.verification)),
    }
    return {stage: every[stage] for stage in order(asked)}


def check_asked(model: str, asked: RunSettings) -> None:
    """Refuse, before the model is looked for, what is refused of any, or what this machine has nothing for."""
    check_alone()
    asked.check()
    check_machine(asked)
    check_export(None, asked.exporting)
    if asked.engines:
        check_engines(None, asked.engines)
    check_text(model, asked.calibration)


def check_source(out: Path, source: ModelSource, asked: RunSettings) -> None:
    """Refuse, by the model's small files, what no run of ``source`` into ``out`` can be asked.

    A configuration says how many layers a model has, and not which can become linear: what counts is the most that
    there can be.
    """
    check_export(source, asked.exporting)
    config = check_calibration(out, source, asked.calibration)
    if isinstance(layers := getattr(config, "num_hidden_layers", None), int):
        most = most_blocks(layers, asked.calibration.parts)
        check_selection(asked.selection, most, getattr(config, "hidden_size", None))


def _check_new(work: Run, asked: RunSettings) -> None:
    """Refuse, before the first minute of work, what a later stage would."""
    require_onnxruntime()
    model, parts = work.model, asked.calibration.parts
    check_blocks(model.tried, parts)
    others = described(model.model)["others"]
    check_selection(asked.selection, choices(model.model, parts), hidden_size(model.model), others)
    if asked.engines:
        check_states(model.model)
        check_limits(asked.engines, positions(model.model))
    if model.task.causal:
        start = len(start_tokens(model.tokenizer))
        fitting_prompts(positions(model.model), start, asked.verification.decode_steps)
    check_model(work, asked.exporting)
    check_disk(work.workspace, sizes_of_source(model.source), asked, order(asked))


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
        columns = ("stage", "what", "memory", "files it writes", "temporary files")
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
    dtype = (
        fast_dtype(find_device(text.device)) if text.calibration_dtype == "auto" else text.calibration_dtype
    )
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
    """The work of a stage would begin, or is done: why it is to do, in words; None if it is kept."""


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
    whys: dict[str, str | None] = {}
    for stage, (settings, go) in _stages(run, asked).items():
        above = [*read_by(settings, run.model.task), *["build"] * (stage == "verify")]
        if run.workspace.record(stage) is None:
            whys[stage] = _NEW
        elif again := next((name for name in above if whys.get(name)), None):
            whys[stage] = f"`{again}` is done again"
        else:
            try:
                go()
            except _Reached as reached:
                whys[stage] = reached.args[0]
    return whys
