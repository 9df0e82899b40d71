"""``genai_config.json``: what onnxruntime-genai reads from it, and what it says of models that say little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.export.sidecars import GENAI, genai_config, with_embeds
from nbl_export.models.layers import position_rows
from nbl_export.models.multimodal import placeholders, whole_config
from tests.fixtures_graph import load


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
        ({"bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 0}, 0, 5, 0),
        ({"eos_token_id": []}, 0, 0, 0),
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


@pytest.mark.parametrize("positions", [None, 0])
def test_a_model_that_says_no_length(positions: int | None) -> None:
    found = genai_config(model(max_position_embeddings=positions), 1, 1, 8)
    assert found["model"]["context_length"] == found["search"]["max_length"] == 2048


@pytest.mark.parametrize("shared", [True, False])
def test_onnxruntime_genai_takes_it(tmp_path: Path, shared: bool) -> None:
    """It refuses keys that it does not know."""
    genai = pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )
    known = genai_config(model(bos_token_id=1, eos_token_id=[2, 3]), 2, 2, 16, shared)
    (tmp_path / GENAI).write_text(json.dumps(known))
    genai.Config(str(tmp_path))
    known["model"]["decoder"]["of_nobody"] = 1
    (tmp_path / GENAI).write_text(json.dumps(known))
    with pytest.raises(Exception, match="of_nobody"):
        genai.Config(str(tmp_path))
    assert known["search"]["past_present_share_buffer"] is shared


@pytest.mark.parametrize(
    ("name", "kind", "towers", "vision"),
    [
        ("gemma3", "gemma3", {"vision"}, {"patch_size": 14}),
        ("mistral3", "mistral3", {"vision"}, {"patch_size": 14, "spatial_merge_size": 2}),
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


def test_embeddings_of_each_layer_go_from_the_embedding_to_the_decoder(tmp_path: Path) -> None:
    found = with_embeds(genai_config(model(), 1, 1, 8), None, {}, 1, per_layer=True)
    both = {"inputs_embeds": "inputs_embeds", "per_layer_inputs": "per_layer_inputs"}
    assert found["model"]["embedding"]["outputs"] == both
    assert both.items() <= found["model"]["decoder"]["inputs"].items()
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    (tmp_path / GENAI).write_text(json.dumps(found))
    genai.Config(str(tmp_path))  # which knows the names


def test_a_model_without_towers_has_no_place_for_them() -> None:
    found = with_embeds(genai_config(model(), 1, 1, 8), None, {}, 1)["model"]
    assert found["type"] == "llama" and found["embedding"]["inputs"] == {"input_ids": "input_ids"}
    assert not {"vision", "speech"} & found.keys()
