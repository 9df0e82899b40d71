"""A model whose weights are read when they are needed.

A checkpoint is not copied into memory. Its tensors are mapped from the safetensors files as they are stored, or
dequantized from a GGUF file one by one; a model in another dtype or on another device has *units* instead: each block,
and what lies outside the blocks. A unit is read when its forward pass begins and released when it ends, so that memory
holds one block, whatever the size of the model:

    stored (bf16, mapped) ──► unit in float32 ──► forward ──► released

:func:`held` keeps a part of the model while many batches go through it, :func:`resident` all of a small model. A model
whose weights are in memory is used in the same way: for it both do nothing.
"""

from __future__ import annotations

import copy
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from nbl_export.errors import InputError
from nbl_export.models.layers import backbone, block_stack
from nbl_export.ranks import on_this_machine

Read = Callable[[], torch.Tensor]
_KEPT = 2 << 30
# Bytes of a weight that is worth a stand-in. Exporters compare what is much smaller by its numbers.
_LARGE = 1 << 16


@dataclass(frozen=True)
class Stored:
    """A model as its checkpoint stores it.

    ``read`` gives a weight by its ``id``, as stored, where it is not in ``model`` already: there it has no bytes.
    With ``computed``, that is work, and not only a view of mapped bytes.
    """

    model: torch.nn.Module
    read: Mapping[int, Read] = field(default_factory=dict)
    source: str = ""
    computed: bool = False


@dataclass(eq=False)
class Weight:
    """One weight and the places that have it; tied weights have several.

    ``read`` gives it as it is stored. ``empty`` has its shape and dtype, ``places`` the modules, the names there, and
    what these have while it is not read: they do not keep the model alive, which has them. ``tensor`` is what they have
    else. ``unchecked`` is the model of a weight that nobody has looked at yet.
    """

    name: str
    read: Read
    empty: torch.nn.Parameter
    device: torch.device
    unchecked: str = ""
    places: list[tuple[weakref.ref[torch.nn.Module], str, torch.nn.Parameter]] = field(default_factory=list)
    tensor: torch.Tensor | None = None
    users: int = 0

    def value(self) -> torch.Tensor:
        """The weight in the model's dtype, on its device."""
        # A parameter made in inference mode could not be used with gradients later.
        with torch.inference_mode(False):
            tensor = self.read()
            # What is mapped was looked at when it was loaded. Rounding may make infinity of a large number.
            if self.unchecked:
                check_finite(self.unchecked, self.name, tensor)
                self.unchecked = ""
            return tensor.to(device=self.device, dtype=self.empty.dtype)

    @contextmanager
    def there(self, make: Read | None = None) -> Iterator[None]:
        """Within the block, the places have the weight, or what ``make`` gives."""
        if not self.users:
            self._put((make or self.value)())
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self._put(None)

    def _put(self, tensor: torch.Tensor | None) -> None:
        self.tensor = tensor
        with torch.inference_mode(False):
            parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
        for place, name, absent in self.places:
            if (module := place()) is not None:
                module._parameters[name] = absent if parameter is None else parameter


@dataclass(frozen=True)
class Streaming:
    """What a model computes in and on, and what it reads, by name and by units; an ordinary model reads nothing.

    ``body`` is what the backbone has beside its blocks, ``head`` what lies beside the backbone.
    """

    stored: Stored
    dtype: torch.dtype
    device: torch.device
    weights: dict[str, Weight] = field(default_factory=dict)
    units: list[list[Weight]] = field(default_factory=list)
    body: list[Weight] = field(default_factory=list)
    head: list[Weight] = field(default_factory=list)

    def every(self) -> list[Weight]:
        """All weights, also those of embeddings, which are looked up where they are stored."""
        return list(dict.fromkeys(self.weights.values()))


_STREAMED: weakref.WeakKeyDictionary[torch.nn.Module, Streaming] = weakref.WeakKeyDictionary()


def streaming_of(model: torch.nn.Module) -> Streaming:
    """What ``model`` reads: nothing, if its weights are in memory."""
    if (found := _STREAMED.get(model)) is not None:
        return found
    first = next(model.parameters())
    return Streaming(Stored(model), first.dtype, first.device)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a floating ``tensor`` is NaN or infinite."""
    # By its extremes, of which a NaN is both: ten times as fast as looking at each value, and takes no memory.
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def check_finite(source: str, name: str, weight: torch.Tensor) -> None:
    """Raise :class:`InputError` for a weight that is NaN or infinite."""
    if not all_finite(weight):
        raise InputError(f"{source}: the weight {name} is NaN or infinite: download the model again.")


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that ``model`` computes on."""
    return streaming_of(model).device


def weights_like(model: torch.nn.Module) -> torch.Tensor:
    """An empty tensor of the dtype and device that ``model`` computes in and on."""
    streaming = streaming_of(model)
    return torch.empty(0, dtype=streaming.dtype, device=streaming.device)


def dtype_of(model: torch.nn.Module) -> str:
    """The name of the dtype that ``model`` computes in, as ``bfloat16``."""
    return str(streaming_of(model).dtype).removeprefix("torch.")


def origin(model: torch.nn.Module) -> torch.nn.Module:
    """The model of which ``model`` is another precision; itself for an ordinary model."""
    return streaming_of(model).stored.model


def streamed(stored: Stored, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.nn.Module:
    """The model of ``stored`` in ``dtype`` on ``device``; its weights are read unit by unit.

    Buffers that are not part of a checkpoint (rotary frequencies) stay in their precision.
    """
    streaming = Streaming(stored, dtype, torch.device(device))
    found: dict[int, Weight] = {}
    for key, (parameter, names) in by_identity(stored.model).items():
        kept = dtype if parameter.is_floating_point() else parameter.dtype
        empty = torch.nn.Parameter(
            torch.empty_like(parameter, dtype=kept, device="meta"), requires_grad=False
        )
        read = stored.read.get(key) or parameter.data.detach
        unchecked = stored.source if stored.computed else ""
        found[key] = Weight(names[0], read, empty, streaming.device, unchecked)
        streaming.weights.update(dict.fromkeys(names, found[key]))
    # The copy shares nothing with the original but what is in this table: the places of its weights.
    memo: dict[int, Any] = {key: weight.empty for key, weight in found.items()}
    model: torch.nn.Module = copy.deepcopy(stored.model, memo)
    convert_buffers(model, dtype, streaming.device)
    _STREAMED[model] = _STREAMED[backbone(model)] = streaming
    for name, weight in streaming.weights.items():
        owner, _, attribute = name.rpartition(".")
        module, absent = model.get_submodule(owner), weight.empty
        # An embedding looks up rows of the stored table.
        if type(module) is torch.nn.Embedding and module.max_norm is None and not stored.computed:
            table = weight.read()
            if table.device == streaming.device:
                module.register_forward_hook(lambda _module, _args, rows: rows.to(dtype))
                absent = torch.nn.Parameter(table, requires_grad=False)
        weight.places.append((weakref.ref(module), attribute, absent))
        module._parameters[attribute] = absent
    _make_units(model, streaming)
    return model


def in_precision(
    model: torch.nn.Module, dtype: str, device: torch.device | str | None = None
) -> torch.nn.Module:
    """Another ``model`` in ``dtype`` (float16 …) on ``device``, by default its own, as transformers would load it."""
    streaming = streaming_of(model)
    return streamed(streaming.stored, getattr(torch, dtype), streaming.device if device is None else device)


def in_memory(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """``model`` with all its weights on ``device``, for passes that are timed: nothing is read in one."""
    streaming = streaming_of(model)
    if streaming.stored.model is model:
        return model.to(device)
    memo: dict[int, Any] = {
        key: torch.nn.Parameter(streaming.weights[names[0]].value().to(device), requires_grad=False)
        for key, (_, names) in by_identity(streaming.stored.model).items()
    }
    made: torch.nn.Module = copy.deepcopy(streaming.stored.model, memo)
    convert_buffers(made, streaming.dtype, torch.device(device))
    return made


def by_identity(model: torch.nn.Module) -> dict[int, tuple[torch.nn.Parameter, list[str]]]:
    """Each weight of ``model`` once, by ``id``, and all its names."""
    found: dict[int, tuple[torch.nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return found


def convert_buffers(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Buffers of the checkpoint in ``dtype``, all on ``device``; those of the code keep their precision."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                own = buffer.is_floating_point() and name not in module._non_persistent_buffers_set
                module._buffers[name] = buffer.to(device=device, dtype=dtype if own else buffer.dtype)


def _make_units(model: torch.nn.Module, streaming: Streaming) -> None:
    """Each block is a unit, and what the backbone has beside them, and each module beside the backbone, as the head."""
    inner = backbone(model)
    body = next(name for name, module in model.named_modules() if module is inner)
    children = [name for name, module in model.named_children() if body and module is not inner]
    taken: set[str] = set()
    blocks: list[str] = []
    with suppress(InputError):  # its structure is not supported, which is said where it is asked for
        stack, modules = block_stack(model)
        blocks = [f"{stack}.{index}" for index in range(len(list(modules.children())))]
    for path in dict.fromkeys((*blocks, body, *children, "")):
        prefix = f"{path}." if path else ""
        own = [n for n in streaming.weights if n.startswith(prefix) and n not in taken]
        taken.update(own)
        # An embedding that is looked up in the stored table needs no weight of its own.
        unit = list(dict.fromkeys(streaming.weights[n] for n in own if model.get_parameter(n).is_meta))
        streaming.units.append(unit)
        _read_in_forward(model.get_submodule(path), unit)
        if path == body:
            streaming.body.extend(unit)
            if path:  # some models run the parts of their backbone themselves
                _read_in_forward(model, unit)
        elif path not in blocks:
            streaming.head.extend(unit)


def _read_in_forward(module: torch.nn.Module, unit: list[Weight]) -> None:
    running: list[ExitStack] = []

    def before(*_: Any) -> None:
        running.append(ExitStack())
        running[-1].enter_context(acquired(unit))

    def after(*_: Any) -> None:
        # A hook that ends the run before the module does is called without the one before.
        if running:
            running.pop().close()

    if unit:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)


@contextmanager
def acquired(weights: Iterable[Weight]) -> Iterator[None]:
    """Within the block, these ``weights`` are in memory."""
    with ExitStack() as within:
        for weight in weights:
            within.enter_context(weight.there())
        yield


def held(model: torch.nn.Module, names: Iterable[str]) -> AbstractContextManager[None]:
    """Within the block, the weights of ``model`` with these ``names``, or under these modules, are in memory."""
    wanted, weights = tuple(names), streaming_of(model).weights
    return acquired(
        {weight for n, weight in weights.items() if any(n == w or n.startswith(f"{w}.") for w in wanted)}
    )


def outside_blocks(model: torch.nn.Module, head: bool = False) -> AbstractContextManager[None]:
    """Within the block, what the backbone of ``model`` has beside its blocks is in memory, such as its embedding.

    With ``head``, so is what lies beside the backbone.
    """
    streaming = streaming_of(model)
    return acquired([*streaming.body, *(streaming.head if head else ())])


def streams(model: torch.nn.Module) -> bool:
    """Whether a forward pass of ``model`` reads weights: those that do not stay in memory are read at every pass."""
    return any(not weight.users for unit in streaming_of(model).units for weight in unit)


def size(model: torch.nn.Module) -> int:
    """Bytes that all weights of ``model`` take in the dtype in which it computes."""
    read = sum(weight.empty.nbytes for weight in streaming_of(model).every())
    return read or sum(p.nbytes for p in model.parameters())


def room(model: torch.nn.Module | None = None) -> float:
    """Bytes that weights of ``model`` may take where they are used many times: :func:`half_free`.

    On the CPU, which has much else to keep, 2 GiB at most.
    """
    half = half_free(model)
    return min(_KEPT, half) if model is None or device_of(model).type == "cpu" else half


def half_free(model: torch.nn.Module | None = None) -> float:
    """Half of the bytes of memory that are free on the device of ``model``, shared by the processes of this run."""
    device = torch.device("cpu") if model is None else device_of(model)
    if device.type == "cpu":
        return psutil.virtual_memory().available / 2 / on_this_machine()
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return float(free / 2)


def resident(model: torch.nn.Module, budget: float = float("inf")) -> AbstractContextManager[None]:
    """Within the block, all weights of ``model`` stay in memory, unless that takes more than ``budget`` bytes.

    A part of them would save little: a pass reads the others anyway.
    """
    weights = streaming_of(model).every()
    fits = sum(weight.empty.nbytes for weight in weights if not weight.users) <= budget
    return acquired(weights if fits else ())


@contextmanager
def standing_in(model: torch.nn.Module) -> Iterator[list[Weight]]:
    """Within the block, the weights of ``model`` are there for whatever does not look at their numbers: a trace of it.

    Matrices are tensors over a file without content, which takes neither memory nor disk: the value has these weights.
    What is small is real, and an ordinary model is not changed.
    """
    weights = streaming_of(model).every()
    large = [w for w in weights if w.empty.nbytes >= _LARGE and w.empty.ndim > 1 and not w.users]
    with ExitStack() as within:
        folder = Path(within.enter_context(tempfile.TemporaryDirectory(prefix="nbl-export.")))
        within.enter_context(acquired(weight for weight in weights if weight not in large))
        for number, weight in enumerate(large):
            within.enter_context(weight.there(partial(_without_bytes, weight.empty, folder / str(number))))
        yield large


def _without_bytes(like: torch.Tensor, path: Path) -> torch.Tensor:
    with path.open("wb") as file:
        file.truncate(like.nbytes)
    return torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
