"""One invocation on one output folder: the workspace, the model, who listens, and what is done already."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.models.pooling import Pooling, find_pooling
from nbl_export.models.source import ModelSource, same_model
from nbl_export.models.tasks import Task, task_named
from nbl_export.progress import Listener, Silent
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    import torch


class LoadedModel:
    """A model and its tokenizer or image processor, loaded when first asked for and then kept for the run."""

    def __init__(self, source: ModelSource, listener: Listener) -> None:
        self.source = source
        self._listener = listener
        self._model: torch.nn.Module | None = None
        # A copy lives as long as somebody works with it: later stages need the room.
        self._copies: WeakValueDictionary[str, torch.nn.Module] = WeakValueDictionary()
        self._tokenizer: Any = None
        self._processor: Any = None

    @property
    def task(self) -> Task:
        return task_named(self.source.task)

    @property
    def pooling(self) -> Pooling | None:
        """How a text encoder's states become one vector; None if its folder does not say."""
        return None if self.task.causal else find_pooling(Path(self.source.path))

    @property
    def model(self) -> torch.nn.Module:
        if self._model is None:
            from nbl_export.models.load import load_model

            with self._listener.task(f"Loading {Path(self.source.source).name}", 1, "model") as task:
                self._model = load_model(self.source)
                task.advance(1)
        return self._model

    def in_dtype(self, dtype: str) -> torch.nn.Module:
        """The model in ``dtype``, a copy unless that is float32; ``auto`` is what this machine runs fastest."""
        from nbl_export.models.load import fast_dtype, in_precision

        dtype = fast_dtype() if dtype == "auto" else dtype
        if dtype == "float32":
            return self.model
        copy = self._copies.get(dtype)
        if copy is None:
            copy = self._copies[dtype] = in_precision(self.model, dtype)
        return copy

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from nbl_export.models.load import load_tokenizer

            self._tokenizer = load_tokenizer(self.source)
        return self._tokenizer

    @property
    def image_processor(self) -> Any:
        if self._processor is None:
            from nbl_export.models.load import load_image_processor

            self._processor = load_image_processor(self.source)
        return self._processor


class _Noting:
    """Passes everything on to a listener and keeps the notes, for the stage's record."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.notes: list[str] = []
        self.task = listener.task

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._listener.note(text)


@dataclass
class Run:
    """One invocation on one output folder: the workspace, the model, and who listens."""

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
        """Begin with a model: an existing output folder must be of the same one."""
        workspace = Workspace.create(out)
        workspace.set_model(source.as_json())
        return cls(workspace, LoadedModel(source, listener or Silent()), listener or Silent())

    @classmethod
    def resume(cls, out: Path, listener: Listener | None = None) -> Run:
        """Go on in an existing output folder with the model recorded there."""
        workspace = Workspace.open(out)
        info = workspace.model_info
        if info is None:
            raise InputError(f"{out} records no model: start with `nbl-export calibrate MODEL -o {out}`.")
        source = same_model(info)
        return cls(workspace, LoadedModel(source, listener or Silent()), listener or Silent())

    def stage(
        self, name: str, key: str, settings: dict[str, Any], work: Callable[[Listener], list[Path]]
    ) -> None:
        """Do ``work`` unless it is done; its files and notes are recorded when it succeeds."""
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
