"""A device that does not exist: its tensors lie in memory, but meet no tensor of the CPU, like those of a GPU.

torch's own way for a backend in Python is used: every operator computes what its tensors have in memory, and refuses
tensors of both devices. What torch allows on a GPU is allowed here: copies from one to the other, numbers (tensors
without dimensions) and indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import set_checkpoint_early_stop

NAME = "virtual"
# By these one device's numbers get to the other; an index may come from the CPU.
_BETWEEN = {"aten::copy_", "aten::index.Tensor"}


class Mixed(RuntimeError):
    """Tensors of two devices were given to one operator."""


class VirtualTensor(torch.Tensor):
    """A tensor of the virtual device; its storage, which its copies share, holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(raw: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
            VirtualTensor, raw.shape, raw.stride(), dtype=raw.dtype, device=torch.device(NAME, 0)
        )
        made.untyped_storage().raw = raw  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = tensor.untyped_storage().raw
    # torch itself gives a tensor another shape in place, as unsqueeze_ does.
    return found if found.numel() != tensor.numel() else found.view(tensor.shape)


class _Module(backend_registration._DummyBackendModule):
    active = False

    def is_available(self) -> bool:
        return self.active

    def device_count(self) -> int:
        return int(self.active)

    def mem_get_info(self, _device: Any = None) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_device_name(self, _device: Any = None) -> str:
        return "a device that does not exist"


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _MODULE.active


_MODULE = _Module()
_LIBRARY: list[torch.library.Library] = []


def _is_virtual(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """``op`` in memory, with what it gives on the virtual device if it was given that."""
    flat, spec = tree_flatten((args, kwargs))
    name = op._schema.name + (f".{op._schema.overload_name}" if op._schema.overload_name else "")
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    strangers = [t for t in tensors if not _is_virtual(t) and t.dim()]
    if strangers and name not in _BETWEEN:
        raise Mixed(f"{name} was given tensors on {NAME} and on {strangers[0].device}")
    if any(isinstance(v, torch.Generator) for v in flat):
        raise Mixed(f"{name} on {NAME} was given a generator of the CPU")
    given = [_raw(v) if _is_virtual(v) else v for v in flat]
    own = {id(raw): v for raw, v in zip(given, flat, strict=True) if isinstance(v, torch.Tensor)}
    # An operator that is told a device makes its tensor there.
    told = next((v for v in flat if isinstance(v, torch.device)), None)
    here = told is not None and told.type != NAME
    cpu = [torch.device("cpu") if isinstance(v, torch.device) else v for v in given]
    in_args, in_kwargs = tree_unflatten(cpu, spec)
    found = op(*in_args, **in_kwargs)
    for raw, v in zip(given, flat, strict=True):
        if _is_virtual(v) and v.shape != raw.shape:  # an output that was resized
            with torch._C._DisableTorchDispatch():
                v.data = VirtualTensor.of(raw)
    # In inference mode a view of an ordinary tensor is an ordinary one.
    views = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
    ordinary = views and not any(t.is_inference() for t in tensors)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or here or id(value) in own:
            return value if here else own.get(id(value), value)
        with torch.inference_mode(False) if ordinary else nullcontext():
            return VirtualTensor.of(value)

    return tree_map(wrapped, found)


def _register() -> None:
    if _LIBRARY:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, _MODULE, _Hook())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    _LIBRARY.append(library)


class _Made(TorchFunctionMode):
    """``torch.tensor`` makes its tensor on the CPU: it does not ask the tensors of a backend in Python."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = dict(kwargs or {})
        device = more.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return func(*args, **{**more, "device": "cpu"}).to(device)
        return func(*args, **more)


@contextmanager
def virtual_device() -> Iterator[torch.device]:
    """Within the block, this machine has the virtual device."""
    _register()
    _MODULE.active = True
    try:
        # A backend in Python bears no exception in a backward pass, such as ends a block that is computed again.
        with _Made(), set_checkpoint_early_stop(False):
            yield torch.device(NAME, 0)
    finally:
        _MODULE.active = False
