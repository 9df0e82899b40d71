"""Tokens of images and sounds: embeddings, positions and masks, each against what is written out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nbl_export.batch.media_ids import FIRST
from nbl_export.models.media_tokens import (
    MediaTokens,
    joined,
    load_media,
    masks,
    save_media,
    written,
)

# Two images: of 2 x 2, after which the text goes on two further, and of 1 x 3.
OFFSETS = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 2]]


def tokens(both_ways: int = 0) -> MediaTokens:
    return MediaTokens(
        features=np.arange(14, dtype=np.float32).reshape(7, 2),
        later=np.zeros((7, 0, 2), np.float32),
        offsets=np.array(OFFSETS, dtype=np.int32),
        steps=np.array([0, 0, 0, 2, 0, 0, 3], dtype=np.int32),
        block=np.array([0, 0, 0, 0, 1, 1, 1], dtype=np.int32),
        stand_in=np.array([3, 3, 3, 3, 4, 4, 4], dtype=np.int32),
        both_ways=np.array([both_ways], dtype=np.int32),
    )


def ids(*given: int) -> torch.Tensor:
    return torch.tensor([[FIRST - 1 - i if i < 0 else i for i in given]])


def test_positions_go_on_after_the_longest_side_of_an_image() -> None:
    found = tokens().positions(ids(5, -1, -2, -3, -4, 6, 7, -5, -6, -7, 8))
    assert found[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 3, 4, 5, 5, 5, 8],
        [0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 8],
        [0, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
    assert tokens().positions(ids(4, 5, 6)).tolist() == [[[0, 1, 2]]] * 3


def test_an_image_is_seen_in_both_directions_where_it_is_so() -> None:
    row = ids(5, -1, -2, -3, -4, 6, -5, -6, -7)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(tokens().may_attend(row)[0], causal)
    expected = causal.clone()
    expected[1:5, 1:5] = expected[6:9, 6:9] = True
    assert torch.equal(tokens(1).may_attend(row)[0], expected)
    near = torch.arange(9)[:, None] - torch.arange(9) < 3
    assert torch.equal(tokens(1).may_attend(row, 3)[0], expected & near)
    config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
    found = masks(tokens(1), row, config, torch.zeros(0))
    assert torch.equal(found["full_attention"][0, 0] == 0, expected)
    assert torch.equal(found["sliding_attention"][0, 0] == 0, expected & near)
    assert found["full_attention"].min() == torch.finfo(torch.float32).min
    assert masks(tokens(1), row, SimpleNamespace(), torch.zeros(0)).shape == (1, 1, 9, 9)


def test_embeddings_are_the_tables_and_those_of_images() -> None:
    table = torch.nn.Embedding(9, 2)
    model = SimpleNamespace(get_input_embeddings=lambda: table)
    row = ids(5, -7, -2, 8)
    found = tokens().embeddings(row, model).detach()
    assert torch.equal(found[0, [0, 3]], table.weight[[5, 8]].detach())
    assert found[0, 1:3].tolist() == [[12, 13], [2, 3]]
    assert written(row).tolist() == [[5, 0, 0, 8]]


class Body(torch.nn.Module):
    """A language model with embeddings of each layer: those of a token are its number."""

    config = SimpleNamespace(hidden_size_per_layer_input=1)

    def get_per_layer_inputs(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[..., None, None].float()

    def forward(self, **given: Any) -> dict[str, Any]:
        return given


def test_what_is_given_beside_embeddings() -> None:
    """Embeddings of each layer are those of a stand-in; what is added later is in the order of the tokens."""
    row = ids(5, -7, -2, 8)
    plain = SimpleNamespace(config=SimpleNamespace())
    assert tokens().beside(row, plain) == {}
    assert tokens().beside(row, Body())["per_layer_inputs"][0, :, 0, 0].tolist() == [5, 4, 3, 8]
    later = np.arange(28, dtype=np.float32).reshape(7, 2, 2)
    found = replace(tokens(), later=later).beside(row, plain)
    assert found["visual_pos_masks"].tolist() == [[False, True, True, False]]
    first, second = found["deepstack_visual_embeds"]
    assert first.tolist() == [[24, 25], [4, 5]] and second.tolist() == [[26, 27], [6, 7]]


def test_tokens_of_several_documents_are_one_table() -> None:
    found = joined([tokens(), replace(tokens(1), block=tokens().block + 2)])
    assert len(found) == 14 and found.block.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert found.both_ways.tolist() == [1] and found.later.shape == (14, 0, 2)


def test_tokens_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_media(tmp_path / "x", tokens())
    found = load_media(tmp_path / "x", "again")
    assert all(np.array_equal(getattr(found, name), value) for name, value in vars(tokens()).items())
