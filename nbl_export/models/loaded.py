"""Load a model with its tokenizer or image processor on first use, in a precision in which its code runs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from nbl_export.errors import InputError, NblError, first_line
from nbl_export.models.folder import weight_files
from nbl_export.models.source import ModelSource
from nbl_export.models.tasks import Pooling, Task, find_pooling, task_named
from nbl_export.progress import Listener, bytes_task

if TYPE_CHECKING:
    import torch


class LoadedModel:
    """A model and its tokenizer or image processor, loaded on first use and cached for the run.

    ``model`` is on the CPU, where graphs are traced; ``in_dtype`` and ``in_float32`` compute on ``device``, the CPU
    unless a stage says another one.
    """

    def __init__(self, source: ModelSource, listener: Listener) -> None:
        self.source = source
        self._listener = listener
        self.device: torch.device | str = "cpu"
        # A copy lives only as long as it is used: later stages need the memory.
        self._copies: WeakValueDictionary[tuple[str, str], torch.nn.Module] = WeakValueDictionary()
        self._ran: set[tuple[str, str]] = set()

    @property
    def task(self) -> Task:
        return task_named(self.source.task)

    @property
    def pooling(self) -> Pooling | None:
        """The pooling of a text encoder; None if its folder does not define one."""
        return None if self.task.causal else find_pooling(Path(self.source.path))

    @cached_property
    def model(self) -> torch.nn.Module:
        from nbl_export.models.load import load_model

        # All weights are looked at when the model is loaded, but for those of a GGUF file.
        files = [] if self.source.gguf_file else weight_files(Path(self.source.path))
        size = sum(path.stat().st_size for path in files)
        with bytes_task(self._listener, f"Loading {Path(self.source.source).name}", size) as done:
            return load_model(self.source, done)

    @cached_property
    def tried(self) -> torch.nn.Module:
        """The model, once a short text has gone through it, from which its layers and its cache are known.

        Raises :class:`InputError` if it cannot be run, or if its layers are not known.
        """
        from nbl_export.models.dummy_run import dummy_run

        model = self.model
        with self._listener.task("Running a short text", 1, "text") as task:
            dummy_run(model)
            task.advance(1)
        return model

    def in_dtype(self, dtype: str) -> torch.nn.Module:
        """The model in ``dtype`` on the device, a copy unless that is float32 on the CPU.

        ``auto`` is the fastest dtype of the device in which the model's code runs. Raises :class:`InputError` if it
        does not run in the one that was asked for.
        """
        return self._copy(self.fast_dtype if dtype == "auto" else dtype)

    @cached_property
    def fast_dtype(self) -> str:
        """The fastest dtype of the device in which the model's code runs."""
        from nbl_export.models.load import fast_dtype

        fast = fast_dtype(self.device)
        try:
            self._copy(fast)
            return fast
        except InputError as error:
            self._listener.note(f"The model is run in float32. {error}")
            return "float32"

    def _copy(self, dtype: str) -> torch.nn.Module:
        from nbl_export.models.dummy_run import dummy_run
        from nbl_export.models.load import in_precision

        kind = dtype, str(self.device)
        if kind == ("float32", "cpu"):
            return self.model
        if (copy := self._copies.get(kind)) is None:
            self._copies[kind] = copy = in_precision(self.model, dtype, self.device)
            if dtype != "float32" and kind not in self._ran:
                dummy_run(self.model)  # whose facts those of its copies are
                if why := why_not_run(copy):
                    raise InputError(
                        f"The code of {self.source.source} does not run in {dtype} ({why}): use --calibration-dtype "
                        "float32."
                    )
                self._ran.add(kind)
        return copy

    @property
    def in_float32(self) -> torch.nn.Module:
        """The model in float32 on the device: what graphs are held against."""
        return self.in_dtype("float32")

    @cached_property
    def tokenizer(self) -> Any:
        from nbl_export.models.load import load_tokenizer

        return load_tokenizer(self.source)

    @cached_property
    def image_processor(self) -> Any:
        from nbl_export.models.load import load_image_processor

        return load_image_processor(self.source)


def why_not_run(model: torch.nn.Module) -> str | None:
    """What the code of ``model`` raises in its precision, in one line, tried with one block of each kind; None if it
    runs. Tables that a model keeps in float32 may meet states in bfloat16, which not every operator takes.
    """
    import torch

    from nbl_export.models.dummy_run import dummy_run, example_inputs
    from nbl_export.models.layers import backbone
    from nbl_export.models.libraries import accepted_arguments, quiet
    from nbl_export.models.walk import one_of_each_kind

    dummy_run(model)
    run: Any = backbone(model)
    with quiet(), torch.inference_mode(), one_of_each_kind(model):
        try:
            run(**example_inputs(model), **accepted_arguments(run, use_cache=False))
        except NblError:
            raise
        except Exception as error:  # a model's own code may raise anything
            return first_line(error)[:200]
    return None
