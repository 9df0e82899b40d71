"""Rows go through a model block by block or in pieces, with the bits of a whole pass; attention watched or replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from nbl_export.batch import PIXELS, TOKENS
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import attention_layers, block_stack, layer_count, main_input
from nbl_export.models.lengths import (
    REHEARSAL,
    Crossed,
    Room,
    crossed_by,
    crossing_prompts,
    lengths,
    small_copy,
)
from nbl_export.models.running import observed
from nbl_export.models.walk import (
    Segment,
    after_blocks,
    first_needed,
    one_of_each_kind,
    recording_inputs,
    segments,
    starting_at,
    walking,
)
from tests import families
from tests.families import unsaved
from tests.models.test_weights import logits
from tests.tiny import vision_encoder
from tests.tiny_types import BEYOND, ENCODERS, tiny_model

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 250, (2, 24), generator=GENERATOR) for _ in range(2)]
IMAGES = [torch.randn(2, 3, 32, 32, generator=GENERATOR) for _ in range(2)]

Seen = dict[int, list[torch.Tensor]]


@contextmanager
def watched(model: Any) -> Iterator[Seen]:
    """h, x and y of every attention layer, batch after batch."""
    seen: Seen = {layer.index: [] for layer in attention_layers(model)}
    with observed(
        model, attention_layers(model), lambda index, *hxy: seen[index].extend(t.clone() for t in hxy)
    ):
        yield seen


def whole(model: Any, batches: list[dict[str, torch.Tensor]]) -> Seen:
    dummy_run(model)
    with watched(model) as seen, torch.inference_mode():
        for batch in batches:
            model(**batch)
    return seen


def by_blocks(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[Seen, list[torch.Tensor]]:
    """What the attention layers see, and the model's outputs made of the last states."""
    with torch.inference_mode(), walking(model) as run:
        with watched(model) as seen:
            states: list[torch.Tensor | None] = [None] * len(batches)
            for segment in segments(model):
                with run(segment) as step:
                    states = [step(batch, before) for batch, before in zip(batches, states, strict=True)]
        with after_blocks(model) as finish:
            return seen, [finish(batch, after)[0] for batch, after in zip(batches, states, strict=True)]


def assert_same(found: Seen, expected: Seen) -> None:
    assert found.keys() == expected.keys()
    for index, tensors in expected.items():
        assert len(tensors) == len(found[index]) > 0
        assert all(torch.equal(a, b) for a, b in zip(found[index], tensors, strict=True)), index


def check(model: Any) -> None:
    name = main_input(model)
    assert name in (TOKENS, PIXELS)
    batches = [{name: rows} for rows in (ROWS if name == TOKENS else IMAGES)]
    together = len(set().union(*dummy_run(model).shared.items()))  # those that share keys and values
    assert len(segments(model)) == model.config.get_text_config().num_hidden_layers - max(0, together - 1)
    seen, outputs = by_blocks(model, batches)
    assert_same(seen, whole(model, batches))
    with torch.inference_mode():
        assert all(torch.equal(a, model(**batch)[0]) for a, batch in zip(outputs, batches, strict=True))


@pytest.mark.parametrize("name", families.DECODERS)
def test_every_decoder(name: str) -> None:
    check(families.unsaved(name).eval())


def test_images(tmp_path: Path) -> None:
    check(AutoModel.from_pretrained(vision_encoder(tmp_path / "m")).eval())


def test_layers_that_share_keys_and_values_are_run_together() -> None:
    model = tiny_model(
        "gemma4_text", num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3
    )
    assert dummy_run(model).shared == {4: 2, 5: 3}
    assert segments(model) == [Segment(0, 1), Segment(1, 2), Segment(2, 6)]
    batches = [{TOKENS: rows} for rows in ROWS]
    assert_same(by_blocks(model, batches)[0], whole(model, batches))


# from one block on --------------------------------------------------------------------------------

# Windows and rope tables that differ by layer, parallel and sequential blocks, alibi, learned positions, factors
# on the stream, projections around the blocks, experts, convolutions between the attention.
FAMILIES = ("gemma3-text", "falcon-alibi", "opt-post-norm", "granite", "phi")
TYPES = ("lfm2", "gpt_neo", "mixtral", "deepseek_v2")
_MADE: dict[str, Any] = {}


def made(name: str) -> Any:
    if name not in _MADE:
        model = tiny_model(name) if name in TYPES else unsaved(name)
        _MADE[name] = model.eval().requires_grad_(False)
        dummy_run(_MADE[name])  # whose own run is not to be counted
    return _MADE[name]


@pytest.fixture(params=[*FAMILIES, *TYPES])
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@contextmanager
def calls(model: Any) -> Iterator[list[int]]:
    """Within the block, the numbers of the blocks that were run, in order."""
    found: list[int] = []
    stack = attention_layers(model)[0].block.rpartition(".")[0]
    hooks = [
        block.register_forward_hook(lambda *_, i=i: found.append(i))
        for i, block in enumerate(model.get_submodule(stack))
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def test_a_run_from_any_layer_on_gives_the_same_bits(model: Any) -> None:
    layers = attention_layers(model)
    whole, before = logits(model), None
    with recording_inputs(model, [layer.index for layer in layers]) as kept:
        assert torch.equal(logits(model), whole)
    assert sorted(kept) == [layer.index for layer in layers]
    for index, states in kept.items():
        with calls(model) as ran, starting_at(model, index, states):
            assert torch.equal(logits(model), whole), index
        assert min(ran) == index, "the blocks before it are not run"
        # The states are what counts, not the tokens before them.
        with starting_at(model, index, states * 0.5):
            other = logits(model)
        assert not torch.allclose(other, whole)
        assert before is None or not torch.allclose(other, before)
        before = other


KINDS = {
    "llama": [0],
    "gpt_oss": [0, 1],  # a window, and none
    "gpt_neo": [0, 1],
    "lfm2": [0, 1],  # a convolution, and attention
    "deepseek_v2": [0, 2],  # an MLP, and experts
    "smollm3": [0, 3],  # with and without rotary embedding
}


@pytest.mark.parametrize("name", KINDS)
def test_one_block_of_each_kind_is_left(name: str) -> None:
    model = made(name) if name != "smollm3" else unsaved(name).eval()
    dummy_run(model)
    stack: Any = block_stack(model)[1]
    before, whole = list(stack), logits(model)
    with one_of_each_kind(model) as count:
        assert [i for i, block in enumerate(stack) if block is before[i]] == KINDS[name]
        assert count == len(KINDS[name])
        assert not torch.equal(logits(model), whole)
    assert list(stack) == before and torch.equal(logits(model), whole)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_a_run_begins_where_its_keys_and_values_are_made(model_type: str) -> None:
    model = tiny_model(model_type)  # layer 2 reads those of layer 0, layer 3 those of 1
    assert [first_needed(model, index) for index in range(4)] == [0, 0, 0, 0]
    one = tiny_model(
        model_type,
        layer_types=["full_attention", "sliding_attention", *["full_attention"] * 2],
        num_kv_shared_layers=1,
    )
    assert [first_needed(one, index) for index in range(4)] == [0, 1, 2, 2]
    expected = logits(one)
    with recording_inputs(one, [layer.index for layer in attention_layers(one)]) as states:
        logits(one)
    for index in range(3):
        with starting_at(one, index, states[index]):
            assert torch.equal(logits(one), expected)


# lengths --------------------------------------------------------------------------------------


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
