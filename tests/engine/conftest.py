"""Graphs in every precision and form of the cache, and engines built from them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nbl_export.engine.manifest import Limits, Manifest, NetworkFacts, Profile
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import precision_of, to_precision
from nbl_export.linearize.plan import load_plan
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.workspace import Workspace
from tests.fixtures_graph import load, plan_by_hand
from tests.tiny import build


@dataclass(frozen=True)
class Graphs:
    """stories260K in one precision and form: all 5 layers, K = 2, and K = 5."""

    base: Path
    linearized: Path
    bare: Path
    static: bool


def converted(source: Path, target: Path, precision: str) -> Path:
    """The float32 graph at ``source`` in ``precision``; its tensors are small enough for float16."""
    target.parent.mkdir(parents=True, exist_ok=True)
    graph = load_graph(source)
    to_precision(graph, precision_of(precision), {})
    save_graph(graph, target)
    return target


@pytest.fixture(scope="session")
def graphs(
    stories_out: Path, static_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Graphs]:
    """Called with a precision and a form of the cache: the graphs, made at the first call; read only."""
    folder = tmp_path_factory.mktemp("graphs")
    plans = {"linearized": load_plan(Workspace.open(stories_out).plan)}
    plans["bare"] = plan_by_hand(stories_out, range(5))

    float32 = {
        form: out / "baseline" / "model.onnx"
        for form, out in (("concat", stories_out), ("static", static_out))
    }

    @cache
    def made(precision: str, form: str) -> Graphs:
        place = folder / f"{precision}-{form}"
        base = converted(float32[form], place / "base" / "model.onnx", precision)
        rewritten = {name: place / name / "model.onnx" for name in plans}
        for name, plan in plans.items():
            rewrite_file(base, plan, rewritten[name])
        return Graphs(base, static=form == "static", **rewritten)

    return made


@pytest.fixture(scope="session")
def fusible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 graph of one layer for which the library has fused attention: 4 heads of size 64."""
    folder = tmp_path_factory.mktemp("fusible")
    changes = {"num_hidden_layers": 1, "head_dim": 64, "num_key_value_heads": 1}
    model = load(build(folder / "model", **changes))
    save_graph(trace(model, FORMS["static"]), folder / "model.onnx")
    return folder / "model.onnx"


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
