"""The lengths that configurations and modules say, and what crosses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from nbl_export.models.layers import positions
from nbl_export.models.lengths import (
    REHEARSAL,
    Crossed,
    Length,
    Room,
    crossed_by,
    crossing_prompts,
    lengths,
)
from tests.beyond import BEYOND, ENCODERS
from tests.tiny_types import tiny_model

_ALTERNATING = ["sliding_attention", "full_attention"]


def names(model: Any) -> list[str]:
    return [length.name for length in lengths(model)]


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("mistral", {}, [("sliding_window", 100, (0, 1), False)]),
        ("mistral", {"sliding_window": None}, []),
        ("gemma3", {}, [("sliding_window", 100, (0,), False)]),
        # A window that no layer has says nothing.
        ("gemma3", {"layer_types": ["full_attention"] * 2}, []),
        ("phi3", {}, [("original_max_position_embeddings", 100, (0, 1), True)]),
        ("ministral3", {}, [("original_max_position_embeddings", 100, (0, 1), False)]),
        ("llama4", {}, [("attention_chunk_size", 100, (0,), False)]),
        # The temperature is tuned where it says so, by the length of a scale.
        (
            "llama4",
            {"attn_temperature_tuning": True, "floor_scale": 90},
            [("floor_scale", 90, (0, 1), False), ("attention_chunk_size", 100, (0,), False)],
        ),
    ],
)
def test_lengths_of_configurations(name: str, changes: Any, found: Any) -> None:
    model = BEYOND[name].model(**changes)
    assert [(one.key, one.tokens, one.layers, one.batch) for one in lengths(model)] == found


def test_a_plain_model_has_none() -> None:
    for model_type in ("llama", "opt", "deepseek_v3"):
        assert lengths(tiny_model(model_type)) == ()


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}],
    ids=lambda r: str(r["rope_type"]),
)
def test_a_rope_that_is_the_same_at_any_length_is_none(rope: Any) -> None:
    rope = {**rope, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    assert lengths(tiny_model("llama", rope_parameters=rope)) == ()


def test_a_key_that_nobody_has_named_is_caught_at_any_depth() -> None:
    model = tiny_model("llama")
    model.config.frob_window = 70
    model.config.frob = {"tokens_window": [30, 40, 40, 30], "window_layers": 3, "num_windows": 9}
    model.config.kept_tokens = 50
    model.config.chunk_size_feed_forward = 60
    model.config.use_window = True
    model.config.vision = {"model_type": "other", "window_size": 20}
    assert names(model) == [
        "tokens_window 30",
        "tokens_window 40",
        "kept_tokens 50",
        "frob_window 70",
    ]


def test_a_number_of_a_module_counts_and_one_that_is_idle_by_the_configuration_does_not() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.frob_window, attention.other = 77, 78
    (one,) = lengths(model)
    assert (one.key, one.tokens, one.configured) == ("LlamaAttention.frob_window", 77, False)
    assert names(BEYOND["llama4"].model(floor_scale=90)) == ["attention_chunk_size 100"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        # The radius, which its modules keep, is of the same window.
        ("modernbert", [("local_attention", 200, (0,), True)]),
        ("gemma3", [("sliding_window", 100, (0,), True)]),
        ("deberta", [("max_relative_positions", 100, (0, 1), True)]),
    ],
)
def test_lengths_of_encoders(name: str, found: Any) -> None:
    model = ENCODERS[name].model()
    assert [(one.key, one.tokens, one.layers, one.configured) for one in lengths(model)] == found
    (one,) = crossed_by(model, 0, (64,))
    assert one.prompts == (found[0][1] + 8,)  # nothing is decoded
    (one,) = crossed_by(model, 0, (found[0][1] + 2,))
    assert (one.prompts, one.why) == ((), "")


def test_a_number_that_only_code_has_is_a_default_of_a_function() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = AutoModel.from_config(AutoConfig.for_model("mpnet", vocab_size=99, **sizes))
    assert names(model) == ["MPNetEncoder.relative_position_bucket.max_distance 128"]


def test_a_model_of_images_has_none() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model("vitdet", image_size=32, patch_size=8, window_size=2, **sizes)
    assert names(AutoModel.from_config(config)) == []


def test_positions_are_said_by_another_key_too() -> None:
    assert (
        positions(
            AutoModel.from_config(
                AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=300)
            )
        )
        == 300
    )


def test_prompts_are_longer_and_decoded_across() -> None:
    model = BEYOND["mistral"].model()
    (one,) = crossed_by(model, 8, (65, 42))
    assert one.prompts == (108, 96)
    assert one.prompts[1] <= 100 < one.prompts[1] + 8  # the first token beyond is a step's
    # A ragged row of a window that is short goes beyond it already.
    (one,) = crossed_by(BEYOND["mistral"].model(sliding_window=20), 8, (65, 42))
    assert one.prompts == (16,)
    assert crossing_prompts([one, Crossed(one.length, (30, 16))]) == [16, 30]
    assert crossed_by(tiny_model("llama"), 8) == ()


def test_a_length_beyond_all_positions_is_never_reached() -> None:
    (one,) = crossed_by(BEYOND["mistral"].model(max_position_embeddings=100), 8)
    assert (one.prompts, one.reached, one.why) == ((), False, "the model has 100 positions")
    # Just before the end a prompt has less room.
    (one,) = crossed_by(BEYOND["mistral"].model(max_position_embeddings=112), 8)
    assert one.prompts == (104, 96)
    (one,) = crossed_by(BEYOND["mistral"].model(max_position_embeddings=102), 8)
    assert one.prompts == () and one.reached
    assert one.why == "of the model's 102 positions too few are left beyond it for 8 decode steps"


def test_room_is_bounded_by_work_and_by_memory() -> None:
    model = BEYOND["mistral"].model()
    weights = sum(p.numel() for p in model.parameters())
    (one,) = crossed_by(model, 8, room=Room(weights * (108 + 8 + 96 + 8)))
    assert one.prompts
    (one,) = crossed_by(model, 8, room=Room(weights * (108 + 8 + 96 + 7)))
    assert not one.prompts and one.reached and "too long" in one.why
    (one,) = crossed_by(model, 8, room=Room(0.0, least=220))
    assert one.prompts
    # Nine passes over each token, as without a cache.
    (one,) = crossed_by(model, 8, passes=9, room=Room(weights * 220 * 9 - 9))
    assert not one.prompts
    with torch.device("meta"):
        large = BEYOND["mistral"].model(
            hidden_size=4096, intermediate_size=14336, vocab_size=32000, sliding_window=4096,
            max_position_embeddings=32768,
        )  # fmt: skip
    for room in (Room(5e11, 256), REHEARSAL):
        assert "too long" in crossed_by(large, 8, room=room)[0].why


def test_two_lengths_share_the_room() -> None:
    model = BEYOND["llama4"].model(attn_temperature_tuning=True, floor_scale=90)
    weights = sum(p.numel() for p in model.parameters())
    first, second = crossed_by(model, 8, room=Room(weights * 230))
    assert isinstance(first.length, Length) and first.prompts and not second.prompts
