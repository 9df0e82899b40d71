"""The files beside a graph: which belong to it, and what they are told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nbl_export.errors import InputError
from nbl_export.export.sidecars import copy_sidecars, graph_in, sidecars_of, updated_configs


def write(folder: Path, name: str, content: object = "") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_configurations_are_told_and_the_rest_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    decoder = {"num_hidden_layers": 4, "filename": "model.onnx"}
    files = [
        write(source, "genai_config.json", {"model": {"decoder": decoder, "type": "llama"}, "search": {}}),
        write(source, "config.json", {"num_hidden_layers": 4}),
        write(source, "tokenizer.json", '{"as": "it is"}  '),
    ]
    written = copy_sidecars(updated_configs(files, linear=[1, 2], cached=[0, 3]), target)
    assert [p.name for p in written] == [p.name for p in files]
    genai, config, tokenizer = (json.loads(p.read_text()) for p in written)
    assert genai["model"]["decoder"] == {"num_hidden_layers": 2, "filename": "model.onnx"}
    assert config == {
        "num_hidden_layers": 4,
        "nbl_export": {"linearized_layers": [1, 2], "kv_layers": [0, 3]},
    }
    assert written[2].read_bytes() == files[2].read_bytes() and tokenizer == {"as": "it is"}


def test_sliding_layers_are_named_by_their_new_number(tmp_path: Path) -> None:
    window = {"window_size": 8, "layers": [0, 2, 4]}
    source = write(
        tmp_path,
        "genai_config.json",
        {"model": {"decoder": {"sliding_window": window, "num_hidden_layers": 6}}},
    )
    copy_sidecars(updated_configs([source], linear=[1, 2], cached=[0, 3, 4, 5]), tmp_path)  # in place
    found = json.loads(source.read_text())["model"]["decoder"]
    assert found == {"sliding_window": {"window_size": 8, "layers": [0, 2]}, "num_hidden_layers": 4}


def test_infinity_stays_in_a_models_configuration(tmp_path: Path) -> None:
    source = write(tmp_path, "config.json", '{"time_step_limit": [0.0, Infinity]}')
    sidecars = updated_configs([source], linear=[1], cached=[0])
    (tmp_path / "new").mkdir()
    (written,) = copy_sidecars(sidecars, tmp_path / "new")
    assert json.loads(written.read_text())["time_step_limit"] == [0.0, math.inf]


INFINITE = '{"model": {"decoder": {"num_hidden_layers": 4, "num_attention_heads": 1e999}}}'


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}', INFINITE])
def test_a_broken_configuration_is_an_input_error(tmp_path: Path, content: str) -> None:
    source = write(tmp_path, "genai_config.json", content)
    with pytest.raises(InputError, match=r"genai_config\.json") as caught:
        updated_configs([source], [0], [1])
    assert "\n" not in str(caught.value)


def test_weights_and_other_graphs_do_not_belong_to_it(tmp_path: Path) -> None:
    graph, data = write(tmp_path, "model.onnx"), write(tmp_path, "weights")
    for name in (
        "other.onnx",
        "other.onnx.data",
        "model.onnx_data",
        "model.safetensors",
        ".hidden",
        "a.engine",
    ):
        write(tmp_path, name)
    (tmp_path / "folder").mkdir()
    kept = [write(tmp_path, name) for name in ("chat_template.jinja", "config.json", "tokenizer.json")]
    assert sidecars_of(graph, [data]) == kept


def test_the_decoder_of_a_folder(tmp_path: Path) -> None:
    assert graph_in(tmp_path / "any.onnx") == tmp_path / "any.onnx"
    with pytest.raises(InputError, match="found: none"):
        graph_in(tmp_path)
    one = write(tmp_path, "decoder.onnx")
    assert graph_in(tmp_path) == one
    write(tmp_path, "encoder.onnx")
    with pytest.raises(InputError, match=r"found: decoder\.onnx, encoder\.onnx"):
        graph_in(tmp_path)
    usual = write(tmp_path, "model.onnx")
    assert graph_in(tmp_path) == usual
    write(tmp_path, "genai_config.json", {"model": {"decoder": {"filename": "decoder.onnx"}}})
    assert graph_in(tmp_path) == one
    write(tmp_path, "genai_config.json", {"model": {"decoder": {"filename": "../decoder.onnx"}}})
    with pytest.raises(InputError, match="outside its folder"):
        graph_in(tmp_path)
