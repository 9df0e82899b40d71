"""The lengths that configurations say, and what crosses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbl_export.models.layers import attention_layers, layer_count
from nbl_export.models.lengths import (
    REHEARSAL,
    Crossed,
    Room,
    crossed_by,
    crossing_prompts,
    lengths,
    small_copy,
)
from tests.tiny_types import BEYOND, ENCODERS, tiny_model


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


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("modernbert", [("local_attention", 200, (0,))]),
        ("gemma3", [("sliding_window", 100, (0,))]),
        ("deberta", [("max_relative_positions", 100, (0, 1))]),
    ],
)
def test_lengths_of_encoders(name: str, found: Any) -> None:
    model = ENCODERS[name].model()
    assert [(one.key, one.tokens, one.layers) for one in lengths(model)] == found
    (one,) = crossed_by(model, 0, (64,))
    assert one.prompts == (found[0][1] + 8,)  # nothing is decoded
    (one,) = crossed_by(model, 0, (found[0][1] + 2,))
    assert (one.prompts, one.why) == ((), "")


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
    assert "too long" in crossed_by(large("mistral", sliding_window=4096), 8, room=REHEARSAL)[0].why


def large(name: str, **changes: Any) -> Any:
    """As it is downloaded: of a size that no test makes, without bytes."""
    with torch.device("meta"):
        return BEYOND[name].model(
            hidden_size=4096, intermediate_size=14336, vocab_size=128000, max_position_embeddings=131072,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, **changes,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["mistral", "gemma3", "cohere2", "llama4"])
def test_a_copy_is_small_and_its_length_acts(name: str) -> None:
    types = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    changes = {
        "num_hidden_layers": 6,
        **(types if name in ("gemma3", "cohere2") else {}),
        **({"no_rope_layers": [1, 1, 1, 0, 1, 1]} if name == "llama4" else {}),
    }
    model = large(name, **changes)
    copy = small_copy(model, lengths(model))
    assert type(copy) is type(model) and sum(p.numel() for p in copy.parameters()) < 1 << 27
    assert layer_count(copy) == 2
    assert {layer.kind for layer in attention_layers(copy)} == {
        layer.kind for layer in attention_layers(model)
    }
    assert [one.tokens for one in lengths(copy)] == [16]
    # The first 16 tokens cannot tell, and the others can: the same weights without it.
    off = small_copy(model, [])
    off.load_state_dict(copy.state_dict())
    ids = torch.randint(3, 250, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        here, there = (m(input_ids=ids).logits[0] for m in (copy, off))
    away = (here - there).abs().amax(-1) / here.std()
    assert float(away[:15].max()) < 1e-4 and float(away[18:].median()) > 0.03
