"""Where the graphs of a package lie, and what its reader is told: transformers.js and Triton.

tests/clients/test_triton.py reads the configuration by Triton's own schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.engine.manifest import load_manifest, manifest_path, manifest_text
from nbl_export.errors import InputError
from nbl_export.export.forms import FORMS
from nbl_export.export.layouts import CONFIG, LAYOUTS, triton_config
from nbl_export.export.torch import trace
from nbl_export.files import sha256_of_file
from nbl_export.graph.cache import kv_pairs
from nbl_export.graph.io import load_graph, save_graph
from tests.exporters import GRAPH, Graphs
from tests.runtime.fake_tensorrt import manifest_of
from tests.tiny_types import tiny_model

WEB, TRITON = LAYOUTS["web"], LAYOUTS["triton"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_graphs_lie_apart(layout: str) -> None:
    found = [LAYOUTS[layout].names(role, "fp16") for role in (LINEARIZED, BASE)]
    files = {f"{graph.rpartition('/')[0]}/{name}" for graph, data in found for name in (graph, data)}
    assert len({graph for graph, _ in found}) == 2 and len(files) == 4, "no two files are one"


def test_a_graph_for_the_web_is_named_by_its_precision() -> None:
    for precision, name in (("fp32", "model"), ("fp16", "model_fp16"), ("int4", "model_q4")):
        assert WEB.names(LINEARIZED, precision) == (f"onnx/{name}.onnx", f"{name}.onnx_data")
    with pytest.raises(InputError, match="runs no graph in bf16"):
        WEB.names(LINEARIZED, "bf16")


def test_each_head_of_the_cache_has_its_size(graphs: Graphs) -> None:
    """onnxruntime-genai's builder gives it a name, by which transformers.js makes heads of no size."""
    model = load_graph(graphs("genai-fp32", "llama-gqa") / GRAPH)
    values = [value for pair in kv_pairs(model) for value in (*pair.past, *pair.present)]
    assert {str(value.shape[3]) for value in values if value.shape} == {"kv_cache_dim"}
    WEB.change(model)
    assert {value.shape[1:4:2] for value in values if value.shape} == {(2, 16)}
    assert {str(value.shape[0]) for value in values if value.shape} == {"batch_size"}


@pytest.mark.parametrize("generates", [True, False])
def test_what_the_configurations_say(tmp_path: Path, generates: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    WEB.finish(tmp_path, [], "fp32", generates)  # an image encoder has no tokenizer
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "padding_side": "right"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    WEB.finish(tmp_path, [], "fp16", generates)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "llama",
        "hidden_size": 64,
        "transformers.js_config": {
            "dtype": "fp16",
            "use_external_data_format": {"model_fp16.onnx": 1, "base_fp16.onnx": 1},
            "kv_cache_dtype": {"fp16": "float16"},
        },
    }
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "bos_token": "<s>",
        "padding_side": "left" if generates else "right",
        "chat_template": "{{ messages }}",
    }


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=2)


def test_triton_carries_the_cache_and_asks_for_the_rest(model: Any) -> None:
    lines = triton_config(trace(model)).splitlines()
    assert lines[:2] == ['backend: "onnxruntime"', "max_batch_size: 1"]
    asked = [line.split('"')[1] for line in lines if line.startswith(("input", "output"))]
    assert asked == ["input_ids", "attention_mask", "position_ids", "logits"]
    states = [line for line in lines if "initial_state" in line]
    assert len(states) == 4
    assert 'input_name: "past_key_values.0.key" output_name: "present.0.key"' in states[0]
    assert "dims: [2, -1, 8] initial_state" in states[0] and "dims: [2, 0, 8] zero_data: true" in states[0]
    found = triton_config(trace(model, FORMS["none"]))
    assert "max_batch_size: 8" in found and "dynamic_batching { }" in found and "state" not in found
    with pytest.raises(InputError, match=r"begins a cache without tokens.*export with --kv-cache concat"):
        TRITON.change(trace(model, FORMS["static"]))


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_is_a_model_of_its_own(model: Any, tmp_path: Path, library: str) -> None:
    graph, engine = tmp_path / TRITON.names(LINEARIZED, "fp32")[0], tmp_path / "engine" / "model.engine"
    for path in (graph, engine):
        path.parent.mkdir(parents=True)
    save_graph(trace(model), graph)
    TRITON.finish(tmp_path, [graph], "fp32", True)
    other = (graph.parents[1] / CONFIG).read_text()
    assert other == triton_config(load_graph(graph))
    engine.write_bytes(b"an engine")
    manifest = manifest_of(graph, hashes={"engine": sha256_of_file(engine)}, size=9, library=library)
    manifest_path(engine).write_text(manifest_text(manifest))
    root = tmp_path / "models" / "linearized_tensorrt"
    why = TRITON.engine(tmp_path, graph, engine)
    if library == "tensorrt-rtx":
        assert why.startswith("is of tensorrt-rtx, and Triton's backend takes those of tensorrt")
        assert engine.exists() and not root.exists()
        return
    assert why == "" and not [*engine.parent.iterdir()]
    assert load_manifest(root / "1" / "model.plan").library == "tensorrt"
    own = (root / CONFIG).read_text()
    assert own.startswith(other.replace('"onnxruntime"', '"tensorrt"'))
    # Both profiles, of a prefill and of a step.
    assert own.endswith('instance_group { kind: KIND_GPU count: 1 profile: ["0", "1"] }\n')
