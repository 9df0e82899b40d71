"""Rows that go through a model block by block get the bits of a whole forward pass, and each block is read once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.models.dummy_run import Handed, dummy_run
from nbl_export.models.layers import attention_layers, main_input, observed
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.walk import Segment, after_blocks, segments, walking
from tests import families
from tests.encoders import text_encoder, vision_encoder
from tests.models.test_weights import absent, reads, stored_in
from tests.tiny_types import tiny_model

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 250, (2, 24), generator=GENERATOR) for _ in range(2)]
IMAGES = [torch.randn(2, 3, 32, 32, generator=GENERATOR) for _ in range(2)]
HYBRIDS = ("lfm2", "gpt_neo", "mixtral", "deepseek_v2", "gemma2", "opt")
ENCODERS = {
    "bert": "BertModel",
    "mpnet": "MPNetModel",
    "deberta-v2": "DebertaV2Model",
    "distilbert": "DistilBertModel",
}

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


@pytest.mark.parametrize("name", HYBRIDS)
def test_blocks_that_are_no_attention_experts_and_projections(name: str) -> None:
    check(tiny_model(name).eval())


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders(name: str, tmp_path: Path) -> None:
    check(AutoModel.from_pretrained(text_encoder(tmp_path / "m", name, ENCODERS[name])).eval())


def test_images(tmp_path: Path) -> None:
    check(AutoModel.from_pretrained(vision_encoder(tmp_path / "m")).eval())


def test_each_block_is_read_once_for_all_batches(tmp_path: Path) -> None:
    folder = stored_in(families.build("llama", tmp_path / "m"), torch.bfloat16)
    model: Any = load_model(find_model(str(folder)))
    batches = [{TOKENS: rows} for rows in ROWS]
    expected = whole(model, batches)
    with reads() as found:
        assert_same(by_blocks(model, batches)[0], expected)
    names = {n for n, _ in model.named_parameters()} - {"model.embed_tokens.weight"}
    assert sorted(found) == sorted(names)
    assert absent(model) >= names


def test_only_the_segment_is_in_memory(tmp_path: Path) -> None:
    folder = stored_in(families.build("llama", tmp_path / "m"), torch.bfloat16)
    model: Any = load_model(find_model(str(folder)))
    blocks = list(model.model.layers)  # which are skipped in their turn
    with torch.inference_mode(), walking(model) as run:
        states: Any = None
        for index, segment in enumerate(segments(model)):
            with run(segment) as step:
                states = step({TOKENS: ROWS[0]}, states)
                there = [not block.self_attn.q_proj.weight.is_meta for block in blocks]
                assert there == [i == index for i in range(len(there))]


def test_blocks_that_share_something_are_run_together() -> None:
    model: Any = families.unsaved("llama").eval()
    # As the keys and values that some layers of a family take from others.
    shared: dict[str, Any] = {}
    hooks = [
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "shared": shared}), with_kwargs=True
        )
        for block in model.model.layers
    ]
    assert not dummy_run(model).separate
    (segment,) = segments(model)
    assert segment == Segment(0, len(hooks))
    batches = [{TOKENS: rows} for rows in ROWS]
    expected = whole(model, batches)
    with torch.inference_mode(), walking(model) as run, watched(model) as seen, run(segment) as step:
        assert all(step(batch, None).shape[:2] == (2, 24) for batch in batches)
    assert_same(seen, expected)


def test_what_only_the_first_block_makes_is_seen_to_be_handed_on() -> None:
    x, table = torch.ones(1, 2, 3), torch.ones(1, 2, 2)
    for taken, on in (
        ({"position_bias": table}, True),
        ({"bias": (None, table)}, True),
        ({"mask": table + 0}, False),
    ):
        handed = Handed()
        handed.given(None, (), (x, table))
        handed.taken(None, (x,), taken)
        assert handed.on == on, taken
    handed = Handed()
    handed.given(None, (), (x, table))
    handed.taken(None, (x, table), {})
    assert handed.on
    handed = Handed()
    handed.given(None, (), (x,))
    handed.given(None, (), x)
    handed.taken(None, (x,), {"hidden_states": x})
    assert not handed.on, "the states themselves"


def test_layers_that_share_keys_and_values_are_run_together() -> None:
    model = tiny_model(
        "gemma4_text", num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3
    )
    assert dummy_run(model).shared == {4: 2, 5: 3}
    assert segments(model) == [Segment(0, 1), Segment(1, 2), Segment(2, 6)]
    batches = [{TOKENS: rows} for rows in ROWS]
    assert_same(by_blocks(model, batches)[0], whole(model, batches))
