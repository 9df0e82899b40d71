"""Graphs in every form and precision, TensorRT for RTX, which builds without a GPU, and engines, made once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from nbl_export import api
from nbl_export.batch import MAX
from nbl_export.engine.library import Library, import_library
from nbl_export.engine.manifest import (
    Limits,
    Manifest,
    NetworkFacts,
    NetworkTensor,
    Profile,
    manifest_path,
    profiles,
)
from nbl_export.engine.manifest import save_manifest as save_at
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import save_in_precision, trace
from nbl_export.graph.cache import is_static, kv_layers
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import graph_precision, precision_of
from nbl_export.rewrite.replace import rewrite_file
from tests.fixtures_graph import plan_by_hand, ragged_rows

LIMITS = Limits(max_batch=3, max_seq=9, max_context=16)
_DTYPES = {"FLOAT16": "HALF", "BFLOAT16": "BF16"}


class Graphs:
    """Decoder graphs of stories260K in every form and precision, each made when first asked for."""

    def __init__(self, model: torch.nn.Module, out: Path, folder: Path) -> None:
        self.model, self.out, self.folder = model, out, folder

    def __call__(self, form: str, precision: str = "fp32", layers: Sequence[int] = ()) -> Path:
        """The graph without the attention of ``layers``; read only."""
        name = "-".join([form, precision, *map(str, layers)])
        path = self.folder / name / "model.onnx"
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        if layers:
            rewrite_file(self(form, precision), plan_by_hand(self.out, layers), path)
        elif precision != "fp32":
            rows = ragged_rows((24, 17), 500, seed=1)
            save_in_precision(load_graph(self(form)), path, precision_of(precision), rows)
        elif form == "concat":
            return self.out / "baseline" / "model.onnx"
        else:
            save_graph(trace(self.model, FORMS[form]), path)
        return path


@pytest.fixture(scope="session")
def engine_graphs(stories_model: Any, stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(stories_model, stories_out, tmp_path_factory.mktemp("engine-graphs"))


@pytest.fixture(scope="session")
def rtx() -> Library:
    """The real library, which builds ahead of time without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'nbl-export[rtx]'")
    return import_library("tensorrt-rtx")


@pytest.fixture(scope="session")
def built_out(rtx: Library, stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run in float16 with a static cache, and its engines; copy it before changing it."""
    out = tmp_path_factory.mktemp("built") / "out"
    shutil.copytree(stories_out, out, copy_function=shutil.copy2)
    api.export(out, api.ExportSettings("fp16", "static"))
    api.rewrite(out)
    api.build(out, api.EngineSettings("rtx", max_batch=2, max_seq=64, max_context=256, sm=("89", "86")))
    return out


@pytest.fixture
def built_copy(built_out: Path, tmp_path: Path) -> Path:
    """A copy of the run with engines, to be changed or damaged."""
    return Path(shutil.copytree(built_out, tmp_path / "out", copy_function=shutil.copy2))


def save_manifest(engine: Path, manifest: Manifest) -> Path:
    """Write the manifest of an existing ``engine``."""
    save_at(manifest_path(engine), manifest)
    return manifest_path(engine)


def manifest_by_hand(**changes: Any) -> Manifest:
    """A manifest of no real engine."""
    fields: dict[str, Any] = {
        "role": "linearized",
        "library": "tensorrt-rtx",
        "library_version": "1.7.1.116",
        "ahead_of_time": True,
        "capabilities": ("SM86", "SM89"),
        "gpu": None,
        "precision": "fp16",
        "kv_cache": "static",
        "limits": Limits(max_batch=2, max_seq=64, max_context=256),
        "profiles": (Profile("prefill", {"input_ids": ((1, 1), (1, 64), (2, 64))}),),
        "kv_layers": (0, 1, 4),
        "linear_layers": (2, 3),
        "attention": "fused",
        "network": NetworkFacts(7, 3, 6, (), (), {}),
        "hashes": {"engine": "0" * 64, "onnx": "1" * 64},
        "build_seconds": 1.25,
        "size": 1000,
        "created_by": "nbl-export, by hand",
    }
    return Manifest(**{**fields, **changes})


def manifest_of(path: Path, limits: Limits = LIMITS, role: str = "linearized", **changes: Any) -> Manifest:
    """The manifest that an engine of the graph at ``path`` for one GPU would have."""
    model = load_graph(path)
    given = [value for value in model.graph.inputs if value.const_value is None]

    def dims(value: ir.Value) -> list[int | str]:
        return [d if isinstance(d, int) else str(d.value) for d in value.shape or ()]

    def tensors(values: Sequence[ir.Value]) -> tuple[NetworkTensor, ...]:
        known = {MAX: limits.max_context}
        shapes = [tuple(d if isinstance(d, int) else known.get(d, -1) for d in dims(v)) for v in values]
        dtypes = [_DTYPES.get(v.dtype.name, v.dtype.name) for v in values if v.dtype]
        return tuple(map(NetworkTensor, [str(v.name) for v in values], dtypes, shapes))

    layers = kv_layers(model)
    fields: dict[str, Any] = {
        "role": role,
        "library": "tensorrt",
        "library_version": "10.16.0",
        "ahead_of_time": False,
        "capabilities": ("SM89",),
        "gpu": "NVIDIA L4",
        "precision": graph_precision(model).name,
        "kv_cache": "static" if is_static(model) else "concat",
        "limits": limits,
        "profiles": profiles({str(v.name): dims(v) for v in given}, limits),
        "kv_layers": layers,
        "linear_layers": (),
        "attention": "fused" if layers else "none",
        "network": NetworkFacts(
            len(layers), len(layers), 0, tensors(given), tensors(model.graph.outputs), {}
        ),
    }
    return manifest_by_hand(**{**fields, **changes})
