"""One invocation on one output folder: the workspace, the model, the listener, and which stages are already done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.models.loaded import LoadedModel
from nbl_export.models.source import ModelSource, same_model
from nbl_export.progress import Listener, Silent
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    pass


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
    """One invocation on one output folder: the workspace, the model, and the listener."""

    workspace: Workspace
    model: LoadedModel
    listener: Listener = field(default_factory=Silent)

    @classmethod
    def start(
        cls,
        source: ModelSource,
        out: Path,
        listener: Listener | None = None,
    ) -> Run:
        """Start with a model; an existing output folder must be of the same model."""
        workspace = Workspace.create(out)
        workspace.set_model(source.as_json())
        return cls(workspace, LoadedModel(source, listener or Silent()), listener or Silent())

    @classmethod
    def resume(cls, out: Path, listener: Listener | None = None) -> Run:
        """Continue in an existing output folder with its recorded model."""
        workspace = Workspace.open(out)
        info = workspace.model_info
        if info is None:
            raise InputError(f"{out} records no model: start with `nbl-export calibrate MODEL -o {out}`.")
        source = same_model(info)
        return cls(workspace, LoadedModel(source, listener or Silent()), listener or Silent())

    def stage(
        self, name: str, key: str, settings: dict[str, Any], work: Callable[[Listener], list[Path]]
    ) -> None:
        """Do ``work`` unless it is already done; its files and notes are recorded when it succeeds."""
        if self.workspace.is_done(name, key):
            self.listener.note(f"{name}: done already, kept.")
            return
        listener = _Noting(self.listener)
        start = time.perf_counter()
        try:
            files = work(listener)
        except OSError as error:
            raise os_error_in_words(error, f"in stage `{name}`") from error
        self.workspace.finish(name, key, settings, files, time.perf_counter() - start, listener.notes)
