"""Equal models are traced once in a run: a test that needs a graph, not a trace, gets the one that is there.

Many tests start from a graph of one of two models, and ``torch.export`` takes 5 to 15 seconds for each. Graphs lie in a
folder of the run, which its processes share. One is taken if all that it depends on is the same:

1. the weights, bit for bit, the configuration, and the class and attributes of every module,
2. the form, with all its data and what the function that makes its module has from where it was made; a form that a
   test made itself is traced,
3. the code of nbl_export and the versions of what it uses. While a test has anything replaced that the exporter could
   use (``tests/replaced.py``), or a module has a hook or a forward of its own, all is traced.

The exporter's own tests, those below :data:`TRACED`, always trace. So do the processes that tests start, but for the
commands of ``tests/preloaded.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from nbl_export.export import torch as exporting
from nbl_export.export.forms import CONCAT, Form
from nbl_export.models.weights import resident
from nbl_export.progress import Listener, Silent
from tests.kept import kept_in
from tests.replaced import replaced_for

# Here it is tested what a trace gives, how long it takes, or what it needs.
TRACED = ("export/", "gpu/", "models/", "scripts/", "test_families.py", "end_to_end/test_virtual_device.py")
_EXPORTER = "nbl_export.export"
_UNUSED = ("onnxruntime", "psutil")  # by what traces: which opset is asked for is in the form
_MOST = 4_000_000  # parameters: those of larger models take long to compare
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
_PLAIN = (bool, int, float, str, tuple, list, dict, torch.dtype, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE = vars(torch.nn.Module()).keys() - {"training"}


def install() -> None:
    """Replace what traces, before any module imports it by its name; without a folder nothing is kept."""
    exporting.trace, exporting.check_traces = trace, check_traces


def key_of(model: torch.nn.Module, form: Form) -> str | None:
    """A digest of all that the graph of ``model`` in this ``form`` depends on; None if that cannot be said."""
    config = getattr(model, "config", None)
    if (
        config is None
        or replaced_for(_EXPORTER, _UNUSED)
        or sum(p.numel() for p in model.parameters()) > _MOST
    ):
        return None
    try:
        told: list[object] = [_code(), _data(form), torch.get_default_dtype(), config._attn_implementation]
    except _UnsaidError:
        return None
    told.append(json.dumps(config.to_dict(), sort_keys=True, default=repr))
    for name, module in model.named_modules():
        own = vars(module)
        if "forward" in own or any(own.get(hooks) for hooks in _HOOKS):
            return None
        told.append(
            (name, _said(type(module)), sorted((k, _said(own[k])) for k in own.keys() - _OF_EVERY_MODULE))
        )
    digest = hashlib.sha256(repr(told).encode())
    with resident(model):
        first: dict[int, str] = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if tensor.device.type != "cpu":
                    return None
                tied = first.setdefault(tensor.data_ptr(), name)  # tied weights are one in a graph
                digest.update(repr((name, tied, tensor.dtype, tensor.shape, tensor.stride())).encode())
                digest.update(_bytes(tensor))
    return digest.hexdigest()


class _UnsaidError(Exception):
    """That something is the same cannot be said."""


def _data(value: Any) -> object:
    """What of ``value`` decides: its contents, and of a class or function, whose code is ours, what it holds on to."""
    if isinstance(value, type | FunctionType):
        if not value.__module__.startswith("nbl_export."):
            raise _UnsaidError
        held = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        return (_said(value), [_data(one) for one in held])
    if isinstance(value, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        return (tensor.dtype, tensor.shape, hashlib.sha256(_bytes(tensor)).hexdigest())
    if isinstance(value, Mapping):
        return [(key, _data(one)) for key, one in value.items()]
    if isinstance(value, tuple | list):
        return (type(value).__name__, [_data(one) for one in value])
    if is_dataclass(value):
        return (_said(type(value)), [(f.name, _data(getattr(value, f.name))) for f in fields(value)])
    if isinstance(value, _PLAIN):
        return repr(value)
    raise _UnsaidError


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _said(value: Any) -> str:
    if isinstance(value, type | FunctionType | MethodType):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if isinstance(value, _PLAIN) else _said(type(value))


@cache
def _code() -> str:
    source = sorted((Path(exporting.__file__).parent.parent).rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in source))
    return digest.hexdigest() + repr([version(name) for name in _PACKAGES])


def _kept(model: torch.nn.Module, form: Form, suffix: str) -> Path | None:
    """Where the result lies, or will; None if it is not kept."""
    folder = kept_in(but=TRACED)
    if folder is None:
        return None
    key = key_of(model, form)
    return None if key is None else folder / f"{key}{suffix}"


_trace, _check_traces = exporting.trace, exporting.check_traces


def trace(model: torch.nn.Module, form: Form = CONCAT, listener: Listener | None = None) -> ir.Model:
    """As :func:`nbl_export.export.torch.trace`."""
    path = _kept(model, form, ".onnx")
    if path is not None and path.exists():
        with (listener or Silent()).task("Exporting ONNX", 3, "steps") as task:
            task.advance(3)
        return ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
    graph = _trace(model, form, listener)
    if path is not None:
        _write(path, ir.to_proto(graph).SerializeToString())
    return graph


def check_traces(model: torch.nn.Module, form: Form) -> None:
    """As :func:`nbl_export.export.torch.check_traces`."""
    path = _kept(model, form, ".checked")
    if path is not None and path.exists():
        return
    _check_traces(model, form)
    if path is not None:
        _write(path, b"")


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
