"""Load a model with its tokenizer or image processor on first use, in a precision and on a device where it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import transformers

from nbl_export.batch import PIXELS
from nbl_export.errors import InputError, MissingDependencyError, NblError, first_line
from nbl_export.models.dummy_run import dummy_run, example_inputs
from nbl_export.models.folder import (
    PREPROCESSOR,
    Pooling,
    Task,
    find_pooling,
    has_vocabulary,
    task_named,
    weight_files,
)
from nbl_export.models.layers import backbone
from nbl_export.models.running import accepted_arguments, quiet
from nbl_export.models.source import ModelSource
from nbl_export.models.stored import load_stored, opened
from nbl_export.models.walk import one_of_each_kind
from nbl_export.models.weights import in_precision, streamed
from nbl_export.packages import missing
from nbl_export.progress import Listener, bytes_task
from nbl_export.ranks import place
from nbl_export.settings.definition import AUTO

CPU = "cpu"
_FASTEST = ("cuda", "xpu")


class LoadedModel:
    """A model and its tokenizer or image processor, loaded on first use and cached for the run.

    ``model`` is on the CPU, where graphs are traced; ``in_dtype`` computes on ``device``, the CPU unless a stage says
    another one.
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
        dtype = self.fast_dtype if dtype == "auto" else dtype
        kind = dtype, str(self.device)
        if kind == ("float32", "cpu"):
            return self.model
        if (copy := self._copies.get(kind)) is None:
            self._copies[kind] = copy = in_precision(self.model, dtype, self.device)
            if dtype != "float32" and kind not in self._ran:
                dummy_run(self.model)  # whose facts those of its copies are
                run: Any = backbone(copy)
                # Tables that a model keeps in float32 may meet states in bfloat16, which not every operator takes.
                with quiet(), torch.inference_mode(), one_of_each_kind(copy):
                    try:
                        run(**example_inputs(copy), **accepted_arguments(run, use_cache=False))
                    except NblError:
                        raise
                    except Exception as error:  # a model's own code may raise anything
                        raise InputError(
                            f"The code of {self.source.source} does not run in {dtype} ({first_line(error)[:200]}): "
                            "use --calibration-dtype float32."
                        ) from error
                self._ran.add(kind)
        return copy

    @cached_property
    def fast_dtype(self) -> str:
        """The fastest dtype of the device in which the model's code runs."""
        fast = fast_dtype(self.device)
        try:
            self.in_dtype(fast)
            return fast
        except InputError as error:
            self._listener.note(f"The model is run in float32. {error}")
            return "float32"

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source)

    @cached_property
    def image_processor(self) -> Any:
        return load_image_processor(self.source)


def load_model(source: ModelSource, done: Callable[[int], None] = lambda _bytes: None) -> torch.nn.Module:
    """The model in float32, its weights read when they are needed; arguments and errors are :func:`load_stored`'s."""
    stored = load_stored(source, done)
    exact = all(p.dtype == torch.float32 for p in stored.model.parameters() if p.is_floating_point())
    return stored.model if exact and not stored.read else streamed(stored, torch.float32)


def check_processor(source: ModelSource) -> None:
    """Refuse, before the model is read, one without the files of its tokenizer or image processor."""
    if source.reads != PIXELS:
        if not source.gguf_file and not has_vocabulary(Path(source.path)):
            load_tokenizer(source)  # some need no file
    elif not (Path(source.path) / PREPROCESSOR).is_file():
        raise InputError(
            f"{source.source} has no {PREPROCESSOR}, which says how its images are scaled: add the one that the "
            "model was trained with."
        )


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, or an :class:`InputError` with the reason why it cannot be loaded."""
    try:
        tokenizer = load_beside(source, "AutoTokenizer", "tokenizer")
    except InputError as error:
        if source.gguf_file or has_vocabulary(Path(source.path)):
            raise
        raise InputError(
            f"{source.source} has no tokenizer: put the tokenizer.json, or the tokenizer.model, of the model into "
            f"{source.path}."
        ) from error
    tokenizer.name_or_path = source.path
    return tokenizer


def load_image_processor(source: ModelSource) -> Any:
    """The model's image processor, or an error with the reason why it cannot be loaded."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise missing("pillow", "Reading images") from None
    check_processor(source)
    return load_beside(source, "AutoImageProcessor", "image processor")


def load_beside(source: ModelSource, auto: str, what: str) -> Any:
    """What the class ``auto`` of transformers loads from the model's folder; ``what`` it is, for the sentence."""
    with opened(source, f"No {what} can be loaded from") as (path, options):
        return getattr(transformers, auto).from_pretrained(path, **options)


# devices ------------------------------------------------------------------------------------------


def fast_dtype(device: torch.device | str = "cpu") -> str:
    """The dtype in which ``device`` runs a model fastest: bfloat16 if it multiplies that, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # torch 2.13 has a public function for this; earlier releases have only these.
        private = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        able = kind != "cpu" or any(getattr(torch.cpu, name, bool)() for name in private)
    return "bfloat16" if able else "float32"


def find_device(asked: str) -> torch.device:
    """The device that was ``asked`` for by a setting; ``auto`` is the first GPU that can be used, else the CPU.

    A model stays on the CPU, mapped, as its checkpoint stores it; the device gets a part of it at a time
    (:mod:`nbl_export.models.weights`). It must have float64, in which moments are summed. Raises
    :class:`MissingDependencyError` for a device that is not there or cannot be used.
    """
    if asked == AUTO:
        asked = next((name for name in _FASTEST if not hindrance(name)), CPU)
    name, _, number = asked.partition(":")
    if name == CPU:
        return torch.device(CPU)
    # Two devices are the same only with the same number. Of several processes on a machine, each has its own.
    found, own = _count(name), int(os.environ.get("LOCAL_RANK", 0)) if place().count > 1 else 0
    index = int(number) if number else own % max(1, found)
    if found and index >= found:
        there = f"{name}:0" if found == 1 else f"{name}:0 to {name}:{found - 1}"
        raise MissingDependencyError(f"--device {asked}: torch sees only {there} here: name one of these.")
    if why := hindrance(name, index):
        raise MissingDependencyError(f"--device {asked}: {why}: say --device cpu, or leave it out.")
    return torch.device(name, index)


def _count(name: str) -> int:
    module = getattr(torch, name)
    return int(module.device_count()) if module.is_available() else 0


def hindrance(name: str, index: int = 0) -> str:
    """Why the device called ``name``, as cuda, is not used here; nothing where it is.

    Moments are summed in float64, which is tried.
    """
    if not _count(name):
        if name == "cuda" and torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
            return f"this torch ({torch.__version__}) is a build without CUDA; install one with it from pytorch.org"
        return f"torch sees no {name} device here"
    try:
        one = torch.ones(2, 2, dtype=torch.float64, device=torch.device(name, index))
        return "" if float((one @ one).sum()) == 8 else "it computes wrongly"
    except (RuntimeError, TypeError) as error:
        # No float64, or a driver or a GPU that this torch is not built for.
        return f"it does not compute in float64 ({first_line(error)})"


def as_setting(device: torch.device | str) -> dict[str, str]:
    """What a ``device`` adds to whatever identifies measurements and unfinished work, which are of one kind of device.

    Nothing for the CPU, which is what everything is of that does not say.
    """
    kind = str(device).partition(":")[0]
    return {} if kind == CPU else {"device": kind}


def described(device: torch.device) -> str:
    """For a record: ``cpu``, or as ``cuda:0, NVIDIA H100``."""
    if device.type == CPU:
        return CPU
    return f"{device}, {torch.get_device_module(device).get_device_name(device)}"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, a GPU multiplies float32 as such.

    TF32, which cuDNN uses unless told otherwise, keeps 10 bits of the mantissa: what it loses is a hundred times what
    parity allows, and would be taken for a fault of the graph.
    """
    # A flag sets its parts, but cannot be read where somebody set a part by itself.
    cudnn: Any = torch.backends.cudnn
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0] == "tf32"
        cudnn.allow_tf32 = set(before[1:]) == {"tf32"}
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
