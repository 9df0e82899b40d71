"""Fixtures that find once what the tests of a process share: graphs of equal models, and the machine's rates."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache

import onnx
import onnx_ir as ir
import pytest
import torch

from nbl_export.export import checks
from nbl_export.export import torch as exporting
from nbl_export.export.forms import CONCAT, FORMS, Form
from nbl_export.models.weights import resident
from nbl_export.progress import Listener, Silent
from nbl_export.stages import bench, calibrate, export, select
from nbl_export.verify.speed import ceiling

# Here it is tested what a trace gives, how long it takes, or what it needs.
_TRACED = ("export/", "gpu/", "models/", "scripts/", "test_families.py", "end_to_end/test_virtual_device.py")
_MOST = 4_000_000  # parameters: those of larger models take long to compare
_MODULES = {form.module for form in FORMS.values()}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _key(model: torch.nn.Module, form: Form) -> str | None:
    """A digest of what the graph of ``model`` in this ``form`` depends on; None where that cannot be said."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removeprefix("tests/")
    modules = list(model.named_modules())
    changed = any("forward" in vars(m) or any(vars(m).get(h) for h in _HOOKS) for _, m in modules)
    of_ours = form.module in _MODULES and not form.examples and hasattr(model, "config")
    if test.startswith(_TRACED) or changed or not of_ours:
        return None
    if sum(p.numel() for p in model.parameters()) > _MOST:
        return None
    told = [
        form.name,
        form.opset,
        form.fused,
        repr(form.inputs),
        repr(form.outputs),
        form.module.__qualname__,
    ]
    told += [
        json.dumps(model.config.to_dict(), sort_keys=True, default=repr),
        repr(torch.get_default_dtype()),
    ]
    told += [model.config._attn_implementation, *((n, type(m).__qualname__) for n, m in modules)]
    digest = hashlib.sha256(repr(told).encode())
    with resident(model):
        first: dict[int, str] = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            tied = first.setdefault(tensor.data_ptr(), name)  # tied weights are one in a graph
            digest.update(repr((name, tied, tensor.dtype, tensor.shape)).encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@pytest.fixture(scope="session", autouse=True)
def graphs_are_traced_once() -> Iterator[None]:
    graphs: dict[str, bytes] = {}
    checked: set[str] = set()
    real_trace, real_check = exporting.trace, exporting.check_traces

    def trace(model: torch.nn.Module, form: Form = CONCAT, listener: Listener | None = None) -> ir.Model:
        key = _key(model, form)
        if key is None:
            return real_trace(model, form, listener)
        if key not in graphs:
            graphs[key] = ir.to_proto(real_trace(model, form, listener)).SerializeToString()
        else:
            with (listener or Silent()).task("Exporting ONNX", 3, "steps") as task:
                task.advance(3)
        return ir.from_proto(onnx.ModelProto.FromString(graphs[key]))

    def check_traces(model: torch.nn.Module, form: Form) -> None:
        key = _key(model, form)
        if key is None or key not in checked:
            real_check(model, form)
            checked.update({key} - {None})  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        for module in (exporting, checks, export):
            patch.setattr(module, "trace", trace)
        for module in (exporting, checks, calibrate):
            patch.setattr(module, "check_traces", check_traces)
        yield


@pytest.fixture(scope="session", autouse=True)
def rates_are_measured_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        once = cache(ceiling.measure_roofline)
        for module in (ceiling, select, bench):
            patch.setattr(module, "measure_roofline", once)
        yield
