"""The configuration of a model that Triton serves; tests/clients/test_triton.py reads it by Triton's own schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbl_export.engine.manifest import load_manifest, manifest_path, manifest_text
from nbl_export.errors import InputError
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import trace
from nbl_export.export.triton import (
    CONFIG,
    check_cache,
    serve_engine,
    triton_config,
    triton_names,
    write_configs,
)
from nbl_export.files import sha256_of_file
from nbl_export.graph.io import load_graph, save_graph
from tests.runtime.fake_tensorrt import manifest_of
from tests.tiny_types import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=2)


def test_the_cache_is_carried_and_the_rest_is_asked_for(model: Any) -> None:
    lines = triton_config(trace(model)).splitlines()
    assert lines[:2] == ['backend: "onnxruntime"', "max_batch_size: 1"]
    asked = [line.split('"')[1] for line in lines if line.startswith(("input", "output"))]
    assert asked == ["input_ids", "attention_mask", "position_ids", "logits"]
    states = [line for line in lines if "initial_state" in line]
    assert len(states) == 4
    assert 'input_name: "past_key_values.0.key" output_name: "present.0.key"' in states[0]
    assert "dims: [2, -1, 8] initial_state" in states[0] and "dims: [2, 0, 8] zero_data: true" in states[0]


def test_without_a_cache_rows_are_put_together(model: Any) -> None:
    found = triton_config(trace(model, FORMS["none"]))
    assert "max_batch_size: 8" in found and "dynamic_batching { }" in found and "state" not in found


def test_a_cache_of_fixed_length_is_refused(model: Any) -> None:
    with pytest.raises(
        InputError, match=r"Triton begins a cache without tokens.*export with --kv-cache concat"
    ):
        check_cache(trace(model, FORMS["static"]))
    check_cache(trace(model, FORMS["concat"]))


def packaged_engine(model: Any, folder: Path, **changes: Any) -> tuple[Path, Path]:
    graph, engine = folder / triton_names("linearized")[0], folder / "engine" / "model.engine"
    for path in (graph, engine):
        path.parent.mkdir(parents=True)
    save_graph(trace(model), graph)
    engine.write_bytes(b"an engine")
    manifest = manifest_of(graph, hashes={"engine": sha256_of_file(engine)}, size=9, **changes)
    manifest_path(engine).write_text(manifest_text(manifest))
    return graph, engine


def test_an_engine_is_a_model_of_its_own(model: Any, tmp_path: Path) -> None:
    graph, engine = packaged_engine(model, tmp_path)
    assert serve_engine(tmp_path, graph, engine) == "" and not [*engine.parent.iterdir()]
    root = tmp_path / "models" / "linearized_tensorrt"
    assert (root / "1" / "model.plan").read_bytes() == b"an engine"
    assert load_manifest(root / "1" / "model.plan").library == "tensorrt"
    own, other = (root / CONFIG).read_text(), triton_config(load_graph(graph))
    assert own.startswith(other.replace('"onnxruntime"', '"tensorrt"'))
    # Both profiles, of a prefill and of a step.
    assert own.endswith('instance_group { kind: KIND_GPU count: 1 profile: ["0", "1"] }\n')


def test_an_engine_that_triton_does_not_take_stays_where_it_is(model: Any, tmp_path: Path) -> None:
    graph, engine = packaged_engine(model, tmp_path, library="tensorrt-rtx")
    assert serve_engine(tmp_path, graph, engine).startswith(
        "is of tensorrt-rtx, and Triton's backend takes those of tensorrt"
    )
    assert engine.exists() and not (tmp_path / "models" / "linearized_tensorrt").exists()


def test_each_graph_of_the_repository_has_its_own(model: Any, tmp_path: Path) -> None:
    graphs = [tmp_path / triton_names(role)[0] for role in ("base", "linearized")]
    for path in graphs:
        path.parent.mkdir(parents=True)
        save_graph(trace(model), path)
    write_configs(graphs)
    for role in ("base", "linearized"):
        names = sorted(p.name for p in (tmp_path / "models" / role).iterdir())
        assert names == ["1", CONFIG]
