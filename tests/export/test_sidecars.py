"""The files beside a graph, what they are told, and where the graphs of a package lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.engine.manifest import load_manifest, manifest_path, save_manifest
from nbl_export.errors import InputError
from nbl_export.export.forms import FORMS
from nbl_export.export.layouts import CONFIG, LAYOUTS, triton_config
from nbl_export.export.sidecars import (
    GENAI,
    copy_sidecars,
    genai_config,
    graph_in,
    sidecars_of,
    with_embeds,
)
from nbl_export.export.torch import trace
from nbl_export.files import sha256_of_file
from nbl_export.graph.cache import kv_pairs
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.models.layers import position_rows
from nbl_export.models.multimodal import placeholders, whole_config
from nbl_export.workspace import LINEARIZED
from tests.exporters import GRAPH, Graphs
from tests.finished import manifest_of
from tests.fixtures_graph import load
from tests.tiny_types import tiny_model


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
    written = copy_sidecars(files, target, linear=[1, 2], cached=[0, 3])
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
    copy_sidecars([source], tmp_path, linear=[1, 2], cached=[0, 3, 4, 5])  # in place
    found = json.loads(source.read_text())["model"]["decoder"]
    assert found == {"sliding_window": {"window_size": 8, "layers": [0, 2]}, "num_hidden_layers": 4}


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_configuration_is_an_input_error(tmp_path: Path, content: str) -> None:
    source = write(tmp_path, "genai_config.json", content)
    with pytest.raises(InputError, match=r"genai_config\.json") as caught:
        copy_sidecars([source], tmp_path / "b", [0], [1])
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


def model(**fields: Any) -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "vocab_size": 512, "model_type": "llama"}
    return SimpleNamespace(**{**sizes, "max_position_embeddings": 128, **fields})


def test_sizes_are_those_of_the_graph_not_of_the_model() -> None:
    """Three layers are linear: their pairs are gone, and the others are numbered anew."""
    found = genai_config(model(num_hidden_layers=8), kv_pairs=5, kv_heads=2, head_size=16)["model"]
    decoder = found["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (5, 2, 16)
    assert (decoder["num_attention_heads"], decoder["hidden_size"], found["vocab_size"]) == (8, 64, 512)
    assert found["type"] == "llama" and found["context_length"] == 128


@pytest.mark.parametrize(
    ("fields", "bos", "eos", "pad"),
    [
        ({}, 0, 0, 0),
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}, 1, 2, 3),
        ({"bos_token_id": None, "eos_token_id": 2, "pad_token_id": None}, 2, 2, 2),
        # Several ends: the first stands where one is wanted.
        ({"eos_token_id": [7, 8]}, 7, [7, 8], 7),
        ({"eos_token_id": [7], "pad_token_id": -1}, 7, 7, 7),
    ],
)
def test_special_tokens(fields: dict[str, Any], bos: Any, eos: Any, pad: Any) -> None:
    found = genai_config(model(**fields), 1, 1, 8)["model"]
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (bos, eos, pad)


@pytest.mark.parametrize(
    ("ends", "more", "union"),
    [
        (2, [2, 5], [2, 5]),  # a base model's end of text, and a chat model's end of turn
        (2, 5, [2, 5]),
        ([9, 2], [2, 5, 9], [9, 2, 5]),
        (None, [5, 6], [5, 6]),
        (2, None, 2),
        (2, [], 2),
        ([], [5], 5),
        (2, 2, 2),
    ],
)
def test_stop_tokens_are_those_of_both_configurations(ends: Any, more: Any, union: Any) -> None:
    generation = SimpleNamespace(eos_token_id=more, pad_token_id=8, bos_token_id=None)
    found = genai_config(model(eos_token_id=ends), 1, 1, 8, generation=generation)["model"]
    first = union[0] if isinstance(union, list) else union
    assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == (union, 8, first)


@pytest.mark.parametrize(
    ("name", "kind", "towers", "vision"),
    [
        ("gemma3", "gemma3", {"vision"}, {"patch_size": 14}),
        (
            "qwen2-vl",  # which it does not know, and computes as the next one
            "qwen2_5_vl",
            {"vision"},
            {"patch_size": 14, "spatial_merge_size": 2, "image_token_id": 250, "vision_start_token_id": 252},
        ),
        ("phi4-multimodal", "phi4mm", {"vision", "speech"}, {"patch_size": 14}),
        ("llava", "llava", {"vision"}, {"image_token_id": 250}),  # which it refuses by its type
    ],
)
def test_the_towers_have_a_place_beside_an_embedding(
    name: str,
    kind: str,
    towers: set[str],
    vision: dict[str, int],
    wrapper_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    decoder: Any = load(wrapper_folder(name))
    rows, given = position_rows(decoder), placeholders(decoder)
    known = genai_config(decoder.config, 4, 2, 16)
    found = with_embeds(known, whole_config(decoder), given, rows)
    model = found["model"]
    assert model["type"] == kind and {"vision", "speech"} & model.keys() == towers
    numbers = model | model["vision"]
    assert {key: numbers[key] for key in vision} == vision
    features = {f"{'image' if tower == 'vision' else 'audio'}_features" for tower in towers}
    assert model["embedding"]["inputs"].keys() == {"input_ids", *features}
    assert model["vision"]["inputs"].keys() == {
        "pixel_values",
        "image_grid_thw" if rows > 1 else "image_sizes",
    }
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    (tmp_path / GENAI).write_text(json.dumps(found))
    genai.Config(str(tmp_path))


# layouts of packages ------------------------------------------------------------------------------


WEB, TRITON = LAYOUTS["web"], LAYOUTS["triton"]


def test_a_graph_for_the_web_is_named_by_its_precision() -> None:
    for precision, name in (("fp32", "model"), ("fp16", "model_fp16"), ("int4", "model_q4")):
        assert WEB.names(LINEARIZED, precision) == (f"onnx/{name}.onnx", f"{name}.onnx_data")
    with pytest.raises(InputError, match="runs no graph in bf16"):
        WEB.names(LINEARIZED, "bf16")


def test_each_head_of_the_cache_has_its_size(graphs: Graphs) -> None:
    """onnxruntime-genai's builder gives it a name, by which transformers.js makes heads of no size."""
    small = load_graph(graphs("genai-fp32", "llama-gqa") / GRAPH)
    values = [value for pair in kv_pairs(small) for value in (*pair.past, *pair.present)]
    assert {str(value.shape[3]) for value in values if value.shape} == {"kv_cache_dim"}
    WEB.change(small)
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
def small() -> Any:
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def growing(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_graph(trace(small), tmp_path_factory.mktemp("growing") / "model.onnx")[0]


def test_triton_carries_the_cache_and_asks_for_the_rest(small: Any, growing: Path) -> None:
    lines = triton_config(load_graph(growing)).splitlines()
    assert lines[:2] == ['backend: "onnxruntime"', "max_batch_size: 1"]
    asked = [line.split('"')[1] for line in lines if line.startswith(("input", "output"))]
    assert asked == ["input_ids", "attention_mask", "position_ids", "logits"]
    states = [line for line in lines if "initial_state" in line]
    assert len(states) == 4
    assert 'input_name: "past_key_values.0.key" output_name: "present.0.key"' in states[0]
    assert "dims: [2, -1, 8] initial_state" in states[0] and "dims: [2, 0, 8] zero_data: true" in states[0]
    found = triton_config(trace(small, FORMS["none"]))
    assert "max_batch_size: 8" in found and "dynamic_batching { }" in found and "state" not in found


def test_triton_has_no_static_cache(static_graph: Path) -> None:
    with pytest.raises(InputError, match=r"begins a cache without tokens.*export with --kv-cache concat"):
        TRITON.change(load_graph(static_graph))


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_is_a_model_of_its_own(growing: Path, tmp_path: Path, library: str) -> None:
    graph, engine = tmp_path / TRITON.names(LINEARIZED, "fp32")[0], tmp_path / "engine" / "model.engine"
    for path in (graph, engine):
        path.parent.mkdir(parents=True)
    save_graph(load_graph(growing), graph)
    TRITON.finish(tmp_path, [graph], "fp32", True)
    other = (graph.parents[1] / CONFIG).read_text()
    assert other == triton_config(load_graph(graph))
    engine.write_bytes(b"an engine")
    manifest = manifest_of(graph, hashes={"engine": sha256_of_file(engine)}, size=9, library=library)
    save_manifest(manifest_path(engine), manifest)
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
