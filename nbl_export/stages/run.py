"""One invocation on one output folder: the workspace, the model, the listener, and which stages are already done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nbl_export.digests import Digests
from nbl_export.errors import InputError, os_error_in_words
from nbl_export.models.device import check_device
from nbl_export.models.loaded import LoadedModel
from nbl_export.models.source import ModelSource, check_apart, find_model, same_model
from nbl_export.models.tasks import Task, task_named
from nbl_export.packages import check_system, part
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import ALONE, Ranks, check_alone, together
from nbl_export.settings import (
    BenchSettings,
    ConvertSettings,
    EngineSettings,
    EvalSettings,
    ExportSettings,
    SelectSettings,
    Settings,
    VerifySettings,
)
from nbl_export.settings.definition import OnDevice
from nbl_export.stage_record import key_of
from nbl_export.workspace import Workspace, kept_digests

if TYPE_CHECKING:
    import torch

    from nbl_export.graph.summary import OnCopy

S = TypeVar("S", bound=Settings)
_GRAPHS = ("select", "export", "rewrite")


class _Noting:
    """Forwards everything to a listener and collects the notes for the stage's record."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.notes: list[str] = []
        self.task = listener.task

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

    @classmethod
    def start(
        cls,
        source: ModelSource,
        out: Path,
        listener: Listener | None = None,
        ranks: Ranks = ALONE,
        digests: Digests | None = None,
    ) -> Run:
        """Start with a model; an existing output folder must be of the same model.

        ``digests`` are those with which it was found.
        """

        def found() -> Workspace:
            check_apart(source, out)
            workspace = Workspace.create(out, digests)
            workspace.set_model(source.as_json())
            return workspace

        return cls._of(ranks.shared(found), source, listener, ranks)

    @classmethod
    def resume(
        cls,
        out: Path,
        listener: Listener | None = None,
        trust_remote_code: bool = False,
        ranks: Ranks = ALONE,
        rehash: bool = False,
        early: Callable[[Workspace, ModelSource], object] = lambda _workspace, _found: None,
        model: str | None = None,
    ) -> Run:
        """Continue in an existing output folder with its recorded model; ``rehash`` reads all files again.

        ``model`` is where that is now, which the folder then records.

        ``early`` is told of both before the model's weights are read, and may refuse them.

        Whether code of the model may run is said anew each time; a folder, which may come from elsewhere, does not say.
        """

        def found() -> tuple[Workspace, ModelSource]:
            workspace = Workspace.open(out, kept_digests(out, rehash, listener))
            info = workspace.model_info
            if info is None:
                raise InputError(f"{out} records no model: start with `nbl-export calibrate MODEL -o {out}`.")
            source = same_model(
                info, trust_remote_code, workspace.digests, lambda found: early(workspace, found), model
            )
            if model is None:
                workspace.found_model(source.as_json())
            else:
                check_apart(source, out)
                workspace.set_model(source.as_json())
            return workspace, source

        return cls._of(*ranks.shared(found), listener, ranks)

    @classmethod
    def _of(cls, workspace: Workspace, source: ModelSource, listener: Listener | None, ranks: Ranks) -> Run:
        heard = listener if listener is not None and ranks.first else Silent()
        return cls(workspace, LoadedModel(source, heard), heard, ranks)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other nbl-export processes out of the folder within the block."""
        with ExitStack() as held:
            self.ranks.shared(lambda: held.enter_context(self.workspace.lock()))
            yield

    def on(self, asked: str) -> torch.device:
        """The device that a stage was ``asked`` to run on; from now on the model's copies are there.

        Raises :class:`MissingDependencyError` if it is not there.
        """
        from nbl_export.models.device import find_device

        self.model.device = device = find_device(asked)
        return device

    def stage(
        self,
        name: str,
        settings: dict[str, Any],
        made_of: Mapping[str, str],
        work: Callable[[Listener], list[Path]],
        device: torch.device | None = None,
    ) -> None:
        """Do ``work`` unless it is already done; its files and notes are recorded when it succeeds.

        ``made_of`` names everything that it reads but the settings: keys of stages, and digests of other inputs.
        ``device`` is what PyTorch runs on, if it does: float32 is multiplied as such there, and the record says where
        the work was done.
        """
        ws, ranks = self.workspace, self.ranks
        if ranks.shared(lambda: ws.is_done(name, key_of(name, settings, made_of))):
            self.listener.note(f"{name}: done already, kept.")
            return
        if why := ranks.shared(lambda: ws.why_again(name, settings, made_of)):
            self.listener.note(f"{name}: done again, since {why}.")
        from nbl_export.models.device import described, exact_float32

        listener = _Noting(self.listener)
        start = time.perf_counter()
        try:
            with nullcontext() if device is None else exact_float32():
                files = work(listener)
        except OSError as error:
            raise os_error_in_words(error, f"in stage `{name}`") from error
        seconds, where = time.perf_counter() - start, "" if device is None else described(device)
        ranks.shared(lambda: ws.finish(name, settings, made_of, files, seconds, listener.notes, where))


@contextmanager
def started(
    model: str | Path,
    out: str | Path,
    check: Callable[[ModelSource], object],
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Run]:
    """A run of ``model`` into ``out`` with its lock held; ``check`` may refuse it by its small files."""
    place, heard = Path(out), listener if ranks.first else None
    digests = kept_digests(place, rehash, heard)
    source = ranks.shared(lambda: find_model(str(model), trust_remote_code, digests, check))
    run = Run.start(source, place, listener, ranks, digests)
    with run.locked():
        yield run


@contextmanager
def opened(
    out: str | Path | Run,
    asked: S,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
    check: Callable[[ModelSource, S, Task], object] = lambda _source, _asked, _task: None,
    model: str | Path | None = None,
    several: bool = False,
) -> Iterator[tuple[Run, S]]:
    """Go on in ``out`` with its lock held, and with what was ``asked`` checked and resolved for its model.

    A run is used as it is. ``check`` may refuse the model before its weights are read; ``model`` is where it is now;
    ``several`` processes may share the work.
    """
    if isinstance(out, Run):
        yield out, asked
        return
    asked.check()
    check_machine(asked)
    if not several:
        check_alone()

    def refuse(ws: Workspace, source: ModelSource) -> None:
        task = task_named(source.task)
        resolved = asked.resolve(task)
        for stage in read_by(resolved, task):
            ws.finished(stage)
        check(source, resolved, task)

    place = None if model is None else str(model)
    with together() as ranks:
        run = Run.resume(Path(out), listener, trust_remote_code, ranks, rehash, refuse, place)
        with run.locked():
            yield run, asked.resolve(run.model.task)


def check_machine(*asked: Settings) -> None:
    """Raise :class:`MissingDependencyError` for a system, or for a device that is asked for, that is not here."""
    check_system()
    for settings in asked:
        if isinstance(settings, OnDevice):
            check_device(settings.device)


def read_by(settings: Settings, task: Task) -> Iterator[str]:
    """The stages that must be done before the one that has these ``settings``; a rewrite has none of its own."""
    if isinstance(settings, SelectSettings):
        yield "calibrate"
        yield from ["export"] * settings.reads_graph
    elif isinstance(settings, ExportSettings):
        yield from ["calibrate"] * settings.reads_calibration(task)
    elif isinstance(settings, ConvertSettings):
        yield "select"
    elif isinstance(settings, EngineSettings | VerifySettings | EvalSettings | BenchSettings):
        yield from _GRAPHS
    elif type(settings) is Settings:
        yield from _GRAPHS[:2]


def graphs_setting(device: torch.device) -> dict[str, str]:
    """What is said where graphs run on ``device`` and are no longer measured on the CPU."""
    from nbl_export.runtime.session import CPU, provider_on

    return {} if provider_on(str(device)) == CPU else {"graphs": device.type}


@contextmanager
def graphs_on(device: torch.device, listener: Listener) -> Iterator[None]:
    """Within the block, graphs run on ``device``, if onnxruntime does; a note says where it does not."""
    from nbl_export.runtime.session import running_on

    if device.type != "cpu" and not graphs_setting(device):
        line = part("onnxruntime-gpu").pip
        get = f" ({line} in an environment without [cpu])" if device.type == "cuda" else ""
        listener.note(f"onnxruntime does not run on {device} here{get}: graphs run on the CPU.")
    with running_on(str(device)):
        yield
