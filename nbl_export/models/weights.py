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
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch

from nbl_export.errors import InputError
from nbl_export.models.layers import backbone, block_stack
from nbl_export.ranks import on_this_machine

Read = Callable[[], torch.Tensor]
_KEPT = 2 << 30


@dataclass(frozen=True)
class Stored:
    """A model as its checkpoint stores it.

    ``read`` gives a weight by name, as stored, where it is not in ``model`` already: there it is on the meta device.
    With ``computed``, that is work, and not only a view of mapped bytes.
    """

    model: torch.nn.Module
    read: Mapping[str, Read] = field(default_factory=dict)
    source: str = ""
    computed: bool = False

    def is_plain(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
        """Whether ``model`` itself is the model in ``dtype`` on ``device``."""
        device = torch.device(device)
        return not self.read and all(t.dtype == dtype and t.device == device for _, t in floating(self.model))


@dataclass
class Weight:
    """One weight and the places that have it; tied weights have several.

    ``absent`` are what the places have while it is not read. The places do not keep the model alive, which has them.
    """

    places: list[tuple[weakref.ref[torch.nn.Module], str]]
    absent: list[torch.nn.Parameter]
    read: Read
    name: str
    shape: torch.Size
    bytes: int
    users: int = 0


class Streaming:
    """What a model made by :func:`streamed` reads, by its units."""

    def __init__(self, stored: Stored, dtype: torch.dtype, device: torch.device) -> None:
        self.stored, self.dtype, self.device = stored, dtype, device
        self.weights: dict[str, Weight] = {}
        self.units: dict[str, list[Weight]] = {}
        self.backbone = ""
        self.beside: set[str] = set()
        self._finite: set[str] = set()

    def every(self) -> list[Weight]:
        """All weights, also those of embeddings, which are looked up where they are stored."""
        return list({id(weight): weight for weight in self.weights.values()}.values())

    def acquire(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            if not weight.users:
                self.put(weight, self.value(weight))
            weight.users += 1

    def release(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            weight.users -= 1
            if not weight.users:
                self._set(weight, weight.absent)

    def value(self, weight: Weight) -> torch.Tensor:
        """The ``weight`` in the model's dtype, on its device."""
        # A parameter made in inference mode could not be used with gradients later.
        with torch.inference_mode(False):
            tensor = weight.read()
            # What is mapped was looked at when it was loaded. Rounding may make infinity of a large number.
            if self.stored.computed and weight.name not in self._finite:
                check_finite(self.stored.source, weight.name, tensor)
                self._finite.add(weight.name)
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(device=self.device, dtype=dtype)

    def put(self, weight: Weight, tensor: torch.Tensor) -> None:
        """Give the places of ``weight`` the ``tensor``."""
        with torch.inference_mode(False):
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
        self._set(weight, [parameter] * len(weight.places))

    def _set(self, weight: Weight, values: Iterable[torch.nn.Parameter]) -> None:
        for (place, name), value in zip(weight.places, values, strict=True):
            if (module := place()) is not None:
                module._parameters[name] = value


_STREAMED: weakref.WeakKeyDictionary[torch.nn.Module, Streaming] = weakref.WeakKeyDictionary()


def floating(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The weights of ``model`` with a floating dtype, by name; tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a floating ``tensor`` is NaN or infinite."""
    # By its extremes, of which a NaN is both: ten times as fast as looking at each value, and takes no memory.
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def check_finite(source: str, name: str, weight: torch.Tensor) -> None:
    """Raise :class:`InputError` for a weight that is NaN or infinite."""
    if not all_finite(weight):
        raise InputError(f"{source}: the weight {name} is NaN or infinite: download the model again.")


def reader(weight: torch.Tensor) -> Read:
    """What gives the ``weight`` that is in memory or mapped, also after the parameter has got another."""
    data = weight.data
    return lambda: data


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that ``model`` computes on."""
    streaming = _STREAMED.get(model)
    return streaming.device if streaming else next(model.parameters()).device


def weights_like(model: torch.nn.Module) -> torch.Tensor:
    """An empty tensor of the dtype and device that ``model`` computes in and on."""
    streaming = _STREAMED.get(model)
    dtype = streaming.dtype if streaming else next(model.parameters()).dtype
    return torch.empty(0, dtype=dtype, device=device_of(model))


def dtype_of(model: torch.nn.Module) -> str:
    """The name of the dtype that ``model`` computes in, as ``bfloat16``."""
    return str(weights_like(model).dtype).removeprefix("torch.")


def origin(model: torch.nn.Module) -> torch.nn.Module:
    """The model of which ``model`` is another precision; itself for an ordinary model."""
    streaming = _STREAMED.get(model)
    return streaming.stored.model if streaming else model


def stored_of(model: torch.nn.Module) -> Stored:
    """The checkpoint of ``model``; an ordinary model is one that is in memory."""
    streaming = _STREAMED.get(model)
    return streaming.stored if streaming else Stored(model)


def streamed(stored: Stored, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.nn.Module:
    """The model of ``stored`` in ``dtype`` on ``device``; its weights are read unit by unit.

    Buffers that are not part of a checkpoint (rotary frequencies) stay in their precision.
    """
    device = torch.device(device)
    weights = by_identity(stored.model)
    absent: dict[int, torch.nn.Parameter] = {}
    for key, (parameter, _) in weights.items():
        kept = dtype if parameter.is_floating_point() else parameter.dtype
        empty = torch.empty(parameter.shape, dtype=kept, device="meta")
        absent[key] = torch.nn.Parameter(empty, requires_grad=False)
    # The copy shares nothing with the original but what is in this table: the places of its weights.
    memo: dict[int, Any] = dict(absent)
    model: torch.nn.Module = copy.deepcopy(stored.model, memo)
    convert_buffers(model, dtype, device)
    streaming = Streaming(stored, dtype, device)
    _STREAMED[model] = _STREAMED[backbone(model)] = streaming
    for key, (parameter, names) in weights.items():
        places, without = [], []
        read = next((stored.read[n] for n in names if n in stored.read), reader(parameter))
        for name in names:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            places.append((weakref.ref(module), attribute))
            mapped = None if stored.computed else read
            without.append(_in_place(module, mapped, absent[key], device))
            module._parameters[attribute] = without[-1]
        size = absent[key].numel() * absent[key].element_size()
        weight = Weight(places, without, read, names[0], parameter.shape, size)
        streaming.weights |= dict.fromkeys(names, weight)
    _make_units(model, streaming)
    return model


def by_identity(model: torch.nn.Module) -> dict[int, tuple[torch.nn.Parameter, list[str]]]:
    """Each weight of ``model`` once, by ``id``, and all its names."""
    found: dict[int, tuple[torch.nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return found


def _in_place(
    module: torch.nn.Module, read: Read | None, absent: torch.nn.Parameter, device: torch.device
) -> torch.nn.Parameter:
    """What ``module`` has while the weight is not read: an embedding looks up rows of the stored table."""
    if read is None or type(module) is not torch.nn.Embedding or module.max_norm is not None:
        return absent
    table = read()
    if table.device != device:
        return absent
    module.register_forward_hook(partial(_rounded, dtype=absent.dtype))
    return torch.nn.Parameter(table, requires_grad=False)


def _rounded(_module: Any, _args: Any, output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows of a stored table as those of a table in ``dtype``."""
    return output.to(dtype)


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
    streaming.backbone = next(name for name, module in model.named_modules() if module is inner)
    taken: set[str] = set()
    children = [name for name, module in model.named_children() if streaming.backbone and module is not inner]
    streaming.beside = {*children, ""} if streaming.backbone else set()
    blocks: list[str] = []
    with suppress(InputError):  # its structure is not supported, which is said where it is asked for
        stack, modules = block_stack(model)
        blocks = [f"{stack}.{index}" for index in range(len(list(modules.children())))]
    for path in dict.fromkeys((*blocks, streaming.backbone, *children, "")):
        prefix = f"{path}." if path else ""
        own = [n for n in streaming.weights if n.startswith(prefix) and n not in taken]
        taken.update(own)
        # An embedding that is looked up in the stored table needs no weight of its own.
        absent = [streaming.weights[n] for n in own if model.get_parameter(n).is_meta]
        unit = list({id(weight): weight for weight in absent}.values())
        if unit:
            streaming.units[path] = unit
            _read_in_forward(model.get_submodule(path), streaming, unit)
            if path == streaming.backbone and path:  # some models run the parts of their backbone themselves
                _read_in_forward(model, streaming, unit)


def _read_in_forward(module: torch.nn.Module, streaming: Streaming, unit: list[Weight]) -> None:
    running: list[None] = []

    def before(*_: Any) -> None:
        streaming.acquire(unit)
        running.append(None)

    def after(*_: Any) -> None:
        # A hook that ends the run before the module does is called without the one before.
        if running:
            running.pop()
            streaming.release(unit)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


@contextmanager
def held(model: torch.nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the block, the weights of ``model`` with these ``names``, or under these modules, are in memory."""
    streaming = _STREAMED.get(model)
    wanted = tuple(names)
    found = {
        id(weight): weight
        for name, weight in (streaming.weights.items() if streaming else ())
        if any(name == w or name.startswith(f"{w}.") for w in wanted)
    }
    with acquired(streaming, found.values()):
        yield


@contextmanager
def outside_blocks(model: torch.nn.Module, head: bool = False) -> Iterator[None]:
    """Within the block, what the backbone of ``model`` has beside its blocks is in memory, such as its embedding.

    With ``head``, so is what lies beside the backbone.
    """
    streaming = _STREAMED.get(model)
    units = streaming.units.items() if streaming else ()
    paths = [
        path
        for path, _ in units
        if streaming and (path == streaming.backbone or (head and path in streaming.beside))
    ]
    with acquired(streaming, [weight for path, unit in units if path in paths for weight in unit]):
        yield


@contextmanager
def acquired(streaming: Streaming | None, weights: Iterable[Weight]) -> Iterator[None]:
    """Within the block, these ``weights`` are in memory."""
    if streaming is None:
        yield
        return
    found = list(weights)
    streaming.acquire(found)
    try:
        yield
    finally:
        streaming.release(found)


def streaming_of(model: torch.nn.Module) -> Streaming | None:
    """What ``model`` reads; None for one whose weights are in memory."""
    return _STREAMED.get(model)


def streams(model: torch.nn.Module) -> bool:
    """Whether a forward pass of ``model`` reads weights: those that do not stay in memory are read at every pass."""
    streaming = _STREAMED.get(model)
    units = streaming.units.values() if streaming else ()
    return any(not weight.users for unit in units for weight in unit)


def size(model: torch.nn.Module) -> int:
    """Bytes that all weights of ``model`` take in the dtype in which it computes."""
    streaming = _STREAMED.get(model)
    return (
        sum(one.bytes for one in streaming.every())
        if streaming
        else sum(p.nbytes for p in model.parameters())
    )


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


@contextmanager
def resident(model: torch.nn.Module, budget: float = float("inf")) -> Iterator[None]:
    """Within the block, all weights of ``model`` stay in memory, unless that takes more than ``budget`` bytes.

    A part of them would save little: a pass reads the others anyway.
    """
    streaming = _STREAMED.get(model)
    weights = streaming.every() if streaming else []
    fits = sum(weight.bytes for weight in weights if not weight.users) <= budget
    with acquired(streaming if fits else None, weights):
        yield
