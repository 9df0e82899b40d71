"""One invocation on one output folder: the workspace, the model, the listener, and which stages are already done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from nbl_export.engine.manifest import EngineFile, load_manifest
from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import read_json
from nbl_export.graph.summary import OnCopy
from nbl_export.machine import cores
from nbl_export.models.folder import Task, task_named
from nbl_export.models.load import LoadedModel, described, exact_float32, find_device
from nbl_export.models.source import ModelSource, check_apart, find_model, same_model
from nbl_export.packages import check_system, part
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import ALONE, Ranks, check_alone, together
from nbl_export.records import StageRecord
from nbl_export.runtime.session import CPU, provider_on, running_on
from nbl_export.settings import (
    BenchSettings,
    ConvertSettings,
    EngineSettings,
    EvalSettings,
    ExportSettings,
    RunSettings,
    SelectSettings,
    Settings,
    VerifySettings,
)
from nbl_export.settings.definition import OnDevice
from nbl_export.stages.inspection import finish_drawing
from nbl_export.workspace import Workspace, check_free, kept_digests

S = TypeVar("S", bound="Settings | RunSettings")
_GRAPHS = ("select", "export", "rewrite")
# What must be done before a stage, by its settings; a rewrite has none of its own.
_READS: dict[type, tuple[str, ...]] = {
    Settings: _GRAPHS[:2],
    ConvertSettings: _GRAPHS[:1],
    **dict.fromkeys((EngineSettings, VerifySettings, EvalSettings, BenchSettings), _GRAPHS),
}


class Work:
    """A stage at work: its listener, whose notes are recorded, and the ``files`` that it writes."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.task = listener.task
        self.notes: list[str] = []
        self.files: list[Path] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._listener.note(text)


@dataclass
class Run:
    """One invocation on one output folder: the workspace, the model, and the listener.

    Of several ``ranks``, the first alone has the lock, reads and writes the folder's record, and is listened to.
    ``checked`` is the last export that the model was found to have a graph for, and what was found.
    """

    workspace: Workspace
    model: LoadedModel
    listener: Listener = field(default_factory=Silent)
    ranks: Ranks = ALONE
    checked: tuple[ExportSettings, tuple[OnCopy, ...]] | None = None

    def on(self, asked: str) -> torch.device:
        """The device that a stage was ``asked`` to run on; from now on the model's copies are there.

        Raises :class:`MissingDependencyError` if it is not there.
        """
        self.model.device = device = find_device(asked)
        return device

    @contextmanager
    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        made_of: Mapping[str, str],
        device: torch.device | None = None,
    ) -> Iterator[Work | None]:
        """The work of a stage, None if it is already done; its files and notes are recorded when the block succeeds.

        ``made_of`` names everything that it reads but the settings: keys of stages, and digests of other inputs.
        ``device`` is what PyTorch runs on, if it does: float32 is multiplied as such there, and the record says where
        the work was done.
        """
        ws, ranks = self.workspace, self.ranks
        if (why := ranks.shared(lambda: ws.undone(name, settings, made_of))) is None:
            self.listener.note(f"{name}: done already, kept.")
            yield None
            return
        if why:
            self.listener.note(f"{name}: done again, since {why}.")
        work, start = Work(self.listener), time.perf_counter()
        try:
            with nullcontext() if device is None else exact_float32():
                yield work
        except OSError as error:
            raise os_error_in_words(error, f"in stage `{name}`") from error
        seconds, where = time.perf_counter() - start, "" if device is None else described(device)
        ranks.shared(lambda: ws.finish(name, settings, made_of, work.files, seconds, work.notes, where))


@contextmanager
def opened(
    out: str | Path | Run,
    asked: S,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
    check: Callable[[ModelSource, S], object] = lambda _source, _asked: None,
    model: str | Path | None = None,
    new: bool = False,
    several: bool = False,
) -> Iterator[tuple[Run, S]]:
    """A run in ``out`` with its lock held, and what was ``asked``, checked and resolved for its model.

    A run is used as it is. A ``new`` one makes the folder, or goes on in one of the same ``model``; any other goes on
    with the model that the folder records, and ``model`` is where that is now. ``check`` may refuse a model by its
    small files, before its weights are read. ``several`` processes may share the work. Whether code of the model may
    run is said anew each time; a folder, which may come from elsewhere, does not say.
    """
    if isinstance(out, Run):
        yield out, asked
        return
    asked.check()
    check_machine(asked)
    # It knows nothing of a container's quota.
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    if not several:
        check_alone()
    place, at = Path(out), None if model is None else str(model)

    def resolved(source: ModelSource) -> S:
        return cast("S", asked.resolve(task_named(source.task)))

    def found() -> tuple[Workspace, ModelSource]:
        digests = kept_digests(place, rehash, listener)
        if new:
            source = find_model(str(at), trust_remote_code, digests, lambda one: check(one, resolved(one)))
            check_apart(source, place)
            return Workspace.create(place, digests), source
        workspace = Workspace.open(place, digests)

        def early(one: ModelSource) -> None:
            for stage in read_by(wanted := resolved(one), task_named(one.task)):
                workspace.finished(stage)
            check(one, wanted)

        source = same_model(workspace.model_info or {}, trust_remote_code, workspace.digests, early, at)
        if at is not None:
            check_apart(source, place)
        return workspace, source

    def begin() -> None:
        # A process that is refused has written nothing.
        held.enter_context(workspace.lock())
        if at is None:
            workspace.found_model(source.as_json())
        else:
            workspace.set_model(source.as_json())
        finish_drawing(workspace)

    with together() as ranks, ExitStack() as held:
        ranks.shared(lambda: check_free(place))
        workspace, source = ranks.shared(found)
        ranks.shared(begin)
        heard = listener if listener is not None and ranks.first else Silent()
        run = Run(workspace, LoadedModel(source, heard), heard, ranks)
        yield run, resolved(source)


def check_machine(asked: Settings | RunSettings) -> None:
    """Raise :class:`MissingDependencyError` for a system, or for a device that is asked for, that is not here."""
    check_system()
    for settings in asked.parts if isinstance(asked, RunSettings) else [asked]:
        if isinstance(settings, OnDevice):
            find_device(settings.device)


def read_by(settings: Settings | RunSettings, task: Task) -> tuple[str, ...]:
    """The stages that must be done before the one that has these ``settings``."""
    if isinstance(settings, SelectSettings):
        return ("calibrate", *["export"] * settings.reads_graph)
    if isinstance(settings, ExportSettings):
        return ("calibrate",) * settings.reads_calibration(task)
    return _READS.get(type(settings), ())


def graphs_setting(device: torch.device) -> dict[str, str]:
    """What is said where graphs run on ``device`` and are no longer measured on the CPU."""
    return {} if provider_on(str(device)) == CPU else {"graphs": device.type}


@contextmanager
def graphs_on(device: torch.device, listener: Listener) -> Iterator[None]:
    """Within the block, graphs run on ``device``, if onnxruntime does; a note says where it does not."""
    if device.type != "cpu" and not graphs_setting(device):
        line = part("onnxruntime-gpu").pip
        get = f" ({line} in an environment without [cpu])" if device.type == "cuda" else ""
        listener.note(f"onnxruntime does not run on {device} here{get}: graphs run on the CPU.")
    with running_on(str(device)):
        yield


# what the folder holds -----------------------------------------------------------------------------


def check_baseline(ws: Workspace) -> None:
    """Raise :class:`InputError` if the unmodified graph was deleted on purpose."""
    if (record := ws.record("export")) and record.dropped:
        raise InputError(
            f"{ws.root} has no unmodified graph any more (--keep-baseline no): run `nbl-export export {ws.root}` first."
        )


def current_rewrite(ws: Workspace) -> StageRecord:
    """The record of the rewrite, which must be of the current plan and baseline."""
    for stage in ("select", "export"):
        ws.require(stage)
    return ws.require("rewrite")


def model_positions(ws: Workspace) -> int | None:
    """The model's number of positions, from the configuration of the baseline graph, or of the other one without it."""
    path = (ws.baseline if ws.baseline.exists() else ws.model).with_name("config.json")
    config = read_json(path, "The baseline's configuration", "run `nbl-export export` again")
    try:
        both = {**config, **(config.get("text_config") or {})}
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        return next((int(both[name]) for name in names if both.get(name)), None)
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"{path} is not a configuration of a model: run `nbl-export export` again."
        ) from None


def current_engines(ws: Workspace) -> tuple[EngineFile, ...]:
    """The engines of the current graphs, each checked against its manifest; empty if there are none.

    :func:`passed_over` says why those are not current that there are.
    """
    if ws.record("build") is None or ws.stale("build"):
        return ()
    ws.require("build")
    return tuple(EngineFile(path, load_manifest(path)) for path in (ws.base_engine, ws.engine))


def passed_over(ws: Workspace) -> str | None:
    """Why the engines in the folder are not those of its graphs, if there are such."""
    if ws.record("build") is None or not (why := ws.stale("build")):
        return None
    return f"the engines in {ws.engine.parent} are of other graphs ({why}): run `nbl-export build {ws.root}`"
