"""The layout of transformers.js: names by precision, and what the configurations say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbl_export.errors import InputError
from nbl_export.export.web import BASE, adapt_configs, size_cache, web_names
from nbl_export.graph.cache import kv_pairs
from nbl_export.graph.io import load_graph
from tests.exporters import GRAPH, Graphs


@pytest.mark.parametrize(
    ("precision", "name"),
    [("fp32", "model"), ("fp16", "model_fp16"), ("int8", "model_int8"), ("int4", "model_q4")],
)
def test_the_graph_is_named_by_its_precision(precision: str, name: str) -> None:
    assert web_names(precision) == (f"onnx/{name}.onnx", f"{name}.onnx_data")
    beside = name.replace("model", "base")
    assert web_names(precision, BASE) == (f"onnx/{beside}.onnx", f"{beside}.onnx_data")


def test_each_head_of_the_cache_has_its_size(graphs: Graphs) -> None:
    """onnxruntime-genai's builder gives it a name, by which transformers.js makes heads of no size."""
    model = load_graph(graphs("genai-fp32", "llama-gqa") / GRAPH)
    values = [value for pair in kv_pairs(model) for value in (*pair.past, *pair.present)]
    assert {str(value.shape[3]) for value in values if value.shape} == {"kv_cache_dim"}
    size_cache(model)
    assert {value.shape[1:4:2] for value in values if value.shape} == {(2, 16)}
    assert {str(value.shape[0]) for value in values if value.shape} == {"batch_size"}


def test_bfloat16_is_refused() -> None:
    with pytest.raises(InputError, match="runs no graph in bf16"):
        web_names("bf16")


def test_what_the_configurations_say(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "padding_side": "right"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    adapt_configs(tmp_path, "fp16", generates=True)
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
        "padding_side": "left",
        "chat_template": "{{ messages }}",
    }


def test_an_encoder_is_padded_as_before(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"padding_side": "right"}')
    adapt_configs(tmp_path, "fp32", generates=False)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"padding_side": "right"}


def test_an_image_encoder_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    adapt_configs(tmp_path, "fp32", generates=False)
    told = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]
    assert told == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1, "base.onnx": 1}}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
